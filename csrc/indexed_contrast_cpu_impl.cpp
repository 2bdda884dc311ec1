// One query against rows named by index, for one instruction set (CODIR_FAST_ISA_NAMESPACE).
// Rows lie anywhere in the bank, so memory latency rules: rows further on are fetched into L2 while
// those at hand are used. A chunk of rows gives its logits and is then added to O from L1. Never
// materialised: anything of size M x D. Sums are hierarchical (chunk, run of chunks, total), so
// that O does not stagnate on rows that are alike.
#include "indexed_contrast_cpu_impl.h"

#include <limits>

#include "objective.h"
#include "simd/vec.h"
#include "storage.h"

namespace codir_fast {
namespace CODIR_FAST_ISA_NAMESPACE {
namespace {

constexpr std::int64_t kChunk = 32;  // rows, a multiple of all vector widths
constexpr std::int64_t kChunksPerRun = 64;
constexpr std::int64_t kAhead = 32;  // rows between the one fetched and the one used
constexpr int kColumns = 4;          // vectors of O that are summed in registers

template <typename C>
constexpr C kInfinity = std::numeric_limits<C>::infinity();

// O of the run of chunks, then a chunk of rows, where the bank is of another type than C.
template <typename C>
std::int64_t scratch_size(std::int64_t D) {
  return D + kChunk * D;
}

// The rows of a chunk that count, as C, and what they count.
template <typename C>
struct Chunk {
  const C* rows[kChunk];
  C scale[kChunk];
  C logits[kChunk];
  std::int64_t position[kChunk];  // in the query's list
  std::int64_t size;
};

bool counts(const BankContrastInputs& in, std::int64_t i, std::int64_t j) {
  return (in.valid == nullptr || in.valid[j]) &&
         (in.labels == nullptr || in.labels[i] != in.bank_labels[j]) &&
         (in.exclude_index == nullptr || in.exclude_index[i] != j);
}

// Into L2, all cache lines that the row touches: L1 has too few places for lines under way.
template <typename T>
void fetch(const T* row, std::int64_t D) {
  constexpr std::uintptr_t kLine = 64;
  const std::uintptr_t end = reinterpret_cast<std::uintptr_t>(row + D);
  for (std::uintptr_t at = reinterpret_cast<std::uintptr_t>(row) / kLine * kLine; at < end;
       at += kLine) {
    __builtin_prefetch(reinterpret_cast<const void*>(at), 0, 2);
  }
}

template <typename C>
void load_chunk(Chunk<C>& chunk, const IndexedContrastInputs& inputs, std::int64_t i,
                std::int64_t begin, std::int64_t end, C* converted) {
  const BankContrastInputs& in = inputs.bank;
  const std::int64_t* index = inputs.index + i * inputs.M;
  chunk.size = 0;
  with_storage(in.bank_dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    const T* bank = static_cast<const T*>(in.bank);
    for (std::int64_t m = begin; m < end && m < begin + kChunk; ++m) {
      const std::int64_t j = index[m];
      if (!counts(in, i, j)) continue;
      const std::int64_t n = chunk.size++;
      chunk.position[n] = m;
      chunk.scale[n] = in.bank_scale != nullptr ? static_cast<const C*>(in.bank_scale)[j] : C{1};
      if constexpr (std::is_same_v<T, C>) {
        chunk.rows[n] = bank + j * in.D;
      } else {
        if (m + kAhead < end) fetch(bank + index[m + kAhead] * in.D, in.D);
        convert(converted + n * in.D, bank + j * in.D, in.D);
        chunk.rows[n] = converted + n * in.D;
      }
    }
  });
}

template <typename C>
C sum_lanes(Vec<C> value) {
  C part[kLanes<C>];
  store(part, value);
#pragma GCC unroll 8
  for (int half = kLanes<C> / 2; half > 0; half /= 2) {
#pragma GCC unroll 8
    for (int lane = 0; lane < half; ++lane) part[lane] += part[lane + half];
  }
  return part[0];
}

template <typename C>
C dot(const C* a, const C* b, std::int64_t D) {
  using V = Vec<C>;
  V even{}, odd{};
  std::int64_t d = 0;
  for (; d + 2 * kLanes<C> <= D; d += 2 * kLanes<C>) {
    even += load<V>(a + d) * load<V>(b + d);
    odd += load<V>(a + d + kLanes<C>) * load<V>(b + d + kLanes<C>);
  }
  C sum = sum_lanes<C>(even + odd);
  for (; d < D; ++d) sum += a[d] * b[d];
  return sum;
}

// Logits of the chunk; the rows of the chunk's successor are fetched meanwhile.
template <typename C>
void chunk_logits(Chunk<C>& chunk, const IndexedContrastInputs& inputs, std::int64_t i,
                  std::int64_t end) {
  const BankContrastInputs& in = inputs.bank;
  const C* query = static_cast<const C*>(in.query) + i * in.D;
  const C* bank = static_cast<const C*>(in.bank);
  const bool in_place = in.bank_dtype == in.dtype;
  for (std::int64_t n = 0; n < chunk.size; ++n) {
    const std::int64_t ahead = chunk.position[n] + kAhead;
    if (in_place && ahead < end) fetch(bank + inputs.index[i * inputs.M + ahead] * in.D, in.D);
    chunk.logits[n] =
        dot(query, chunk.rows[n], in.D) * (static_cast<C>(in.inv_temperature) * chunk.scale[n]);
  }
  for (std::int64_t n = chunk.size; n < kChunk; ++n) {
    chunk.logits[n] = -kInfinity<C>;
    chunk.scale[n] = 0;
  }
}

// Brings the shift up to the chunk's maximum, and the sums with it: those of the run, and O.
template <typename C>
void follow_maximum(const IndexedSums<C>& out, C* run, const Chunk<C>& chunk, std::int64_t D) {
  C maximum = -kInfinity<C>;
  for (std::int64_t n = 0; n < chunk.size; ++n) {
    maximum = chunk.logits[n] > maximum ? chunk.logits[n] : maximum;
  }
  if (!(maximum > *out.shift)) return;
  const C factor = exp(splat(*out.shift - maximum))[0];
  *out.shift = maximum;
  *out.total *= static_cast<double>(factor);
  for (std::int64_t d = 0; d < D; ++d) {
    run[d] *= factor;
    out.weighted_rows[d] *= factor;
  }
}

// weights (kChunk,) <- weight * scale, 0 past the chunk's size; returns the sum of the terms.
template <typename Objective, typename C>
C chunk_weights(const Objective& objective, C* weights, const Chunk<C>& chunk, C shift) {
  Vec<C> sum{};
  for (std::int64_t n = 0; n < kChunk; n += kLanes<C>) {
    const auto [term, weight] = objective(load<Vec<C>>(chunk.logits + n) - shift);
    sum += term;
    store(weights + n, weight * load<Vec<C>>(chunk.scale + n));
  }
  return sum_lanes<C>(sum);
}

// sums[d..] += weights x rows[d..], N vectors of columns; returns the first column after them.
template <int N, typename C>
std::int64_t add_columns(C* sums, const Chunk<C>& chunk, const C* weights, std::int64_t d) {
  using V = Vec<C>;
  V sum[N] = {};
  for (std::int64_t n = 0; n < chunk.size; ++n) {
#pragma GCC unroll 4
    for (int v = 0; v < N; ++v) sum[v] += load<V>(chunk.rows[n] + d + v * kLanes<C>) * weights[n];
  }
#pragma GCC unroll 4
  for (int v = 0; v < N; ++v) {
    C* to = sums + d + v * kLanes<C>;
    store(to, load<V>(to) + sum[v]);
  }
  return d + N * kLanes<C>;
}

template <typename C>
void add_rows(C* sums, const Chunk<C>& chunk, const C* weights, std::int64_t D) {
  std::int64_t d = 0;
  while (d + kColumns * kLanes<C> <= D) d = add_columns<kColumns>(sums, chunk, weights, d);
  while (d + kLanes<C> <= D) d = add_columns<1>(sums, chunk, weights, d);
  for (; d < D; ++d) {
    C sum = 0;
    for (std::int64_t n = 0; n < chunk.size; ++n) sum += chunk.rows[n][d] * weights[n];
    sums[d] += sum;
  }
}

template <typename C>
void end_run(C* weighted_rows, C* run, std::int64_t D) {
  for (std::int64_t d = 0; d < D; ++d) {
    weighted_rows[d] += run[d];
    run[d] = 0;
  }
}

template <typename Objective, typename C>
void scan_positions(const Objective& objective, const IndexedSums<C>& out,
                    const IndexedContrastInputs& inputs, std::int64_t i, std::int64_t begin,
                    std::int64_t end, C* scratch) {
  const std::int64_t D = inputs.bank.D;
  C *run = scratch, *converted = scratch + D;
  *out.total = 0;
  for (std::int64_t d = 0; d < D; ++d) out.weighted_rows[d] = run[d] = 0;
  Chunk<C> chunk;
  C weights[kChunk];
  for (std::int64_t chunks = 1; begin < end; begin += kChunk, ++chunks) {
    load_chunk(chunk, inputs, i, begin, end, converted);
    if (chunk.size > 0) {
      chunk_logits(chunk, inputs, i, end);
      if constexpr (Objective::kFollowsMaximum) follow_maximum(out, run, chunk, D);
      const C shift = *out.shift == -kInfinity<C> ? C{0} : *out.shift;  // no finite logit so far
      *out.total += static_cast<double>(chunk_weights(objective, weights, chunk, shift));
      add_rows(run, chunk, weights, D);
    }
    if (chunks % kChunksPerRun == 0) end_run(out.weighted_rows, run, D);
  }
  end_run(out.weighted_rows, run, D);
}

template <typename C>
void scan(const IndexedSums<C>& out, const IndexedContrastInputs& inputs, std::int64_t i,
          std::int64_t begin, std::int64_t end, C* scratch) {
  with_objective<C>(inputs.bank, [&](const auto& objective) {
    scan_positions(objective, out, inputs, i, begin, end, scratch);
  });
}

template <typename C>
void coefficients(C* coefficient, const IndexedContrastInputs& inputs, std::int64_t i, C grad,
                  C lse_high, C lse_low, C* scratch) {
  const C share = grad * static_cast<C>(inputs.bank.inv_temperature);
  Chunk<C> chunk;
  C weights[kChunk];
  for (std::int64_t m = 0; m < inputs.M; ++m) coefficient[m] = 0;
  with_objective<C>(inputs.bank, [&](const auto& objective) {
    for (std::int64_t begin = 0; begin < inputs.M; begin += kChunk) {
      load_chunk(chunk, inputs, i, begin, inputs.M, scratch);
      if (chunk.size == 0) continue;
      chunk_logits(chunk, inputs, i, inputs.M);
      for (C& logit : chunk.logits) logit -= lse_high;
      chunk_weights(objective, weights, chunk, lse_low);
      for (std::int64_t n = 0; n < chunk.size; ++n) {
        coefficient[chunk.position[n]] = weights[n] * share;
      }
    }
  });
}

}  // namespace

extern const IndexedKernels<float> kIndexedKernelsFloat = {scratch_size<float>, scan<float>,
                                                           coefficients<float>};
extern const IndexedKernels<double> kIndexedKernelsDouble = {scratch_size<double>, scan<double>,
                                                             coefficients<double>};

}  // namespace CODIR_FAST_ISA_NAMESPACE
}  // namespace codir_fast
