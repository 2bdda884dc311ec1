// Pooling and its gradient over items of work, for one instruction set (CODIR_FAST_ISA_NAMESPACE).
// Masked tokens are never read. Sums run in float32 (float64 for float64). Nothing is allocated: a
// slice of H lives on the stack.
#include "masked_pool_cpu_impl.h"

#include <cstring>
#include <type_traits>

#include "storage.h"

namespace codir_fast {
namespace CODIR_FAST_ISA_NAMESPACE {
namespace {

constexpr std::int64_t kGroup = 8;

template <typename T>
void copy(T* out, const T* in, std::int64_t size) {
  std::memcpy(out, in, static_cast<std::size_t>(size) * sizeof(T));
}

// With zeros.
template <typename T>
void fill(T* out, std::int64_t size) {
  std::memset(static_cast<void*>(out), 0, static_cast<std::size_t>(size) * sizeof(T));
}

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
  Compute<T> total[kMaxPoolSlice];
  for (std::int64_t h = 0; h < width; ++h) total[h] = 0;
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
  Compute<T> best[kMaxPoolSlice];
  Position position[kMaxPoolSlice];
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

// An item: one slice of H of one row of one layer.
template <typename T>
void pool(const PoolTask& task, std::int64_t item) {
  const std::int64_t slices = (task.H + task.slice - 1) / task.slice;
  const std::int64_t h = item % slices * task.slice, b = item / slices % task.B,
                     l = item / slices / task.B;
  const std::int64_t width = task.H - h < task.slice ? task.H - h : task.slice,
                     column = (b * task.L + l) * task.H + h;
  const std::int64_t* tokens = task.real.tokens + task.real.offsets[b];
  const std::int64_t count = task.real.offsets[b + 1] - task.real.offsets[b];
  const HiddenState& layer = task.hidden_states[l];
  const T* states = static_cast<const T*>(layer.data) + b * layer.stride_b + h;
  T* out = static_cast<T*>(task.pooled) + column;
  std::int64_t* argmax = task.argmax + column;
  if (count == 0) {
    fill(out, width);
    for (std::int64_t n = 0; task.mode == PoolMode::kMax && n < width; ++n) argmax[n] = -1;
    return;
  }
  switch (task.mode) {
    case PoolMode::kMean:
      return mean_slice(out, states, layer.stride_t, tokens, count, width);
    case PoolMode::kMax:
      return max_slice(out, argmax, states, layer.stride_t, tokens, count, width);
    case PoolMode::kFirst:
      return copy(out, states + tokens[0] * layer.stride_t, width);
    case PoolMode::kLast:
      return copy(out, states + tokens[count - 1] * layer.stride_t, width);
  }
}

// One row's gradient, (tokens, H): `shared` goes to the tokens at [begin, end) of its list, 0 to
// all others.
template <typename T>
void spread(T* out, const T* shared, const std::int64_t* begin, const std::int64_t* end,
            std::int64_t num_tokens, std::int64_t H) {
  for (std::int64_t t = 0; t < num_tokens; ++t, out += H) {
    if (begin != end && *begin == t) {
      copy(out, shared, H);
      ++begin;
    } else {
      fill(out, H);
    }
  }
}

template <typename T>
void backward_mean(T* out, const T* grad, const std::int64_t* begin, const std::int64_t* end,
                   std::int64_t num_tokens, std::int64_t H) {
  // The last real token's row holds grad / count while the others are copied from it.
  T* shared = out + end[-1] * H;
  const auto count = static_cast<Compute<T>>(end - begin);
  for (std::int64_t h = 0; h < H; ++h) from_compute(to_compute(grad[h]) / count, &shared[h]);
  spread(out, shared, begin, end - 1, end[-1], H);
  fill(shared + H, out + num_tokens * H - (shared + H));
}

template <typename T>
void backward_max(T* out, const T* grad, const std::int64_t* argmax, std::int64_t num_tokens,
                  std::int64_t H) {
  fill(out, num_tokens * H);
  for (std::int64_t h = 0; h < H; ++h) out[argmax[h] * H + h] = grad[h];
}

template <typename T>
void backward_row(T* out, const T* grad, const std::int64_t* argmax, const std::int64_t* begin,
                  const std::int64_t* end, std::int64_t num_tokens, std::int64_t H, PoolMode mode) {
  if (begin == end) return fill(out, num_tokens * H);
  switch (mode) {
    case PoolMode::kMean:
      return backward_mean(out, grad, begin, end, num_tokens, H);
    case PoolMode::kMax:
      return backward_max(out, grad, argmax, num_tokens, H);
    case PoolMode::kFirst:
      return spread(out, grad, begin, begin + 1, num_tokens, H);
    case PoolMode::kLast:
      return spread(out, grad, end - 1, end, num_tokens, H);
  }
}

// An item: one row of one layer.
template <typename T>
void unpool(const PoolGradientTask& task, std::int64_t item) {
  const std::int64_t b = item % task.B, l = item / task.B, column = (b * task.L + l) * task.H;
  backward_row(static_cast<T*>(task.dhidden[l]) + b * task.T * task.H,
               static_cast<const T*>(task.grad) + column,
               task.argmax == nullptr ? nullptr : task.argmax + column,
               task.real.tokens + task.real.offsets[b], task.real.tokens + task.real.offsets[b + 1],
               task.T, task.H, task.mode);
}

Status pool_item(const PoolTask& task, std::int64_t item) {
  return with_storage(task.dtype,
                      [&](auto* tag) { pool<std::remove_pointer_t<decltype(tag)>>(task, item); });
}

Status unpool_item(const PoolGradientTask& task, std::int64_t item) {
  return with_storage(task.dtype,
                      [&](auto* tag) { unpool<std::remove_pointer_t<decltype(tag)>>(task, item); });
}

}  // namespace

extern const PoolKernels kPoolKernels = {pool_item, unpool_item};

}  // namespace CODIR_FAST_ISA_NAMESPACE
}  // namespace codir_fast
