// masked_pool on the CPU: one parallel region for all layers, forward and backward. The items are
// masked_pool_cpu_impl.cpp's.
#include <algorithm>
#include <atomic>

#include "masked_pool.h"
#include "masked_pool_cpu_impl.h"

namespace codir_fast {
namespace {

// Items are dealt out in turn: neighbours cost alike, and rows of few tokens less than others.
template <typename Run>
Status deal(std::int64_t items, const Executor& executor, const Run& run) {
  const std::int64_t threads = std::max(executor.num_threads, 1);
  std::atomic<bool> failed{false};
  executor.parallel_for(threads, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t thread = begin; thread < end; ++thread) {
      for (std::int64_t item = thread; item < items; item += threads) {
        if (run(item) != Status::kOk) failed = true;
      }
    }
  });
  return failed ? Status::kUnsupportedDType : Status::kOk;
}

}  // namespace

Status masked_pool_cpu(void* pooled, std::int64_t* argmax, const HiddenState* hidden_states,
                       RealTokens real, std::int64_t L, std::int64_t B, std::int64_t H, DType dtype,
                       PoolMode mode, const Executor& executor, Isa isa) {
  const PoolKernels& kernel = CODIR_FAST_KERNELS(kPoolKernels, isa);
  // Whole rows are read in sequence; narrow slices are for threads that rows alone can't feed.
  const std::int64_t slice = L * B < 4 * executor.num_threads ? 128 : kMaxPoolSlice;
  const std::int64_t slices = (H + slice - 1) / slice;
  const PoolTask task{pooled, argmax, hidden_states, real, L, B, H, slice, dtype, mode};
  return deal(L * B * slices, executor,
              [&](std::int64_t item) { return kernel.pool_item(task, item); });
}

Status masked_pool_backward_cpu(void* const* dhidden, const void* grad, const std::int64_t* argmax,
                                RealTokens real, std::int64_t L, std::int64_t B, std::int64_t T,
                                std::int64_t H, DType dtype, PoolMode mode,
                                const Executor& executor, Isa isa) {
  const PoolKernels& kernel = CODIR_FAST_KERNELS(kPoolKernels, isa);
  const PoolGradientTask task{dhidden, grad, argmax, real, L, B, T, H, dtype, mode};
  return deal(L * B, executor, [&](std::int64_t item) { return kernel.unpool_item(task, item); });
}

}  // namespace codir_fast
