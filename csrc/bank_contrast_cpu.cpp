// bank_contrast on the CPU: packs the queries, spreads tiles and bank rows over threads, adds the
// partial sums in a fixed order and finishes positives, loss and gradients in double. The pass
// itself is bank_contrast_cpu_impl.cpp.
#include <algorithm>
#include <limits>
#include <type_traits>

#include "bank_contrast.h"
#include "bank_contrast_cpu_impl.h"
#include "contrast_cpu.h"

namespace codir_fast {
namespace {

template <typename C>
const BankKernels<C>& kernels(Isa isa) {
  if constexpr (std::is_same_v<C, float>)
    return CODIR_FAST_KERNELS(kBankKernelsFloat, isa);
  else
    return CODIR_FAST_KERNELS(kBankKernelsDouble, isa);
}

// Few lanes without a query count most; of the same number of vectors, wide tiles are the faster.
template <typename C>
Tiling tile(const BankKernels<C>& kernel, std::int64_t B) {
  Tiling best{};
  for (std::int64_t vectors = kernel.max_tile_vectors; vectors >= 1; --vectors) {
    const std::int64_t lanes = vectors * kernel.vector_lanes, tiles = ceil_div(B, lanes);
    if (best.tiles == 0 || lanes * tiles < best.size()) best = {lanes, tiles};
  }
  return best;
}

// InfoNCE's shifts begin at the largest logit that unit rows can have: they seldom move then.
// Anything would be right, so a bound that is no use is 0.
template <typename C>
void bound_shifts(const PartialSums<C>& sums, const BankContrastInputs& in, std::int64_t row_ranges,
                  const Tiling& tiling, const RowKernels<C>& kernel) {
  constexpr double kUseful = 1e4;
  const C* query = static_cast<const C*>(in.query);
  for (std::int64_t i = 0; i < tiling.size(); ++i) {
    const C* q = query + i * in.D;
    const double bound = i < in.B ? std::sqrt(kernel.dot(q, q, in.D)) * in.inv_temperature : 0;
    for (std::int64_t range = 0; range < row_ranges; ++range) {
      sums.shift[range * tiling.size() + i] = bound < kUseful ? static_cast<C>(bound) : C{0};
    }
  }
}

// Work is a grid: groups of tiles times ranges of bank rows. Tiles are preferred, since ranges of
// rows cost partial sums; but threads must not wait for one another. More than one range never
// outnumbers the rows.
struct Grid {
  std::int64_t tile_groups, row_ranges;
};

Grid split(std::int64_t tiles, std::int64_t K, std::int64_t num_threads) {
  constexpr std::int64_t kMinRows = 512;  // fewer are not worth a partial sum
  Grid best{1, 1};
  std::int64_t best_work = std::numeric_limits<std::int64_t>::max();
  for (std::int64_t groups = std::min(tiles, num_threads); groups >= 1; --groups) {
    const std::int64_t ranges =
        std::max<std::int64_t>(1, std::min(num_threads / groups, K / kMinRows));
    const std::int64_t work = ceil_div(tiles, groups) * ceil_div(K, ranges);
    if (work < best_work) {
      best = {groups, ranges};
      best_work = work;
    }
  }
  return best;
}

template <typename C>
Status forward(const BankContrastOutputs& outputs, const C* positive, const BankContrastInputs& in,
               const Executor& executor, Isa isa) {
  const BankKernels<C>& kernel = kernels<C>(isa);
  const RowKernels<C>& of_rows = row_kernels<C>(isa);
  const C* query = static_cast<const C*>(in.query);
  const Tiling tiling = tile(kernel, in.B);
  const Grid grid = split(tiling.tiles, in.K, executor.num_threads);
  const std::int64_t tasks = grid.tile_groups * grid.row_ranges;
  const std::int64_t scratch_size =
      kernel.scratch_size(tiling.lanes, in.D, ceil_div(tiling.tiles, grid.tile_groups));

  const Buffer<C> packed = allocate<C>(tiling.size() * in.D);
  const Buffer<C> scratch = allocate<C>(tasks * scratch_size);
  const Buffer<double> weighted_rows = allocate<double>(executor.num_threads * in.D);
  const PartialSums<C> sums(grid.row_ranges, tiling, in);
  if (!packed || !scratch || !weighted_rows || !sums.allocated()) return Status::kOutOfMemory;
  pack_queries(packed.get(), query, in.B, in.D, tiling);
  if (in.objective == Objective::kInfoNce) bound_shifts(sums, in, grid.row_ranges, tiling, of_rows);

  executor.parallel_for(tasks, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t n = begin; n < end; ++n) {
      const std::int64_t range = n / grid.tile_groups;
      const Range tiles = share(tiling.tiles, grid.tile_groups, n % grid.tile_groups);
      const Range rows = share(in.K, grid.row_ranges, range);
      const std::int64_t first = (range * tiling.tiles + tiles.begin) * tiling.lanes;
      kernel.scan({sums.shift.get() + first, sums.total.get() + first,
                   sums.weighted_rows.get() + first * in.D},
                  {packed.get(), &in, tiling.lanes, tiles.begin, tiles.end, rows.begin, rows.end,
                   scratch.get() + n * scratch_size});
    }
  });
  const std::int64_t elements = in.B * in.D * grid.row_ranges;
  for_parts({0, in.B}, elements, executor, [&](std::int64_t part, const Range& queries) {
    double* weighted_row = weighted_rows.get() + part * in.D;
    for (std::int64_t i = queries.begin; i < queries.end; ++i) {
      const QuerySums total =
          add_ranges(weighted_row, sums, tiling, in.D, grid.row_ranges, i, of_rows);
      finish_query(outputs, query + i * in.D, positive + i * in.D, weighted_row, total, i, in,
                   of_rows);
    }
  });
  return Status::kOk;
}

template <typename C>
Status backward(void* dbank, const C* grad_loss, const double* lse, const BankContrastInputs& in,
                const Executor& executor, Isa isa) {
  const BankKernels<C>& kernel = kernels<C>(isa);
  const C* query = static_cast<const C*>(in.query);
  const Tiling tiling = tile(kernel, in.B);
  const std::int64_t columns = kernel.padded_dim(in.D), tasks = executor.num_threads;
  const std::int64_t scratch_size = kernel.scratch_size(tiling.lanes, in.D, 0);

  const Buffer<C> packed = allocate<C>(tiling.size() * in.D);
  const Buffer<C> scratch = allocate<C>(tasks * scratch_size);
  const Buffer<C> row_query = allocate<C>(tiling.size() * columns);
  const Buffer<C> coefficient = allocate<C>(tiling.size());
  const Buffer<C> lse_high = allocate<C>(tiling.size()), lse_low = allocate<C>(tiling.size());
  if (!packed || !scratch || !row_query || !coefficient || !lse_high || !lse_low)
    return Status::kOutOfMemory;
  pack_queries(packed.get(), query, in.B, in.D, tiling);
  std::fill_n(row_query.get(), tiling.size() * columns, C{0});
  for (std::int64_t i = 0; i < tiling.size(); ++i) {
    coefficient[i] = i < in.B ? grad_loss[i] * static_cast<C>(in.inv_temperature) : C{0};
    lse_high[i] = std::numeric_limits<C>::infinity();
    lse_low[i] = 0;
    if (i >= in.B) continue;
    const SplitLse<C> split(lse[i]);
    lse_high[i] = split.high;
    lse_low[i] = split.low;
    std::copy_n(query + i * in.D, in.D, row_query.get() + i * columns);
  }

  executor.parallel_for(tasks, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t n = begin; n < end; ++n) {
      const Range rows = share(in.K, tasks, n);
      kernel.backward({dbank, row_query.get(), coefficient.get(), lse_high.get(), lse_low.get()},
                      {packed.get(), &in, tiling.lanes, 0, tiling.tiles, rows.begin, rows.end,
                       scratch.get() + n * scratch_size});
    }
  });
  return Status::kOk;
}

}  // namespace

Status bank_contrast_cpu(const BankContrastOutputs& outputs, const void* positive,
                         const BankContrastInputs& inputs, const Executor& executor, Isa isa) {
  if (!supported(inputs.dtype, inputs.bank_dtype)) return Status::kUnsupportedDType;
  if (inputs.B == 0) return Status::kOk;
  return in_dtype(inputs.dtype, [&](auto zero) {
    return forward(outputs, static_cast<const decltype(zero)*>(positive), inputs, executor, isa);
  });
}

Status bank_contrast_backward_cpu(void* dbank, const void* grad_loss, const double* lse,
                                  const BankContrastInputs& inputs, const Executor& executor,
                                  Isa isa) {
  if (!supported(inputs.dtype, inputs.bank_dtype)) return Status::kUnsupportedDType;
  if (inputs.K == 0) return Status::kOk;
  return in_dtype(inputs.dtype, [&](auto zero) {
    using C = decltype(zero);
    return backward(dbank, static_cast<const C*>(grad_loss), lse, inputs, executor, isa);
  });
}

}  // namespace codir_fast
