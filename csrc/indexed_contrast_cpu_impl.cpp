// One query against rows named by index, for one instruction set (CODIR_FAST_ISA_NAMESPACE).
// A chunk of rows gives its logits and is then added to O from L1, while rows further on are
// fetched: of a list, whose rows lie anywhere, those named next; of a block, which is in cache,
// the block after it. Never materialised: anything of size M x D. Sums are hierarchical (chunk, run
// of chunks, total), so that O does not stagnate on rows that are alike.
#include "indexed_contrast_cpu_impl.h"

#include <limits>

#include "objective.h"
#include "simd/vec.h"
#include "storage.h"

namespace codir_fast {
namespace CODIR_FAST_ISA_NAMESPACE {
namespace {

constexpr std::int64_t kChunk = 32;  // rows, a multiple of all vector widths
constexpr std::int64_t kRowsPerRun = 2048;
constexpr std::int64_t kAhead = 32;  // rows of a list between the one fetched and the one used
constexpr int kDots = 4;             // rows that share the query's loads
constexpr int kColumns = 8;          // vectors of O that are summed in registers
constexpr std::uintptr_t kLine = 64;

template <typename C>
constexpr C kInfinity = std::numeric_limits<C>::infinity();

// A chunk of rows, where the bank is of another type than C, and a query in double.
template <typename C>
std::int64_t scratch_size(std::int64_t D) {
  return kChunk * D + D * static_cast<std::int64_t>(sizeof(double) / sizeof(C));
}

// The rows of a chunk that count, as C, and what they count.
template <typename C>
struct Chunk {
  const C* rows[kChunk];
  C scale[kChunk];
  C logits[kChunk];
  std::int64_t position[kChunk];  // in the list
  std::int64_t size;
};

bool counts(const BankContrastInputs& in, std::int64_t i, std::int64_t j) {
  return (in.valid == nullptr || in.valid[j]) &&
         (in.labels == nullptr || in.labels[i] != in.bank_labels[j]) &&
         (in.exclude_index == nullptr || in.exclude_index[i] != j);
}

// Rows that lie anywhere: those further on in the list are fetched while others give their logits.
struct ListedRows {
  const std::int64_t* list;
  std::int64_t size;

  std::int64_t operator[](std::int64_t n) const { return list[n]; }

  // The row to fetch with the n-th: at the end of the list it is fetched again, which costs little.
  std::int64_t ahead(std::int64_t n) const { return list[n + kAhead < size ? n + kAhead : n]; }

  void fetch_one() const {}
};

// Rows of a block that is in L2. The next one is brought there while rows are added, from L1.
struct RowsOfBlock {
  const std::uint16_t* number;
  std::int64_t first, size;
  Upcoming& upcoming;

  std::int64_t operator[](std::int64_t n) const { return first + number[n]; }

  void fetch_one() const {
    for (std::int64_t line = 0; line < upcoming.lines_per_row; ++line) {
      if (upcoming.at >= upcoming.end) return;
      __builtin_prefetch(upcoming.at, 0, 2);
      upcoming.at += kLine;
    }
  }
};

template <typename Rows, typename C>
void load_chunk(Chunk<C>& chunk, const IndexedContrastInputs& inputs, std::int64_t i,
                const Rows& rows, std::int64_t begin, C* converted) {
  const BankContrastInputs& in = inputs.bank;
  const std::int64_t end = begin + kChunk < rows.size ? begin + kChunk : rows.size;
  chunk.size = 0;
  with_storage(in.bank_dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    const T* bank = static_cast<const T*>(in.bank);
    for (std::int64_t m = begin; m < end; ++m) {
      const std::int64_t j = rows[m];
      if (!counts(in, i, j)) continue;
      const std::int64_t n = chunk.size++;
      chunk.position[n] = m;
      chunk.scale[n] = in.bank_scale != nullptr ? static_cast<const C*>(in.bank_scale)[j] : C{1};
      if constexpr (std::is_same_v<T, C>) {
        chunk.rows[n] = bank + j * in.D;
      } else {
        convert(converted + n * in.D, bank + j * in.D, in.D);
        chunk.rows[n] = converted + n * in.D;
      }
    }
  });
}

template <typename C, int N>
struct Lanes {
  typedef C Vec __attribute__((vector_size(N * sizeof(C))));
};

// By halves, each a vector: left to itself, the compiler adds lane by lane.
template <typename C, int N = kLanes<C>>
C sum_lanes(typename Lanes<C, N>::Vec value) {
  if constexpr (N == 2) {
    return value[0] + value[1];
  } else {
    typename Lanes<C, N / 2>::Vec half[2];
    std::memcpy(half, &value, sizeof(value));
    return sum_lanes<C, N / 2>(half[0] + half[1]);
  }
}

// Memory to fetch into L2, N rows in step with N others in use. Line by line, since a burst of
// lines of one row waits for one page and one place in memory (half the rate).
template <int N>
struct Ahead {
  const char* rows[N];
  std::int64_t element_size, row_bytes;
};

// out[r] <- <query, rows[r]>, N rows at once.
template <int N, typename C>
void dot_rows(C* out, const C* query, const C* const* rows, std::int64_t D, const Ahead<N>* ahead) {
  using V = Vec<C>;
  constexpr std::int64_t kLineElements = kLine / sizeof(C);
  V sum[N] = {};
  std::int64_t d = 0;
  for (; d + kLineElements <= D; d += kLineElements) {
#pragma GCC unroll 4
    for (int r = 0; ahead != nullptr && r < N; ++r) {
      __builtin_prefetch(ahead->rows[r] + d * ahead->element_size, 0, 2);
    }
#pragma GCC unroll 4
    for (std::int64_t v = d; v < d + kLineElements; v += kLanes<C>) {
      const V q = load<V>(query + v);
#pragma GCC unroll 4
      for (int r = 0; r < N; ++r) sum[r] += q * load<V>(rows[r] + v);
    }
  }
  for (; d + kLanes<C> <= D; d += kLanes<C>) {
    const V q = load<V>(query + d);
#pragma GCC unroll 4
    for (int r = 0; r < N; ++r) sum[r] += q * load<V>(rows[r] + d);
  }
#pragma GCC unroll 4
  for (int r = 0; r < N; ++r) {
    if (ahead != nullptr && D % kLineElements != 0)
      __builtin_prefetch(ahead->rows[r] + ahead->row_bytes - 1, 0, 2);
    out[r] = sum_lanes<C>(sum[r]);
    for (std::int64_t tail = d; tail < D; ++tail) out[r] += query[tail] * rows[r][tail];
  }
}

template <int N, typename Rows, typename C>
void some_logits(Chunk<C>& chunk, const IndexedContrastInputs& inputs, const C* query,
                 const Rows& rows, std::int64_t n) {
  const BankContrastInputs& in = inputs.bank;
  if constexpr (std::is_same_v<Rows, ListedRows>) {
    const std::int64_t size = element_size(in.bank_dtype);
    Ahead<N> ahead{{}, size, in.D * size};
    for (int r = 0; r < N; ++r) {
      ahead.rows[r] =
          static_cast<const char*>(in.bank) + rows.ahead(chunk.position[n + r]) * ahead.row_bytes;
    }
    dot_rows<N>(chunk.logits + n, query, chunk.rows + n, in.D, &ahead);
  } else {
    dot_rows<N, C>(chunk.logits + n, query, chunk.rows + n, in.D, nullptr);
  }
}

template <typename Rows, typename C>
void chunk_logits(Chunk<C>& chunk, const IndexedContrastInputs& inputs, std::int64_t i,
                  const Rows& rows) {
  const BankContrastInputs& in = inputs.bank;
  const C* query = static_cast<const C*>(in.query) + i * in.D;
  std::int64_t n = 0;
  for (; n + kDots <= chunk.size; n += kDots) {
    some_logits<kDots>(chunk, inputs, query, rows, n);
  }
  for (; n < chunk.size; ++n) some_logits<1>(chunk, inputs, query, rows, n);
  for (n = 0; n < chunk.size; ++n) {
    chunk.logits[n] *= static_cast<C>(in.inv_temperature) * chunk.scale[n];
  }
  for (; n < kChunk; ++n) {
    chunk.logits[n] = -kInfinity<C>;
    chunk.scale[n] = 0;
  }
}

// Brings the shift up to the chunk's maximum, and the sums with it.
template <typename C>
void follow_maximum(const IndexedSums<C>& sums, const Chunk<C>& chunk, std::int64_t D) {
  Vec<C> highest = splat(*sums.shift);
  for (std::int64_t n = 0; n < kChunk; n += kLanes<C>) {
    const Vec<C> logits = load<Vec<C>>(chunk.logits + n);
    highest = logits > highest ? logits : highest;
  }
  C maximum = *sums.shift;
  for (int lane = 0; lane < kLanes<C>; ++lane) {
    maximum = highest[lane] > maximum ? highest[lane] : maximum;
  }
  if (!(maximum > *sums.shift)) return;
  const C factor = exp(splat(*sums.shift - maximum))[0];
  *sums.shift = maximum;
  *sums.total *= static_cast<double>(factor);
  for (std::int64_t d = 0; d < D; ++d) {
    sums.run[d] *= factor;
    sums.weighted_rows[d] *= factor;
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

// sums[d..] += weights x rows[d..], N vectors of columns; what the
// rows have to fetch goes with the first. Returns the first column after them.
template <int N, typename Rows, typename C>
std::int64_t add_columns(C* sums, const Chunk<C>& chunk, const C* weights, std::int64_t d,
                         const Rows& rows) {
  using V = Vec<C>;
  V sum[N] = {};
  for (std::int64_t n = 0; n < chunk.size; ++n) {
    if (d == 0) rows.fetch_one();
#pragma GCC unroll 8
    for (int v = 0; v < N; ++v) sum[v] += load<V>(chunk.rows[n] + d + v * kLanes<C>) * weights[n];
  }
#pragma GCC unroll 8
  for (int v = 0; v < N; ++v) {
    C* to = sums + d + v * kLanes<C>;
    store(to, load<V>(to) + sum[v]);
  }
  return d + N * kLanes<C>;
}

template <typename Rows, typename C>
void add_rows(C* sums, const Chunk<C>& chunk, const C* weights, std::int64_t D, const Rows& rows) {
  std::int64_t d = 0;
  while (d + kColumns * kLanes<C> <= D) d = add_columns<kColumns>(sums, chunk, weights, d, rows);
  while (d + kLanes<C> <= D) d = add_columns<1>(sums, chunk, weights, d, rows);
  for (; d < D; ++d) {
    C sum = 0;
    for (std::int64_t n = 0; n < chunk.size; ++n) {
      if (d == 0) rows.fetch_one();
      sum += chunk.rows[n][d] * weights[n];
    }
    sums[d] += sum;
  }
}

template <typename C>
void end_run(const IndexedSums<C>& sums, std::int64_t D) {
  for (std::int64_t d = 0; d < D; ++d) {
    sums.weighted_rows[d] += sums.run[d];
    sums.run[d] = 0;
  }
  *sums.rows_in_run = 0;
}

template <typename Rows, typename C>
void scan(const IndexedSums<C>& sums, const IndexedContrastInputs& inputs, std::int64_t i,
          const Rows& rows, C* converted) {
  const std::int64_t D = inputs.bank.D;
  Chunk<C> chunk;
  C weights[kChunk];
  with_objective<C>(inputs.bank, [&](const auto& objective) {
    for (std::int64_t begin = 0; begin < rows.size; begin += kChunk) {
      load_chunk(chunk, inputs, i, rows, begin, converted);
      if (chunk.size == 0) continue;
      chunk_logits(chunk, inputs, i, rows);
      if constexpr (objective.kFollowsMaximum) follow_maximum(sums, chunk, D);
      const C shift = *sums.shift == -kInfinity<C> ? C{0} : *sums.shift;  // no finite logit so far
      *sums.total += static_cast<double>(chunk_weights(objective, weights, chunk, shift));
      add_rows(sums.run, chunk, weights, D, rows);
      *sums.rows_in_run += chunk.size;
      if (*sums.rows_in_run >= kRowsPerRun) end_run(sums, D);
    }
  });
}

template <typename C>
void scan_list(const IndexedSums<C>& sums, const IndexedContrastInputs& inputs, std::int64_t i,
               const std::int64_t* list, std::int64_t size, C* scratch) {
  scan(sums, inputs, i, ListedRows{list, size}, scratch);
}

template <typename C>
void scan_block(const IndexedSums<C>& sums, const IndexedContrastInputs& inputs, std::int64_t i,
                const BlockRows& rows, Upcoming& upcoming, C* scratch) {
  scan(sums, inputs, i, RowsOfBlock{rows.number, rows.first, rows.size, upcoming}, scratch);
}

template <typename C>
void add_gradient(double* gradient, const IndexedContrastInputs& inputs, std::int64_t i,
                  const BlockRows& block, Upcoming& upcoming, const QueryGradient<C>& upstream,
                  C* scratch) {
  const BankContrastInputs& in = inputs.bank;
  const RowsOfBlock rows{block.number, block.first, block.size, upcoming};
  const C share = upstream.grad * static_cast<C>(in.inv_temperature);
  double* query = reinterpret_cast<double*>(scratch);
  C* converted = scratch + in.D * static_cast<std::int64_t>(sizeof(double) / sizeof(C));
  for (std::int64_t d = 0; d < in.D; ++d) query[d] = static_cast<const C*>(in.query)[i * in.D + d];
  Chunk<C> chunk;
  C weights[kChunk];
  with_objective<C>(in, [&](const auto& objective) {
    for (std::int64_t begin = 0; begin < rows.size; begin += kChunk) {
      load_chunk(chunk, inputs, i, rows, begin, converted);
      if (chunk.size == 0) continue;
      chunk_logits(chunk, inputs, i, rows);
      for (C& logit : chunk.logits) {
        logit = (logit - upstream.lse_high) - upstream.lse_low;
        // InfoNCE: no logit exceeds lse but by rounding.
        if constexpr (objective.kFollowsMaximum) logit = logit > C{0} ? C{0} : logit;
      }
      chunk_weights(objective, weights, chunk, C{0});
      for (std::int64_t n = 0; n < chunk.size; ++n) {
        rows.fetch_one();
        const double coefficient = weights[n] * share;
        double* sum = gradient + block.number[chunk.position[n]] * in.D;
        for (std::int64_t d = 0; d < in.D; ++d) sum[d] += coefficient * query[d];
      }
    }
  });
}

}  // namespace

extern const IndexedKernels<float> kIndexedKernelsFloat = {scratch_size<float>, scan_list<float>,
                                                           scan_block<float>, add_gradient<float>};
extern const IndexedKernels<double> kIndexedKernelsDouble = {
    scratch_size<double>, scan_list<double>, scan_block<double>, add_gradient<double>};

}  // namespace CODIR_FAST_ISA_NAMESPACE
}  // namespace codir_fast
