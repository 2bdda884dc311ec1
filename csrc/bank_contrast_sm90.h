// bank_contrast on GPUs of compute capability 9.0 (sm_90a code): the operator of bank_contrast.h in
// bfloat16 or float16, D up to 512, hand-written. One pass over the bank, its sums merged by a
// second kernel; nothing of size B x K exists. All memory is the caller's, on the device but where
// told. Nothing waits for the device.
#pragma once

#include <cstddef>
#include <cstdint>

#include "bank_contrast.h"
#include "sm90/scalar.h"

namespace codir_fast {

struct BankContrastSm90 {
  const void* query;     // (B, D) of dtype
  const void* positive;  // (B, D) of dtype, or of float
  bool positive_is_float;
  const void* bank;  // (K, D) of dtype, beginning at a multiple of 16 bytes
  // Null: not given; see BankContrastInputs.
  const std::int64_t* labels;
  const std::int64_t* bank_labels;
  const std::int64_t* exclude_index;
  const bool* valid;
  std::int64_t B, K, D;  // up to 2^31 - 256; D a multiple of 8, up to 512
  DType dtype;           // kBFloat16 or kFloat16
  sm90::Scalar inv_temperature;
  Objective objective;
  sm90::Scalar log_partition;  // NCE: log Z
  double noise_ratio;          // NCE: c
  bool normalize;              // query and positive; gradients are of what was given
};

// What these sizes and addresses lack for the kernel; null if nothing.
const char* why_not_bank_contrast_sm90(const BankContrastSm90& inputs);

// Bytes of device memory that a call needs besides, beginning at a multiple of 256 bytes. The error
// as CUDA words it; null if none.
const char* bank_contrast_sm90_workspace(const BankContrastSm90& inputs, int device,
                                         std::size_t* bytes);

// Outputs as those of bank_contrast_cpu, in float but lse. Results depend on the number of
// multiprocessors, not on timing. `stream` is a cudaStream_t of `device`, the current one. The
// error as CUDA words it; null if the launches succeeded.
const char* bank_contrast_sm90(const BankContrastOutputs& outputs, const BankContrastSm90& inputs,
                               void* workspace, int device, void* stream);

}  // namespace codir_fast
