// The passes of in_batch_contrast on the CPU, for one instruction set (CODIR_FAST_ISA_NAMESPACE):
// blocks of positive keys times tiles of queries, as in bank_contrast_cpu_impl.cpp, each product
// used by both directions. Forward, the sums of a row of the block are kept for each lane of a
// vector apart, with a shift of its own that follows the maximum, and put together at the end of
// the block: nothing is added up across a vector in between.
#include "in_batch_contrast_cpu_impl.h"

#include <algorithm>
#include <type_traits>

#include "bank_tiles_cpu_impl.h"

namespace codir_fast {
namespace CODIR_FAST_ISA_NAMESPACE {
namespace {

constexpr std::int64_t kGroupRows = 14;  // whose terms are added up in C before they meet others

// The sums are, forward: of each row of a block a vector of shifts, then one of totals; backward:
// the block's positive_sums of the run of tiles, then those of all runs, then of each row a vector
// of weights.
template <typename C>
std::int64_t scratch_size(std::int64_t lanes, std::int64_t D, bool is_backward) {
  const std::int64_t columns = is_backward ? 2 * padded_dim<C>(D) + kLanes<C> : 2 * kLanes<C>;
  return Scratch<C>::size(lanes, D) + (kMaxBlockRows + kMaxTileRows) * columns;
}

template <typename V>
V larger(V a, V b) {
  return a > b ? a : b;
}

// What to take from logits whose maximum is this: with no logit so far, nothing.
template <typename C>
Vec<C> finite(Vec<C> maximum) {
  return maximum == -kInfinity<C> ? Vec<C>{} : maximum;
}

// Leaves the logits as they are, and knows the largest of each query's.
template <int NV, typename C>
struct Logits {
  using V = Vec<C>;
  V top[NV];

  Logits() {
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) top[v] = splat(-kInfinity<C>);
  }

  void begin_row(std::int64_t) const {}

  V gap(V product, V scale, int) const { return rounded(product * scale); }

  V operator()(V logit, V, int v) {
    top[v] = larger(logit, top[v]);
    return logit;
  }

  void end_group() const {}
};

// Adds the block's logits to the sums of a tile of queries.
template <int NV, typename C>
void add_rows(const InBatchSums<C>& sums, const Logits<NV, C>& logits, const C* products,
              std::int64_t num_rows) {
  using V = Vec<C>;
  constexpr std::int64_t lanes = NV * kLanes<C>;
  V shift[NV];
#pragma GCC unroll 4
  for (int v = 0; v < NV; ++v) {
    const V before = load<V>(sums.shift + v * kLanes<C>), after = larger(logits.top[v], before);
    store(sums.shift + v * kLanes<C>, after);
    shift[v] = finite<C>(after);
    const V factor = exp(before - shift[v]);
    for (int lane = 0; lane < kLanes<C>; ++lane)
      sums.total[v * kLanes<C> + lane] *= static_cast<double>(factor[lane]);
  }
  GroupedSum<NV, C> sum;
  for (std::int64_t begin = 0; begin < num_rows; begin += kGroupRows) {
    const std::int64_t end = begin + kGroupRows < num_rows ? begin + kGroupRows : num_rows;
    for (std::int64_t k = begin; k < end; ++k) {
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v)
        sum.add(exp(load<V>(products + k * lanes + v * kLanes<C>) - shift[v]), v);
    }
    sum.end_group();
  }
  sum.add_to(sums.total);
}

// Adds a tile's logits to the sums of the block's rows. Lanes past B are no queries.
template <int NV, typename C>
void add_columns(C* shifts, C* totals, const C* products, std::int64_t num_rows,
                 std::int64_t num_lanes) {
  using V = Vec<C>;
  constexpr std::int64_t lanes = NV * kLanes<C>;
  IntVec<C> is_query[NV] = {};
  for (std::int64_t lane = 0; lane < lanes; ++lane)
    is_query[lane / kLanes<C>][lane % kLanes<C>] = lane < num_lanes ? -1 : 0;
  for (std::int64_t k = 0; k < num_rows; ++k) {
    V logit[NV];
    const V before = load<V>(shifts + k * kLanes<C>);
    V after = before, sum{};
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      logit[v] = load<V>(products + k * lanes + v * kLanes<C>);
      logit[v] = is_query[v] ? logit[v] : splat(-kInfinity<C>);
      after = larger(logit[v], after);
    }
    const V shift = finite<C>(after);
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) sum += exp(logit[v] - shift);
    store(shifts + k * kLanes<C>, after);
    store(totals + k * kLanes<C>, load<V>(totals + k * kLanes<C>) * exp(before - shift) + sum);
  }
}

// Puts the lanes of each row of the block together.
template <typename C>
void end_columns(double* column_shift, double* column_total, const C* shifts, const C* totals,
                 std::int64_t num_rows) {
  for (std::int64_t k = 0; k < num_rows; ++k) {
    const C *shift = shifts + k * kLanes<C>, *total = totals + k * kLanes<C>;
    C highest = shift[0];
    for (int lane = 1; lane < kLanes<C>; ++lane)
      highest = shift[lane] > highest ? shift[lane] : highest;
    const Vec<C> factor = exp(load<Vec<C>>(shift) - finite<C>(splat(highest)));
    double sum = 0;
    for (int lane = 0; lane < kLanes<C>; ++lane)
      sum += static_cast<double>(total[lane]) * static_cast<double>(factor[lane]);
    column_shift[k] = static_cast<double>(highest);
    column_total[k] = sum;
  }
}

template <int NV, typename C>
void scan_tiles(const InBatchSums<C>& out, const BankTask<C>& task) {
  constexpr std::int64_t lanes = NV * kLanes<C>;
  const std::int64_t D = task.inputs->D;
  const Scratch<C> scratch(task.scratch, lanes, D);
  fill(scratch.zero_row, D, C{0});
  const std::int64_t num_tiles = task.tile_end - task.tile_begin;
  fill(out.shift, num_tiles * lanes, -kInfinity<C>);
  fill(out.total, num_tiles * lanes, 0.0);
  C *const shifts = scratch.sums, *const totals = shifts + kMaxBlockRows * kLanes<C>;
  Block<C> block;
  for (std::int64_t begin = task.row_begin; begin < task.row_end; begin += block.size) {
    load_block(block, scratch, task, begin, tile_rows(NV));
    fill(shifts, block.size * kLanes<C>, -kInfinity<C>);
    fill(totals, block.size * kLanes<C>, C{0});
    for (std::int64_t n = 0; n < num_tiles; ++n) {
      const std::int64_t tile = task.tile_begin + n;
      Logits<NV, C> logits;
      visit_products<NV>(logits, scratch.products, task, tile, block, n == 0);
      add_rows<NV, C>({out.shift + n * lanes, out.total + n * lanes, nullptr, nullptr}, logits,
                      scratch.products, block.size);
      if (out.column_shift == nullptr) continue;
      add_columns<NV>(shifts, totals, scratch.products, block.size, task.inputs->B - tile * lanes);
    }
    if (out.column_shift == nullptr) continue;
    const std::int64_t at = begin - task.row_begin;
    end_columns(out.column_shift + at, out.column_total + at, shifts, totals, block.size);
  }
}

// Makes W, and sums of each direction's own part of it: over the rows for each lane, over the tile
// for each row, a vector. 0 where lse is +inf: that marks lanes past B, whose logits may be NaN.
template <int NV, bool kSymmetric, typename C>
struct Weights {
  using V = Vec<C>;
  InBatchWeights<C> of_lanes, of_rows;        // of the tile, of the block
  C* row_sums;                                // [row][vector]
  V high{}, low{}, coefficient{}, row_sum{};  // of the row
  C* row_sum_at = nullptr;
  GroupedSum<NV, C> sum{};

  V at(const C* values, int v) const { return load<V>(values + v * kLanes<C>); }

  // No logit exceeds lse but by rounding.
  static V share(V logit, V high, V low) {
    const V gap = (logit - high) - low;
    return exp(gap > C{0} ? V{} : gap);
  }

  void begin_row(std::int64_t k) {
    if constexpr (kSymmetric) {
      high = splat(of_rows.high[k]);
      low = splat(of_rows.low[k]);
      coefficient = splat(of_rows.coefficient[k]);
      row_sum_at = row_sums + k * kLanes<C>;
      row_sum = load<V>(row_sum_at);
    }
  }

  V gap(V product, V scale, int) const { return rounded(product * scale); }

  V operator()(V logit, V, int v) {
    const V lse = at(of_lanes.high, v);
    const auto is_past = lse == kInfinity<C>;
    V weight = share(logit, lse, at(of_lanes.low, v)) * at(of_lanes.coefficient, v);
    weight = is_past ? V{} : weight;
    sum.add(weight, v);
    if constexpr (kSymmetric) {
      V other = share(logit, high, low) * coefficient;
      other = is_past ? V{} : other;
      row_sum += other;
      weight += other;
      if (v == NV - 1) store(row_sum_at, row_sum);
    }
    return weight;
  }

  void end_group() { sum.end_group(); }
};

// Adds each row's vector to its total, and empties it.
template <typename C>
void end_row_sums(double* totals, C* row_sums, std::int64_t num_rows) {
  for (std::int64_t k = 0; k < num_rows; ++k) {
    for (int lane = 0; lane < kLanes<C>; ++lane)
      totals[k] += static_cast<double>(row_sums[k * kLanes<C> + lane]);
  }
  fill(row_sums, num_rows * kLanes<C>, C{0});
}

template <typename C>
InBatchWeights<C> from(const InBatchWeights<C>& weights, std::int64_t begin) {
  return {weights.high + begin, weights.low + begin, weights.coefficient + begin};
}

template <int NV, bool kSymmetric, typename C>
void backward_tiles(const InBatchProducts<C>& out, const BankTask<C>& task) {
  constexpr std::int64_t lanes = NV * kLanes<C>, tiles_per_run = kQueriesPerRun / lanes;
  const std::int64_t D = task.inputs->D, columns = padded_dim<C>(D);
  const std::int64_t num_tiles = task.tile_end - task.tile_begin;
  const Scratch<C> scratch(task.scratch, lanes, D);
  fill(scratch.zero_row, D, C{0});
  // Register tiles run past the last row: what is read there must be numbers, though nobody reads
  // the result.
  fill(scratch.products, (kMaxBlockRows + kMaxTileRows) * lanes, C{0});
  const std::int64_t size = (kMaxBlockRows + kMaxTileRows) * columns;
  const bool is_one_run = num_tiles <= tiles_per_run;
  C *const run = scratch.sums, *const block_sums = is_one_run ? run : run + size;
  C* const row_sums = run + 2 * size;
  fill(row_sums, (kMaxBlockRows + kMaxTileRows) * kLanes<C>, C{0});
  Block<C> block;
  for (std::int64_t begin = task.row_begin; begin < task.row_end; begin += block.size) {
    load_block(block, scratch, task, begin, tile_rows(NV));
    fill(run, size, C{0});
    if (!is_one_run) fill(block_sums, size, C{0});
    for (std::int64_t n = 0; n < num_tiles; ++n) {
      const std::int64_t tile = task.tile_begin + n;
      Weights<NV, kSymmetric, C> weights{from(out.of_lanes, tile * lanes), out.of_rows, row_sums};
      if constexpr (kSymmetric) weights.of_rows = from(out.of_rows, begin);
      visit_products<NV>(weights, scratch.products, task, tile, block, n == 0);
      weights.sum.add_to(out.query_weights + n * lanes);
      add_weighted_rows<NV>(out.query_sums + n * D * lanes, scratch.products, block, D);
      add_queries(run, columns, scratch.products, block.size,
                  out.row_query + tile * lanes * columns, lanes,
                  std::min(lanes, task.inputs->B - tile * lanes));
      const bool ends = n + 1 == num_tiles || (n + 1) % tiles_per_run == 0;
      if (!is_one_run && ends) end_run(block_sums, run, size);
      if (kSymmetric && ends)
        end_row_sums(out.positive_weights + begin - task.row_begin, row_sums, block.size);
    }
    C* const to = out.positive_sums + (begin - task.row_begin) * columns;
    for (std::int64_t n = 0; n < block.size * columns; ++n) to[n] = block_sums[n];
  }
}

template <typename C>
void scan(const InBatchSums<C>& out, const BankTask<C>& task) {
  with_vectors<C>(task.lanes, [&](auto NV) { scan_tiles<NV>(out, task); });
}

template <typename C>
void backward(const InBatchProducts<C>& out, const BankTask<C>& task) {
  with_vectors<C>(task.lanes, [&](auto NV) {
    if (out.of_rows.high == nullptr) return backward_tiles<NV, false>(out, task);
    backward_tiles<NV, true>(out, task);
  });
}

}  // namespace

extern const InBatchKernels<float> kInBatchKernelsFloat = {kLanes<float>,     kMaxTileVectors,
                                                           padded_dim<float>, scratch_size<float>,
                                                           scan<float>,       backward<float>};
extern const InBatchKernels<double> kInBatchKernelsDouble = {
    kLanes<double>,       kMaxTileVectors, padded_dim<double>,
    scratch_size<double>, scan<double>,    backward<double>};

}  // namespace CODIR_FAST_ISA_NAMESPACE
}  // namespace codir_fast
