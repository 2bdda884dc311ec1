// The kernels of masked_pool_cuda, as functions of a block's threads: compiled by nvcc, or without
// it for the tests' emulator (see sm90/device.h). A block takes 32 vectors of 16 bytes of one row
// of one layer; its warps share the tokens.
#pragma once

#include <cstdint>
#include <type_traits>

#include "masked_pool_cuda.h"
#include "sm90/device.h"

namespace codir_fast {
namespace pool {

using sm90::block_index;
using sm90::sync_block;
using sm90::thread_index;

constexpr int kMaxPoolLayers = 64;  // of a launch: their addresses are its arguments
constexpr int kWarps = 8, kLanes = 32, kThreads = kWarps * kLanes;
constexpr int kInFlight = 4;  // tokens whose loads a thread starts before it adds the first

CODIR_FAST_DEVICE float widen(float x) { return x; }
CODIR_FAST_DEVICE double widen(double x) { return x; }
CODIR_FAST_DEVICE float widen(sm90::BFloat16Element x) { return sm90::to_float(x); }
CODIR_FAST_DEVICE float widen(sm90::Float16Element x) { return sm90::to_float(x); }
CODIR_FAST_DEVICE void narrow(float x, float* out) { *out = x; }
CODIR_FAST_DEVICE void narrow(double x, double* out) { *out = x; }
CODIR_FAST_DEVICE void narrow(float x, sm90::BFloat16Element* out) { sm90::from_float(x, out); }
CODIR_FAST_DEVICE void narrow(float x, sm90::Float16Element* out) { sm90::from_float(x, out); }

template <typename T>
using Wide = typename std::conditional<std::is_same<T, double>::value, double, float>::type;

template <typename T, int kVector>
struct alignas(sizeof(T) * kVector) Vector {
  T value[kVector];
};

struct PoolArguments {
  HiddenState layers[kMaxPoolLayers];
  void* dhidden[kMaxPoolLayers];  // backward: in place of layers
  void* pooled;                   // backward: its gradient, only read
  std::int64_t* argmax;           // backward: only read
  TokenMask mask;
  int first_layer, L, B, T, H;  // first_layer: of the launch; L: of the operator
};

CODIR_FAST_DEVICE bool is_real(const TokenMask& mask, int b, int t) {
  if (mask.data == nullptr) return true;
  const std::int64_t at = b * mask.stride_b + t * mask.stride_t;
  return mask.is_byte ? static_cast<const std::uint8_t*>(mask.data)[at] != 0
                      : static_cast<const std::int64_t*>(mask.data)[at] != 0;
}

// What a block works on; `column` is that of this thread's vector.
template <int kVector>
struct Place {
  int layer, b, column, warp;
  bool inside;
  std::int64_t out;  // of the block's first column in (B, L*H)
  int first_column;

  CODIR_FAST_DEVICE explicit Place(const PoolArguments& a) {
    const int chunks = (a.H + kLanes * kVector - 1) / (kLanes * kVector);
    const int chunk = block_index() % chunks;
    b = block_index() / chunks % a.B;
    layer = block_index() / chunks / a.B;
    warp = thread_index() / kLanes;
    first_column = chunk * kLanes * kVector;
    column = first_column + thread_index() % kLanes * kVector;
    inside = column < a.H;
    out = (std::int64_t{b} * a.L + a.first_layer + layer) * a.H + first_column;
  }
};

template <typename T, int kVector>
CODIR_FAST_DEVICE Vector<T, kVector> load_token(const PoolArguments& a, const Place<kVector>& at,
                                                int t) {
  const HiddenState& layer = a.layers[at.layer];
  const T* token =
      static_cast<const T*>(layer.data) + at.b * layer.stride_b + t * layer.stride_t + at.column;
  return *reinterpret_cast<const Vector<T, kVector>*>(token);
}

// Whether a value at token t comes before the best one so far: NaN before all, then the larger,
// then the earlier.
template <typename C>
CODIR_FAST_DEVICE bool wins(C value, int t, C best, int best_t) {
  if (best_t < 0) return true;
  const bool is_nan = value != value, best_is_nan = best != best;
  if (is_nan || best_is_nan) return is_nan && (!best_is_nan || t < best_t);
  return value > best || (value == best && t < best_t);
}

// Real tokens of a row, by all threads; `exchange` holds kThreads ints.
CODIR_FAST_DEVICE int count_tokens(const PoolArguments& a, int b, int* exchange) {
  int count = 0;
  for (int t = thread_index(); t < a.T; t += kThreads) count += is_real(a.mask, b, t);
  exchange[thread_index()] = count;
  sync_block();
  count = 0;
  for (int n = 0; n < kThreads; ++n) count += exchange[n];
  return count;
}

// The first or last real token of a row, -1 if there is none.
CODIR_FAST_DEVICE int find_token(const PoolArguments& a, int b, bool last, int* exchange) {
  int found = -1;
  for (int t = thread_index(); t < a.T; t += kThreads) {
    if (is_real(a.mask, b, t) && (found < 0 || last)) found = t;
  }
  exchange[thread_index()] = found;
  sync_block();
  found = -1;
  for (int n = 0; n < kThreads; ++n) {
    const int t = exchange[n];
    if (t >= 0 && (found < 0 || (last ? t > found : t < found))) found = t;
  }
  return found;
}

// `exchange`: shared memory of exchange_bytes<T, kVector>().
template <typename T, int kVector>
CODIR_FAST_HOST_DEVICE constexpr int exchange_bytes() {
  return kThreads * (kVector * static_cast<int>(sizeof(Wide<T>) + sizeof(int)));
}

template <typename T, int kVector>
CODIR_FAST_DEVICE void pool_mean(const PoolArguments& a, void* exchange) {
  using C = Wide<T>;
  const Place<kVector> at(a);
  C sum[kVector] = {};
  int count = 0;
  for (int t0 = at.warp; t0 < a.T; t0 += kWarps * kInFlight) {
    Vector<T, kVector> token[kInFlight];
    bool real[kInFlight];
#pragma unroll
    for (int n = 0; n < kInFlight; ++n) {
      const int t = t0 + n * kWarps;
      real[n] = t < a.T && is_real(a.mask, at.b, t);
      count += real[n];
    }
#pragma unroll
    for (int n = 0; n < kInFlight; ++n) {
      if (real[n] && at.inside) token[n] = load_token<T, kVector>(a, at, t0 + n * kWarps);
    }
#pragma unroll
    for (int n = 0; n < kInFlight; ++n) {
#pragma unroll
      for (int v = 0; v < kVector; ++v)
        if (real[n] && at.inside) sum[v] += widen(token[n].value[v]);
    }
  }
  C* sums = static_cast<C*>(exchange);
  int* counts = reinterpret_cast<int*>(sums + kThreads * kVector);
#pragma unroll
  for (int v = 0; v < kVector; ++v) sums[thread_index() * kVector + v] = sum[v];
  counts[thread_index()] = count;
  sync_block();
  count = 0;
  for (int warp = 0; warp < kWarps; ++warp) count += counts[warp * kLanes];
  for (int h = thread_index(); h < kLanes * kVector; h += kThreads) {
    if (at.first_column + h >= a.H) continue;
    C total = 0;
    for (int warp = 0; warp < kWarps; ++warp) total += sums[warp * kLanes * kVector + h];
    narrow(total / static_cast<C>(count > 0 ? count : 1), static_cast<T*>(a.pooled) + at.out + h);
  }
}

template <typename T, int kVector>
CODIR_FAST_DEVICE void pool_max(const PoolArguments& a, void* exchange) {
  using C = Wide<T>;
  const Place<kVector> at(a);
  C best[kVector] = {};
  int token[kVector];
#pragma unroll
  for (int v = 0; v < kVector; ++v) token[v] = -1;
  for (int t = at.warp; t < a.T; t += kWarps) {
    if (!at.inside || !is_real(a.mask, at.b, t)) continue;
    const Vector<T, kVector> given = load_token<T, kVector>(a, at, t);
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      const C value = widen(given.value[v]);
      if (!wins(value, t, best[v], token[v])) continue;
      best[v] = value;
      token[v] = t;
    }
  }
  C* values = static_cast<C*>(exchange);
  int* tokens = reinterpret_cast<int*>(values + kThreads * kVector);
#pragma unroll
  for (int v = 0; v < kVector; ++v) {
    values[thread_index() * kVector + v] = best[v];
    tokens[thread_index() * kVector + v] = token[v];
  }
  sync_block();
  for (int h = thread_index(); h < kLanes * kVector; h += kThreads) {
    if (at.first_column + h >= a.H) continue;
    C value = 0;
    int t = -1;
    for (int warp = 0; warp < kWarps; ++warp) {
      const int n = warp * kLanes * kVector + h;
      if (tokens[n] < 0 || !wins(values[n], tokens[n], value, t)) continue;
      value = values[n];
      t = tokens[n];
    }
    narrow(value, static_cast<T*>(a.pooled) + at.out + h);
    a.argmax[at.out + h] = t;
  }
}

template <typename T, int kVector>
CODIR_FAST_DEVICE void pool_one_token(const PoolArguments& a, bool last, void* exchange) {
  const Place<kVector> at(a);
  const int t = find_token(a, at.b, last, static_cast<int*>(exchange));
  if (at.warp > 0 || !at.inside) return;
  Vector<T, kVector> row{};
  if (t >= 0) row = load_token<T, kVector>(a, at, t);
  T* out = static_cast<T*>(a.pooled) + at.out + (at.column - at.first_column);
#pragma unroll
  for (int v = 0; v < kVector; ++v) out[v] = row.value[v];
}

template <typename T, int kVector>
CODIR_FAST_DEVICE void pool_forward(const PoolArguments& a, PoolMode mode, void* exchange) {
  if (mode == PoolMode::kMean) return pool_mean<T, kVector>(a, exchange);
  if (mode == PoolMode::kMax) return pool_max<T, kVector>(a, exchange);
  pool_one_token<T, kVector>(a, mode == PoolMode::kLast, exchange);
}

template <typename T, int kVector>
CODIR_FAST_DEVICE void store_token(const PoolArguments& a, const Place<kVector>& at, int t,
                                   const Vector<T, kVector>& row) {
  T* out = static_cast<T*>(a.dhidden[at.layer]) + (std::int64_t{at.b} * a.T + t) * a.H + at.column;
  *reinterpret_cast<Vector<T, kVector>*>(out) = row;
}

template <typename T, int kVector>
CODIR_FAST_DEVICE void pool_mean_backward(const PoolArguments& a, void* exchange) {
  const Place<kVector> at(a);
  const int count = count_tokens(a, at.b, static_cast<int*>(exchange));
  if (!at.inside) return;
  const T* grad = static_cast<const T*>(a.pooled) + at.out + (at.column - at.first_column);
  Vector<T, kVector> share, none{};
#pragma unroll
  for (int v = 0; v < kVector; ++v)
    narrow(widen(grad[v]) / static_cast<Wide<T>>(count > 0 ? count : 1), &share.value[v]);
  for (int t = at.warp; t < a.T; t += kWarps)
    store_token(a, at, t, is_real(a.mask, at.b, t) ? share : none);
}

// Each column's gradient goes to one token, -1 for none.
template <typename T, int kVector>
CODIR_FAST_DEVICE void pool_one_token_backward(const PoolArguments& a, PoolMode mode,
                                               void* exchange) {
  const Place<kVector> at(a);
  int chosen = -1;
  if (mode != PoolMode::kMax)
    chosen = find_token(a, at.b, mode == PoolMode::kLast, static_cast<int*>(exchange));
  if (!at.inside) return;
  const std::int64_t in = at.out + (at.column - at.first_column);
  const T* grad = static_cast<const T*>(a.pooled) + in;
  int token[kVector];
#pragma unroll
  for (int v = 0; v < kVector; ++v)
    token[v] = mode == PoolMode::kMax ? static_cast<int>(a.argmax[in + v]) : chosen;
  for (int t = at.warp; t < a.T; t += kWarps) {
    Vector<T, kVector> row{};
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      if (token[v] == t) row.value[v] = grad[v];
    }
    store_token(a, at, t, row);
  }
}

template <typename T, int kVector>
CODIR_FAST_DEVICE void pool_backward(const PoolArguments& a, PoolMode mode, void* exchange) {
  if (mode == PoolMode::kMean) return pool_mean_backward<T, kVector>(a, exchange);
  pool_one_token_backward<T, kVector>(a, mode, exchange);
}

// Elements that all addresses and rows allow to be read at once: 16 bytes, or one element.
template <typename T>
int vector_size(const PoolArguments& a, bool backward) {
  constexpr int kVector = 16 / sizeof(T);
  bool fits = a.H % kVector == 0;
  const int layers = a.L - a.first_layer < kMaxPoolLayers ? a.L - a.first_layer : kMaxPoolLayers;
  for (int l = 0; l < layers; ++l) {
    const HiddenState& layer = a.layers[l];
    const void* data = backward ? a.dhidden[l] : layer.data;
    fits &= reinterpret_cast<std::uintptr_t>(data) % 16 == 0;
    if (!backward) fits &= layer.stride_b % kVector == 0 && layer.stride_t % kVector == 0;
  }
  return fits ? kVector : 1;
}

}  // namespace pool
}  // namespace codir_fast
