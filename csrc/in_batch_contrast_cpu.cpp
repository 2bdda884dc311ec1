// in_batch_contrast on the CPU: packs the queries, spreads tiles of them over threads, adds the
// partial sums in a fixed order and finishes positives, losses and gradients in double. The passes
// themselves are in_batch_contrast_cpu_impl.cpp.
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <type_traits>

#include "contrast_cpu.h"
#include "in_batch_contrast.h"
#include "in_batch_contrast_cpu_impl.h"

namespace codir_fast {
namespace {

template <typename C>
const InBatchKernels<C>& kernels(Isa isa) {
  if constexpr (std::is_same_v<C, float>)
    return CODIR_FAST_KERNELS(kInBatchKernelsFloat, isa);
  else
    return CODIR_FAST_KERNELS(kInBatchKernelsDouble, isa);
}

// How the work is spread: each thread has a group of tiles of queries, and all rows.
struct Plan {
  Tiling tiling;
  std::int64_t groups;

  Range tiles(std::int64_t group) const { return share(tiling.tiles, groups, group); }
};

// The least work for the thread that has most; then few lanes without a query; then wide tiles. A
// lane of a tile of one vector takes longer.
template <typename C>
Plan plan(const InBatchKernels<C>& kernel, const InBatchContrastInputs& in, int num_threads) {
  constexpr std::int64_t kWorthThreads = 1 << 21;  // products; fewer are done before one starts
  const std::int64_t threads = in.B * in.B * in.D < kWorthThreads ? 1 : num_threads;
  Plan best{};
  std::int64_t best_work = std::numeric_limits<std::int64_t>::max();
  for (std::int64_t vectors = kernel.max_tile_vectors; vectors >= 1; --vectors) {
    const std::int64_t lanes = vectors * kernel.vector_lanes, tiles = ceil_div(in.B, lanes);
    const std::int64_t groups = std::min(tiles, threads),
                       work = ceil_div(tiles, groups) * lanes * (vectors == 1 ? 13 : 10);
    if (work < best_work || (work == best_work && lanes * tiles < best.tiling.size())) {
      best = {{lanes, tiles}, groups};
      best_work = work;
    }
  }
  return best;
}

// The positive keys as the rows that a pass reads, each no negative of its own query; `own` will
// hold their numbers.
BankContrastInputs as_rows(const InBatchContrastInputs& in, std::int64_t* own) {
  std::iota(own, own + in.B, std::int64_t{0});
  BankContrastInputs rows{};
  rows.query = in.query;
  rows.bank = in.positive;
  rows.labels = rows.bank_labels = in.labels;
  rows.exclude_index = own;
  rows.B = rows.K = in.B;
  rows.D = in.D;
  rows.dtype = rows.bank_dtype = in.dtype;
  rows.inv_temperature = in.inv_temperature;
  return rows;
}

// The sums of key i over its queries, from those that each group has of them.
QuerySums add_groups(const double* shift, const double* total, std::int64_t groups, std::int64_t B,
                     std::int64_t i) {
  QuerySums sums{-std::numeric_limits<double>::infinity(), 0};
  for (std::int64_t at = i; at < groups * B; at += B) sums.shift = std::max(sums.shift, shift[at]);
  for (std::int64_t at = i; at < groups * B; at += B) {
    if (total[at] != 0) sums.total += total[at] * std::exp(shift[at] - sums.shift);
  }
  return sums;
}

template <typename C>
Status forward(C* loss, double* lse, const InBatchContrastInputs& in, const Executor& executor,
               Isa isa) {
  const InBatchKernels<C>& kernel = kernels<C>(isa);
  const RowKernels<C>& of_rows = row_kernels<C>(isa);
  const C *query = static_cast<const C*>(in.query), *key = static_cast<const C*>(in.positive);
  const Plan plan = codir_fast::plan(kernel, in, executor.num_threads);
  const std::int64_t lanes = plan.tiling.lanes, groups = plan.groups;
  const std::int64_t columns = in.symmetric ? groups * in.B : 0;
  const std::int64_t scratch_size = kernel.scratch_size(lanes, in.D, false);

  Workspace space;
  C *packed, *scratch, *shift;
  double *total, *column_shift, *column_total;
  std::int64_t* own;
  space.add(packed, plan.tiling.size() * in.D);
  space.add(scratch, groups * scratch_size);
  space.add(shift, plan.tiling.size());
  space.add(total, plan.tiling.size());
  space.add(column_shift, columns);
  space.add(column_total, columns);
  space.add(own, in.B);
  if (!space.allocate()) return Status::kOutOfMemory;
  const BankContrastInputs rows = as_rows(in, own);
  pack_queries(packed, query, in.B, in.D, plan.tiling);

  executor.parallel_for(groups, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t n = begin; n < end; ++n) {
      const Range tiles = plan.tiles(n);
      InBatchSums<C> sums{shift + tiles.begin * lanes, total + tiles.begin * lanes, nullptr,
                          nullptr};
      if (in.symmetric) sums.column_shift = column_shift + n * in.B;
      if (in.symmetric) sums.column_total = column_total + n * in.B;
      kernel.scan(sums, {packed, &rows, lanes, tiles.begin, tiles.end, 0, in.B,
                         scratch + n * scratch_size});
    }
  });
  for (std::int64_t i = 0; i < in.B; ++i) {
    const double positive_logit =
        of_rows.dot(query + i * in.D, key + i * in.D, in.D) * in.inv_temperature;
    const auto finish = [&](const QuerySums& sums, std::int64_t at) {
      const double log_sum = sums.shift + std::log(sums.total);
      const Softplus gap(log_sum - positive_logit);
      lse[at] = std::max(log_sum, positive_logit) + gap.excess;
      return gap.value;
    };
    double value = finish({static_cast<double>(shift[i]), total[i]}, i);
    if (in.symmetric) {
      const QuerySums of_key = add_groups(column_shift, column_total, groups, in.B, i);
      value = (value + finish(of_key, in.B + i)) / 2;
    }
    loss[i] = static_cast<C>(value);
  }
  return Status::kOk;
}

// InBatchWeights for `size` numbers, of which the first B are given, and the others `past` and
// zeros.
template <typename C>
struct WeightArrays {
  C *high, *low, *coefficient;

  void add_to(Workspace& space, std::int64_t size) {
    space.add(high, size);
    space.add(low, size);
    space.add(coefficient, size);
  }

  InBatchWeights<C> fill(std::int64_t size, std::int64_t B, const double* lse, const C* grad_loss,
                         double factor, C past) const {
    for (std::int64_t i = 0; i < size; ++i) {
      const SplitLse<C> split(i < B ? lse[i] : static_cast<double>(past));
      high[i] = split.high;
      low[i] = i < B ? split.low : C{0};
      coefficient[i] = i < B ? static_cast<C>(static_cast<double>(grad_loss[i]) * factor) : C{0};
    }
    return {high, low, coefficient};
  }
};

template <typename C>
Status backward(const InBatchGradients& out, const C* grad_loss, const double* lse,
                const InBatchContrastInputs& in, const Executor& executor, Isa isa) {
  // What the groups of queries have for the positive keys at a time, lest it grows with both.
  constexpr std::int64_t kPartialSums = 1 << 22, kRows = 126;  // of a pass's largest block
  const InBatchKernels<C>& kernel = kernels<C>(isa);
  const RowKernels<C>& of_rows = row_kernels<C>(isa);
  const C *query = static_cast<const C*>(in.query), *key = static_cast<const C*>(in.positive);
  C *dquery = static_cast<C*>(out.dquery), *dpositive = static_cast<C*>(out.dpositive);
  const Plan plan = codir_fast::plan(kernel, in, executor.num_threads);
  const std::int64_t lanes = plan.tiling.lanes, size = plan.tiling.size(), groups = plan.groups;
  const std::int64_t columns = kernel.padded_dim(in.D);
  const std::int64_t scratch_size = kernel.scratch_size(lanes, in.D, true);
  const std::int64_t fit = kPartialSums / (groups * columns) / kRows * kRows;
  const std::int64_t chunk = std::min({in.B, kRowsPerRun, std::max(kRows, fit)});
  const bool is_one_run = chunk == in.B, is_padded = columns != in.D;
  const double factor = in.symmetric ? 0.5 : 1.0;

  Workspace space;
  C *packed, *scratch, *padded_query, *query_sums, *positive_sums;
  double *query_totals, *query_weights, *positive_weights, *dinv_temperature, *sums;
  std::int64_t* own;
  WeightArrays<C> of_lanes, of_columns;
  space.add(packed, size * in.D);
  space.add(scratch, groups * scratch_size);
  space.add(padded_query, is_padded ? in.B * columns : 0);
  space.add(query_sums, size * in.D);
  space.add(query_totals, is_one_run ? 0 : size * in.D);
  space.add(positive_sums, groups * chunk * columns);
  space.add(query_weights, size);
  space.add(positive_weights, in.symmetric ? groups * in.B : 0);
  of_lanes.add_to(space, size);
  of_columns.add_to(space, in.symmetric ? in.B + kRowsBeyond : 0);
  space.add(dinv_temperature, in.B);
  space.add(sums, executor.num_threads * in.D);
  space.add(own, in.B);
  if (!space.allocate()) return Status::kOutOfMemory;

  const BankContrastInputs rows = as_rows(in, own);
  pack_queries(packed, query, in.B, in.D, plan.tiling);
  if (is_padded) std::fill_n(padded_query, in.B * columns, C{0});
  for (std::int64_t i = 0; is_padded && i < in.B; ++i)
    std::copy_n(query + i * in.D, in.D, padded_query + i * columns);
  std::fill_n(query_weights, size, 0.0);
  if (in.symmetric) std::fill_n(positive_weights, groups * in.B, 0.0);
  if (!is_one_run) std::fill_n(query_totals, size * in.D, 0.0);
  InBatchProducts<C> products{};
  products.row_query = is_padded ? padded_query : query;
  products.of_lanes =
      of_lanes.fill(size, in.B, lse, grad_loss, factor, std::numeric_limits<C>::infinity());
  if (in.symmetric) {
    products.of_rows =
        of_columns.fill(in.B + kRowsBeyond, in.B, lse + in.B, grad_loss, factor, C{0});
  }
  // Calls finish(row, i) with D sums to be made, for each of these i.
  const auto for_rows = [&](const Range& all, const auto& finish) {
    const std::int64_t elements = (all.end - all.begin) * in.D;
    for_parts(all, elements, executor, [&](std::int64_t part, const Range& range) {
      for (std::int64_t i = range.begin; i < range.end; ++i) {
        std::fill_n(sums + part * in.D, in.D, 0.0);
        finish(sums + part * in.D, i);
      }
    });
  };

  for (std::int64_t first = 0; first < in.B; first += chunk) {
    const std::int64_t last = std::min(in.B, first + chunk);
    executor.parallel_for(groups, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t n = begin; n < end; ++n) {
        const Range tiles = plan.tiles(n);
        const std::int64_t at = tiles.begin * lanes * in.D, length = tiles.end * lanes * in.D - at;
        InBatchProducts<C> mine = products;
        mine.query_sums = query_sums + at;
        mine.query_weights = query_weights + tiles.begin * lanes;
        mine.positive_sums = positive_sums + n * chunk * columns;
        if (in.symmetric) mine.positive_weights = positive_weights + n * in.B + first;
        std::fill_n(mine.query_sums, length, C{0});
        kernel.backward(mine, {packed, &rows, lanes, tiles.begin, tiles.end, first, last,
                               scratch + n * scratch_size});
        for (std::int64_t k = at; !is_one_run && k < at + length; ++k)
          query_totals[k] += static_cast<double>(query_sums[k]);
      }
    });
    for_rows({first, last}, [&](double* row, std::int64_t i) {
      const C* part = positive_sums + (i - first) * columns;
      for (std::int64_t n = 0; n < groups; ++n)
        of_rows.add(row, part + n * chunk * columns, 1, 1.0, in.D);
      for (std::int64_t d = 0; d < in.D; ++d) dpositive[i * in.D + d] = static_cast<C>(row[d]);
    });
  }
  if (is_one_run) {
    unpack_queries(dquery, query_sums, in.B, in.D, plan.tiling, executor);
  } else {
    unpack_queries(dquery, query_totals, in.B, in.D, plan.tiling, executor);
  }
  // The gradients hold the negatives' part; the positive's is what their weights sum up to.
  for_rows({0, in.B}, [&](double* row, std::int64_t i) {
    const C *q = query + i * in.D, *p = key + i * in.D;
    double weight = query_weights[i];
    for (std::int64_t n = 0; in.symmetric && n < groups; ++n)
      weight += positive_weights[n * in.B + i];
    C *const dq = dquery + i * in.D, *const dp = dpositive + i * in.D;
    of_rows.add(row, dq, 1, 1.0, in.D);
    of_rows.difference(dq, row, p, weight, in.inv_temperature, in.D);
    dinv_temperature[i] = of_rows.dot_sums(q, row, in.D) - weight * of_rows.dot(q, p, in.D);
    std::fill_n(row, in.D, 0.0);
    of_rows.add(row, dp, 1, 1.0, in.D);
    of_rows.difference(dp, row, q, weight, in.inv_temperature, in.D);
  });
  *static_cast<C*>(out.dinv_temperature) =
      static_cast<C>(std::accumulate(dinv_temperature, dinv_temperature + in.B, 0.0));
  return Status::kOk;
}

}  // namespace

Status in_batch_contrast_cpu(void* loss, double* lse, const InBatchContrastInputs& inputs,
                             const Executor& executor, Isa isa) {
  if (!supported(inputs.dtype, inputs.dtype)) return Status::kUnsupportedDType;
  if (inputs.B == 0) return Status::kOk;
  return in_dtype(inputs.dtype, [&](auto zero) {
    return forward(static_cast<decltype(zero)*>(loss), lse, inputs, executor, isa);
  });
}

Status in_batch_contrast_backward_cpu(const InBatchGradients& out, const void* grad_loss,
                                      const double* lse, const InBatchContrastInputs& inputs,
                                      const Executor& executor, Isa isa) {
  if (!supported(inputs.dtype, inputs.dtype)) return Status::kUnsupportedDType;
  return in_dtype(inputs.dtype, [&](auto zero) {
    using C = decltype(zero);
    if (inputs.B == 0) {
      *static_cast<C*>(out.dinv_temperature) = 0;
      return Status::kOk;
    }
    return backward(out, static_cast<const C*>(grad_loss), lse, inputs, executor, isa);
  });
}

}  // namespace codir_fast
