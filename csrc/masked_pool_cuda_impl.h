// The kernels of masked_pool_cuda, as functions of a block's threads: compiled by nvcc, or without
// it for the tests' emulator (see sm90/device.h). A block takes 32 vectors of 16 bytes of one row
// of one layer; its warps share the tokens. A warp learns with one ballot which of 32 tokens are
// real, then has the next kInFlight of them under way to shared memory, where each thread waits for
// its own vectors alone.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "masked_pool_cuda.h"
#include "sm90/device.h"
#include "sm90/vector.h"

namespace codir_fast {
namespace pool {

using sm90::block_index;
using sm90::sync_block;
using sm90::thread_index;
using sm90::Vector;

constexpr int kMaxPoolLayers = 64;  // of a launch: their addresses are its arguments
constexpr int kWarps = 4, kLanes = 32, kThreads = kWarps * kLanes;
// Six resident blocks have up to 192 KB under way on a multiprocessor of sm_90; of 1152 blocks a
// third still waits then, to take the place of those with short rows.
constexpr int kInFlight = 16, kResidentBlocks = 6;
constexpr int kGroup = 4;               // tokens that are waited for together
constexpr int kStep = kLanes * kWarps;  // tokens that a block's ballots tell of

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

struct PoolArguments {
  HiddenState layers[kMaxPoolLayers];
  void* dhidden[kMaxPoolLayers];  // backward: in place of layers
  void* pooled;                   // backward: its gradient, only read
  std::int64_t* argmax;           // backward: only read
  TokenMask mask;
  int first_layer, L, B, T, H;  // first_layer: of the launch; L: of the operator
};

// Not 0 for a real token, 0 from T on; as loaded, so that nothing waits for it here.
CODIR_FAST_DEVICE std::int64_t load_mask(const PoolArguments& a, int b, std::uint32_t t) {
  if (t >= static_cast<std::uint32_t>(a.T)) return 0;
  if (a.mask.data == nullptr) return 1;
  const std::int64_t at = b * a.mask.stride_b + t * a.mask.stride_t;
  return a.mask.is_byte ? static_cast<const std::uint8_t*>(a.mask.data)[at]
                        : static_cast<const std::int64_t*>(a.mask.data)[at];
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

// The tokens of a thread's columns; a thread outside of H reads the block's first ones, to no end.
struct Tokens {
  const unsigned char* data;
  std::int64_t stride;  // in bytes

  template <typename T, int kVector>
  CODIR_FAST_DEVICE static Tokens of(const PoolArguments& a, const Place<kVector>& at) {
    const HiddenState& layer = a.layers[at.layer];
    const T* data = static_cast<const T*>(layer.data) + at.b * layer.stride_b;
    data += at.inside ? at.column : at.first_column;
    const std::int64_t size = sizeof(T);
    return {reinterpret_cast<const unsigned char*>(data), layer.stride_t * size};
  }
  CODIR_FAST_DEVICE const unsigned char* at(int t) const { return data + t * stride; }
};

template <typename T, int kVector>
CODIR_FAST_DEVICE Vector<T, kVector> load_vector(const void* from) {
  return *static_cast<const Vector<T, kVector>*>(from);
}

// use(t0, real): bit n of `real` says whether token t0 + n * kWarps is; of all this warp's tokens,
// in order, 32 at a time. The next mask is under way while these are used.
template <int kVector, typename Use>
CODIR_FAST_DEVICE void for_tokens(const PoolArguments& a, const Place<kVector>& at,
                                  const Use& use) {
  const std::uint32_t T = a.T;  // no overflow: T and two steps are below 2^32
  const std::uint32_t mine = thread_index() % kLanes * kWarps;
  std::int64_t mask = load_mask(a, at.b, at.warp + mine);
  for (std::uint32_t t0 = at.warp; t0 < T; t0 += kStep) {
    const std::uint32_t real = sm90::ballot_in_warp(mask != 0);
    mask = load_mask(a, at.b, t0 + kStep + mine);
    use(static_cast<int>(t0), real);
  }
}

// Starts on the next kGroup tokens of `left`, of which it takes their bits; slots lie kThreads
// apart.
template <typename T, int kVector>
CODIR_FAST_DEVICE void start_group(Vector<T, kVector>* slots, const unsigned char* tokens,
                                   std::int64_t stride, std::uint32_t& left) {
  constexpr int kBytes = sizeof(T) * kVector;
  if constexpr (kBytes >= 4) {
#pragma unroll
    for (int n = 0; n < kGroup; ++n) {
      if (left == 0) break;
      const std::uint32_t bit = sm90::lowest_bit(left);
      sm90::copy_async<kBytes>(slots + n * kThreads, tokens + bit * stride);
      left &= left - 1;
    }
  } else {  // no such copy of 2 bytes
    Vector<T, kVector> loaded[kGroup] = {};
#pragma unroll
    for (int n = 0; n < kGroup; ++n) {
      const std::uint32_t bit = sm90::lowest_bit(left);
      if (left != 0) loaded[n] = load_vector<T, kVector>(tokens + bit * stride);
      left &= left - 1;
    }
#pragma unroll
    for (int n = 0; n < kGroup; ++n) slots[n * kThreads] = loaded[n];
  }
  sm90::end_copy_group();
}

// use(vector, n) for all tokens of `real`, n their bits, in order; `tokens` is the address of bit
// 0, `stride` in bytes, `slots` those of the block, kInFlight * kThreads.
template <typename T, int kVector, typename Use>
CODIR_FAST_DEVICE void for_real_tokens(void* slots, const unsigned char* tokens,
                                       std::int64_t stride, std::uint32_t real, const Use& use) {
  constexpr int kGroups = kInFlight / kGroup;
  Vector<T, kVector>* mine = static_cast<Vector<T, kVector>*>(slots) + thread_index();
  std::uint32_t left = real;
#pragma unroll
  for (int group = 0; group < kGroups; ++group)
    start_group<T, kVector>(mine + group * kGroup * kThreads, tokens, stride, left);
  for (int group = 0; real != 0; group = (group + 1) % kGroups) {
    Vector<T, kVector>* of_group = mine + group * kGroup * kThreads;
    sm90::wait_for_copy_groups<kGroups - 1>();
#pragma unroll
    for (int n = 0; n < kGroup; ++n) {
      if (real == 0) break;
      use(load_vector<T, kVector>(of_group + n * kThreads), sm90::lowest_bit(real));
      real &= real - 1;
    }
    start_group<T, kVector>(of_group, tokens, stride, left);
  }
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

// Real tokens of a row, by all threads; `exchange` holds kWarps ints.
template <int kVector>
CODIR_FAST_DEVICE int count_tokens(const PoolArguments& a, const Place<kVector>& at,
                                   int* exchange) {
  int count = 0;
  for_tokens(a, at, [&](int, std::uint32_t real) { count += sm90::count_bits(real); });
  exchange[at.warp] = count;
  sync_block();
  count = 0;
  for (int warp = 0; warp < kWarps; ++warp) count += exchange[warp];
  return count;
}

// The first or last real token of a row, -1 if there is none; as count_tokens.
template <int kVector>
CODIR_FAST_DEVICE int find_token(const PoolArguments& a, const Place<kVector>& at, bool last,
                                 int* exchange) {
  int found = -1;
  for_tokens(a, at, [&](int t0, std::uint32_t real) {
    if (real == 0 || (found >= 0 && !last)) return;
    found = t0 + (last ? sm90::highest_bit(real) : sm90::lowest_bit(real)) * kWarps;
  });
  exchange[at.warp] = found;
  sync_block();
  found = -1;
  for (int warp = 0; warp < kWarps; ++warp) {
    const int t = exchange[warp];
    if (t >= 0 && (found < 0 || (last ? t > found : t < found))) found = t;
  }
  return found;
}

// `exchange`: shared memory of exchange_bytes<T, kVector>().
template <typename T, int kVector>
CODIR_FAST_HOST_DEVICE constexpr int exchange_bytes() {
  constexpr int kSlots = kInFlight * static_cast<int>(sizeof(T)) * kVector;
  constexpr int kValues = kVector * static_cast<int>(sizeof(Wide<T>) + sizeof(int));
  return kThreads * (kSlots > kValues ? kSlots : kValues);
}

template <typename T, int kVector>
CODIR_FAST_DEVICE void pool_mean(const PoolArguments& a, void* exchange) {
  using C = Wide<T>;
  const Place<kVector> at(a);
  const Tokens tokens = Tokens::of<T>(a, at);
  C sum[kVector] = {};
  int count = 0;
  for_tokens(a, at, [&](int t0, std::uint32_t real) {
    count += sm90::count_bits(real);
    C part[kVector] = {};  // of 32 tokens: sums of long texts lose fewer digits
    const auto add = [&](const Vector<T, kVector>& token, int) {
#pragma unroll
      for (int v = 0; v < kVector; ++v) part[v] += widen(token.value[v]);
    };
    for_real_tokens<T, kVector>(exchange, tokens.at(t0), kWarps * tokens.stride, real, add);
#pragma unroll
    for (int v = 0; v < kVector; ++v) sum[v] += part[v];
  });
  sync_block();  // the slots are free
  C* sums = static_cast<C*>(exchange);
  int* counts = reinterpret_cast<int*>(sums + kThreads * kVector);
#pragma unroll
  for (int v = 0; v < kVector; ++v) sums[thread_index() * kVector + v] = sum[v];
  counts[at.warp] = count;
  sync_block();
  count = 0;
  for (int warp = 0; warp < kWarps; ++warp) count += counts[warp];
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
  const Tokens tokens = Tokens::of<T>(a, at);
  C best[kVector];
  int token[kVector];
#pragma unroll
  for (int v = 0; v < kVector; ++v) best[v] = -INFINITY, token[v] = -1;
  for_tokens(a, at, [&](int t0, std::uint32_t real) {
    if (real == 0) return;
    // A row's first token stands until one is larger: all may be -inf.
    const int first = t0 + sm90::lowest_bit(real) * kWarps;
#pragma unroll
    for (int v = 0; v < kVector; ++v) token[v] = token[v] < 0 ? first : token[v];
    const auto compare = [&](const Vector<T, kVector>& given, int n) {
#pragma unroll
      for (int v = 0; v < kVector; ++v) {  // as wins() of a later token
        const C value = widen(given.value[v]);
        const bool better = !(value <= best[v]) & (best[v] == best[v]);
        best[v] = better ? value : best[v];
        token[v] = better ? t0 + n * kWarps : token[v];
      }
    };
    for_real_tokens<T, kVector>(exchange, tokens.at(t0), kWarps * tokens.stride, real, compare);
  });
  sync_block();  // the slots are free
  C* values = static_cast<C*>(exchange);
  int* positions = reinterpret_cast<int*>(values + kThreads * kVector);
#pragma unroll
  for (int v = 0; v < kVector; ++v) {
    values[thread_index() * kVector + v] = best[v];
    positions[thread_index() * kVector + v] = token[v];
  }
  sync_block();
  for (int h = thread_index(); h < kLanes * kVector; h += kThreads) {
    if (at.first_column + h >= a.H) continue;
    C value = 0;
    int t = -1;
    for (int warp = 0; warp < kWarps; ++warp) {
      const int n = warp * kLanes * kVector + h;
      if (positions[n] < 0 || !wins(values[n], positions[n], value, t)) continue;
      value = values[n];
      t = positions[n];
    }
    narrow(value, static_cast<T*>(a.pooled) + at.out + h);
    a.argmax[at.out + h] = t;
  }
}

template <typename T, int kVector>
CODIR_FAST_DEVICE void pool_one_token(const PoolArguments& a, bool last, void* exchange) {
  const Place<kVector> at(a);
  const Tokens tokens = Tokens::of<T>(a, at);
  const int t = find_token(a, at, last, static_cast<int*>(exchange));
  if (at.warp > 0 || !at.inside) return;
  Vector<T, kVector> row{};
  if (t >= 0) row = load_vector<T, kVector>(tokens.at(t));
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
CODIR_FAST_DEVICE Vector<T, kVector> load_gradient(const PoolArguments& a,
                                                   const Place<kVector>& at) {
  const T* grad = static_cast<const T*>(a.pooled) + at.out + (at.column - at.first_column);
  return at.inside ? load_vector<T, kVector>(grad) : Vector<T, kVector>{};
}

template <typename T, int kVector>
CODIR_FAST_DEVICE void pool_mean_backward(const PoolArguments& a, void* exchange) {
  const Place<kVector> at(a);
  Vector<T, kVector> share = load_gradient<T>(a, at);
  const int count = count_tokens(a, at, static_cast<int*>(exchange));
#pragma unroll
  for (int v = 0; v < kVector; ++v)
    narrow(widen(share.value[v]) / static_cast<Wide<T>>(count > 0 ? count : 1), &share.value[v]);
  for_tokens(a, at, [&](int t0, std::uint32_t real) {
    if (!at.inside) return;
#pragma unroll 4
    for (int n = 0; n < kLanes; ++n) {
      const int t = t0 + n * kWarps;
      if (t < a.T) store_token(a, at, t, (real >> n & 1) != 0 ? share : Vector<T, kVector>{});
    }
  });
}

// Each column's gradient goes to one token, -1 for none.
template <typename T, int kVector>
CODIR_FAST_DEVICE void pool_one_token_backward(const PoolArguments& a, PoolMode mode,
                                               void* exchange) {
  const Place<kVector> at(a);
  const Vector<T, kVector> grad = load_gradient<T>(a, at);
  int chosen = -1;
  if (mode != PoolMode::kMax)
    chosen = find_token(a, at, mode == PoolMode::kLast, static_cast<int*>(exchange));
  if (!at.inside) return;
  const std::int64_t in = at.out + (at.column - at.first_column);
  int token[kVector];
#pragma unroll
  for (int v = 0; v < kVector; ++v)
    token[v] = mode == PoolMode::kMax ? static_cast<int>(a.argmax[in + v]) : chosen;
#pragma unroll 4
  for (std::int64_t t = at.warp; t < a.T; t += kWarps) {
    Vector<T, kVector> row{};
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      if (token[v] == t) row.value[v] = grad.value[v];
    }
    store_token(a, at, static_cast<int>(t), row);
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
  bool fits = a.H % kVector == 0 && reinterpret_cast<std::uintptr_t>(a.pooled) % 16 == 0;
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
