// masked_pool: L hidden states (B, T, H) and one mask (B, T) -> (B, L * H), each hidden state read
// once. A row without a real token pools to 0, and its gradient is 0.
#pragma once

#include <cstdint>

#include "common.h"
#include "simd/isa.h"

namespace codir_fast {

enum class PoolMode { kMean, kFirst, kLast, kMax };

// One layer's hidden states; strides in elements, H is dense.
struct HiddenState {
  const void* data;
  std::int64_t stride_b, stride_t;
};

// Rows of tokens that are real, as the kernels want them: tokens[offsets[b]] .. tokens[offsets[b +
// 1] - 1] are the positions of row b, ascending.
struct RealTokens {
  const std::int64_t* offsets;
  const std::int64_t* tokens;
};

// pooled (B, L*H) in dtype. argmax (B, L*H) is written for kMax only (-1 where a row has no token),
// else it may be null.
Status masked_pool_cpu(void* pooled, std::int64_t* argmax, const HiddenState* hidden_states,
                       RealTokens real, std::int64_t L, std::int64_t B, std::int64_t H, DType dtype,
                       PoolMode mode, const Executor& executor, Isa isa = active_isa());

// dhidden: L of (B, T, H), every element written. argmax as given by masked_pool_cpu, null unless
// kMax.
Status masked_pool_backward_cpu(void* const* dhidden, const void* grad, const std::int64_t* argmax,
                                RealTokens real, std::int64_t L, std::int64_t B, std::int64_t T,
                                std::int64_t H, DType dtype, PoolMode mode,
                                const Executor& executor, Isa isa = active_isa());

}  // namespace codir_fast
