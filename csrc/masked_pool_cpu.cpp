// masked_pool on the CPU: one parallel region over (layer, row, slice of H); masked tokens are
// never read. Sums run in float32 (float64 for float64). Nothing is allocated: a slice of H lives
// on the stack.
#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "masked_pool.h"
#include "storage.h"

namespace codir_fast {
namespace {

constexpr std::int64_t kSlice = 256;
constexpr std::int64_t kGroup = 8;

// Adds kGroup tokens as a tree: half the passes over `total`, and sums of long texts lose no
// digits.
template <typename T>
void add_group(Compute<T>* total, const T* states, std::int64_t stride_t,
               const std::int64_t* tokens, std::int64_t width) {
  const T* state[kGroup];
  for (std::int64_t n = 0; n < kGroup; ++n) state[n] = states + tokens[n] * stride_t;
  for (std::int64_t h = 0; h < width; ++h) {
    const auto value = [&](std::int64_t n) { return to_compute(state[n][h]); };
    total[h] += ((value(0) + value(1)) + (value(2) + value(3))) +
                ((value(4) + value(5)) + (value(6) + value(7)));
  }
}

template <typename T>
void mean_slice(T* out, const T* states, std::int64_t stride_t, const std::int64_t* tokens,
                std::int64_t count, std::int64_t width) {
  Compute<T> total[kSlice] = {};
  std::int64_t n = 0;
  for (; n + kGroup <= count; n += kGroup) add_group(total, states, stride_t, tokens + n, width);
  for (; n < count; ++n) {
    const T* state = states + tokens[n] * stride_t;
    for (std::int64_t h = 0; h < width; ++h) total[h] += to_compute(state[h]);
  }
  for (std::int64_t h = 0; h < width; ++h)
    from_compute(total[h] / static_cast<Compute<T>>(count), &out[h]);
}

template <typename T>
void max_slice(T* out, std::int64_t* argmax, const T* states, std::int64_t stride_t,
               const std::int64_t* tokens, std::int64_t count, std::int64_t width) {
  // Positions are as wide as values, so that one vector compare serves both.
  using Position = std::conditional_t<sizeof(Compute<T>) == 4, std::int32_t, std::int64_t>;
  Compute<T> best[kSlice];
  Position position[kSlice];
  for (std::int64_t h = 0; h < width; ++h) {
    best[h] = to_compute(states[tokens[0] * stride_t + h]);
    position[h] = static_cast<Position>(tokens[0]);
  }
  for (std::int64_t n = 1; n < count; ++n) {
    const T* state = states + tokens[n] * stride_t;
    const auto token = static_cast<Position>(tokens[n]);
    for (std::int64_t h = 0; h < width; ++h) {
      const Compute<T> value = to_compute(state[h]);
      // The first NaN wins, as in torch.max: it is greater than any number and never replaced.
      const bool better = (value > best[h]) | ((value != value) & (best[h] == best[h]));
      best[h] = better ? value : best[h];
      position[h] = better ? token : position[h];
    }
  }
  for (std::int64_t h = 0; h < width; ++h) {
    from_compute(best[h], &out[h]);
    argmax[h] = position[h];
  }
}

template <typename T>
void forward(T* pooled, std::int64_t* argmax, const HiddenState* hidden_states, RealTokens real,
             std::int64_t L, std::int64_t B, std::int64_t H, PoolMode mode,
             const Executor& executor) {
  const std::int64_t slices = (H + kSlice - 1) / kSlice;
  executor.parallel_for(L * B * slices, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t item = begin; item < end; ++item) {
      const std::int64_t h = item % slices * kSlice, b = item / slices % B, l = item / slices / B;
      const std::int64_t width = std::min(kSlice, H - h), column = (b * L + l) * H + h;
      const std::int64_t* tokens = real.tokens + real.offsets[b];
      const std::int64_t count = real.offsets[b + 1] - real.offsets[b];
      const HiddenState& layer = hidden_states[l];
      const T* states = static_cast<const T*>(layer.data) + b * layer.stride_b + h;
      T* out = pooled + column;
      if (count == 0) {
        std::fill_n(out, width, T{});
        if (mode == PoolMode::kMax) std::fill_n(argmax + column, width, std::int64_t{-1});
      } else if (mode == PoolMode::kMean) {
        mean_slice(out, states, layer.stride_t, tokens, count, width);
      } else if (mode == PoolMode::kMax) {
        max_slice(out, argmax + column, states, layer.stride_t, tokens, count, width);
      } else {
        const std::int64_t token = mode == PoolMode::kFirst ? tokens[0] : tokens[count - 1];
        std::copy_n(states + token * layer.stride_t, width, out);
      }
    }
  });
}

// One row's gradient, (tokens, H): `shared` goes to the tokens at [begin, end) of its list, 0 to
// all others.
template <typename T>
void spread(T* out, const T* shared, const std::int64_t* begin, const std::int64_t* end,
            std::int64_t num_tokens, std::int64_t H) {
  for (std::int64_t t = 0; t < num_tokens; ++t, out += H) {
    if (begin != end && *begin == t) {
      std::copy_n(shared, H, out);
      ++begin;
    } else {
      std::fill_n(out, H, T{});
    }
  }
}

template <typename T>
void backward_row(T* out, const T* grad, const std::int64_t* argmax, const std::int64_t* begin,
                  const std::int64_t* end, std::int64_t num_tokens, std::int64_t H, PoolMode mode) {
  if (mode == PoolMode::kMean && begin != end) {
    // The last real token's row holds grad / count while the others are copied from it.
    T* shared = out + end[-1] * H;
    const auto count = static_cast<Compute<T>>(end - begin);
    for (std::int64_t h = 0; h < H; ++h) from_compute(to_compute(grad[h]) / count, &shared[h]);
    spread(out, shared, begin, end - 1, end[-1], H);
    std::fill(shared + H, out + num_tokens * H, T{});
  } else if (mode == PoolMode::kMax || begin == end) {
    std::fill_n(out, num_tokens * H, T{});
    for (std::int64_t h = 0; h < H && begin != end; ++h) out[argmax[h] * H + h] = grad[h];
  } else {
    const std::int64_t* token = mode == PoolMode::kFirst ? begin : end - 1;
    spread(out, grad, token, token + 1, num_tokens, H);
  }
}

template <typename T>
void backward(T* dhidden, const T* grad, const std::int64_t* argmax, RealTokens real,
              std::int64_t L, std::int64_t B, std::int64_t num_tokens, std::int64_t H,
              PoolMode mode, const Executor& executor) {
  executor.parallel_for(L * B, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t item = begin; item < end; ++item) {
      const std::int64_t b = item % B, l = item / B, column = (b * L + l) * H;
      backward_row(dhidden + item * num_tokens * H, grad + column,
                   argmax ? argmax + column : nullptr, real.tokens + real.offsets[b],
                   real.tokens + real.offsets[b + 1], num_tokens, H, mode);
    }
  });
}

}  // namespace

Status masked_pool_cpu(void* pooled, std::int64_t* argmax, const HiddenState* hidden_states,
                       RealTokens real, std::int64_t L, std::int64_t B, std::int64_t H, DType dtype,
                       PoolMode mode, const Executor& executor) {
  return with_storage(dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    forward(static_cast<T*>(pooled), argmax, hidden_states, real, L, B, H, mode, executor);
  });
}

Status masked_pool_backward_cpu(void* dhidden, const void* grad, const std::int64_t* argmax,
                                RealTokens real, std::int64_t L, std::int64_t B, std::int64_t T,
                                std::int64_t H, DType dtype, PoolMode mode,
                                const Executor& executor) {
  return with_storage(dtype, [&](auto* tag) {
    using Storage = std::remove_pointer_t<decltype(tag)>;
    backward(static_cast<Storage*>(dhidden), static_cast<const Storage*>(grad), argmax, real, L, B,
             T, H, mode, executor);
  });
}

}  // namespace codir_fast
