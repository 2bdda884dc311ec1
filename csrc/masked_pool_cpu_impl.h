// What masked_pool_cpu.cpp (threads, dispatch) asks of masked_pool_cpu_impl.cpp, which is compiled
// once per instruction set. Plain data and declarations only: code here would be shared between
// instruction sets.
#pragma once

#include <cstdint>

#include "masked_pool.h"
#include "simd/kernels_by_isa.h"

namespace codir_fast {

constexpr std::int64_t kMaxPoolSlice = 1024;

struct PoolTask {
  void* pooled;
  std::int64_t* argmax;
  const HiddenState* hidden_states;
  RealTokens real;
  std::int64_t L, B, H;
  std::int64_t slice;  // columns of an item of work, at most kMaxPoolSlice
  DType dtype;
  PoolMode mode;
};

struct PoolGradientTask {
  void* const* dhidden;
  const void* grad;
  const std::int64_t* argmax;
  RealTokens real;
  std::int64_t L, B, T, H;
  DType dtype;
  PoolMode mode;
};

struct PoolKernels {
  Status (*pool_item)(const PoolTask&, std::int64_t item);
  Status (*unpool_item)(const PoolGradientTask&, std::int64_t item);
};

CODIR_FAST_DECLARE_KERNELS(PoolKernels, kPoolKernels)

}  // namespace codir_fast
