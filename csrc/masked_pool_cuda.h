// masked_pool on CUDA GPUs, sm_80 and newer: what masked_pool.h says, all layers in one launch (of
// each kMaxPoolLayers), each hidden state read once, 16 bytes at a time. Tokens that are masked are
// not read. Everything is on the device; nothing waits for it.
#pragma once

#include <cstdint>

#include "masked_pool.h"

namespace codir_fast {

// (B, T), not zero at real tokens: bytes, or int64. Null: all tokens are real.
struct TokenMask {
  const void* data;
  bool is_byte;
  std::int64_t stride_b, stride_t;  // in elements
};

// pooled (B, L*H) of dtype; argmax (B, L*H) for kMax, else it may be null. L, B, T and H below
// 2^31. `stream` is a cudaStream_t. The error as CUDA words it; null if the launches succeeded.
const char* masked_pool_cuda(void* pooled, std::int64_t* argmax, const HiddenState* hidden_states,
                             TokenMask mask, std::int64_t L, std::int64_t B, std::int64_t T,
                             std::int64_t H, DType dtype, PoolMode mode, void* stream);

// dhidden: L of (B, T, H), every element written. argmax as masked_pool_cuda gave it, null unless
// kMax.
const char* masked_pool_backward_cuda(void* const* dhidden, const void* grad,
                                      const std::int64_t* argmax, TokenMask mask, std::int64_t L,
                                      std::int64_t B, std::int64_t T, std::int64_t H, DType dtype,
                                      PoolMode mode, void* stream);

}  // namespace codir_fast
