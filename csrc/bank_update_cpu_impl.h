// What bank_update_cpu.cpp (threads, dispatch) asks of bank_update_cpu_impl.cpp, which is compiled
// once per instruction set. Plain data and declarations only: code here would be shared between
// instruction sets.
#pragma once

#include <cstdint>

#include "bank_update.h"
#include "simd/kernels_by_isa.h"

namespace codir_fast {

// bank_update's arguments. Row r belongs to owner r modulo `owners`.
struct UpdateTask {
  void* bank;
  bool* filled;
  const std::int64_t* index;
  const void* keys;
  std::int64_t N, D, owners;
  DType bank_dtype;
  double momentum;
};

struct UpdateKernels {
  // All rows of the owners in [begin, end), in the order of the index.
  Status (*update_rows)(const UpdateTask&, std::int64_t begin, std::int64_t end);
};

CODIR_FAST_DECLARE_KERNELS(UpdateKernels, kUpdateKernels)

}  // namespace codir_fast
