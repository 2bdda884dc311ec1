// bank_contrast on the CPU: packs the queries, spreads tiles and bank rows over threads, adds the
// partial sums in a fixed order and finishes positives, loss and gradients in double. The pass
// itself is bank_contrast_cpu_impl.cpp.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <memory>
#include <new>
#include <type_traits>

#include "bank_contrast.h"
#include "bank_contrast_cpu_impl.h"
#include "storage.h"

namespace codir_fast {
namespace {

template <typename C>
const BankKernels<C>& kernels(Isa isa) {
  constexpr bool is_float = std::is_same_v<C, float>;
#if CODIR_FAST_X86_DISPATCH
  if (isa == Isa::kAvx512) {
    if constexpr (is_float)
      return avx512::kBankKernelsFloat;
    else
      return avx512::kBankKernelsDouble;
  }
  if (isa == Isa::kAvx2) {
    if constexpr (is_float)
      return avx2::kBankKernelsFloat;
    else
      return avx2::kBankKernelsDouble;
  }
#endif
  static_cast<void>(isa);
  if constexpr (is_float)
    return baseline::kBankKernelsFloat;
  else
    return baseline::kBankKernelsDouble;
}

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};

template <typename Element>
using Buffer = std::unique_ptr<Element[], Free>;

// Uninitialised, on a cache line; null when there is no memory.
template <typename Element>
Buffer<Element> allocate(std::int64_t size) {
  const std::size_t bytes = (static_cast<std::size_t>(size) * sizeof(Element) + 64) / 64 * 64;
  return Buffer<Element>(static_cast<Element*>(std::aligned_alloc(64, bytes)));
}

// How queries lie in tiles.
struct Tiling {
  std::int64_t lanes, tiles;
  std::int64_t size() const { return lanes * tiles; }
};

template <typename C>
Tiling tile(const BankKernels<C>& kernel, std::int64_t B) {
  std::int64_t vectors = 1;
  while (vectors < kernel.max_tile_vectors && vectors * kernel.vector_lanes < B) vectors *= 2;
  const std::int64_t lanes = vectors * kernel.vector_lanes;
  return {lanes, (B + lanes - 1) / lanes};
}

template <typename C>
Buffer<C> pack_queries(const C* query, std::int64_t B, std::int64_t D, const Tiling& tiling) {
  Buffer<C> packed = allocate<C>(tiling.size() * D);
  if (packed == nullptr) return packed;
  for (std::int64_t i = 0; i < tiling.size(); ++i) {
    C* column = packed.get() + i / tiling.lanes * D * tiling.lanes + i % tiling.lanes;
    for (std::int64_t d = 0; d < D; ++d) column[d * tiling.lanes] = i < B ? query[i * D + d] : C{0};
  }
  return packed;
}

// Work is a grid: groups of tiles times ranges of bank rows. Tiles are preferred, since ranges of
// rows cost partial sums; but threads must not wait for one another. More than one range never
// outnumbers the rows.
struct Grid {
  std::int64_t tile_groups, row_ranges;
};

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

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

struct Range {
  std::int64_t begin, end;
};

Range share(std::int64_t size, std::int64_t parts, std::int64_t part) {
  return {size * part / parts, size * (part + 1) / parts};
}

template <typename C>
struct PartialSums {
  Buffer<C> shift, weighted_rows;
  Buffer<double> total;
  bool allocated() const { return shift && weighted_rows && total; }
};

// Adds the partial sums of query i over the ranges of rows, in their order: log of the sum of e^s,
// and the mean of the rows under softmax, (D,). -inf and 0 where no row is allowed.
template <typename C>
double add_ranges(double* mean_row, const PartialSums<C>& sums, const Tiling& tiling,
                  std::int64_t D, std::int64_t row_ranges, std::int64_t i) {
  double shift = -std::numeric_limits<double>::infinity();
  for (std::int64_t range = 0; range < row_ranges; ++range) {
    shift = std::max(shift, static_cast<double>(sums.shift[range * tiling.size() + i]));
  }
  std::fill_n(mean_row, D, 0.0);
  double total = 0;
  for (std::int64_t range = 0; range < row_ranges; ++range) {
    const std::int64_t at = range * tiling.size() + i;
    if (sums.shift[at] == -std::numeric_limits<C>::infinity() && sums.total[at] == 0) continue;
    const double factor =
        std::isinf(shift) ? 1.0 : std::exp(static_cast<double>(sums.shift[at]) - shift);
    const C* rows =
        sums.weighted_rows.get() + (range * tiling.tiles + i / tiling.lanes) * D * tiling.lanes;
    for (std::int64_t d = 0; d < D; ++d)
      mean_row[d] += factor * rows[d * tiling.lanes + i % tiling.lanes];
    total += factor * sums.total[at];
  }
  for (std::int64_t d = 0; d < D && total != 0; ++d) mean_row[d] /= total;
  return total == 0 ? -std::numeric_limits<double>::infinity()
                    : (std::isinf(shift) ? 0.0 : shift) + std::log(total);
}

template <typename C>
void finish_query(const BankContrastOutputs& outputs, const C* q, const C* p,
                  const double* mean_row, double log_sum, std::int64_t i, std::int64_t D,
                  double inv_temperature) {
  double positive = 0, mean_logit = 0;
  for (std::int64_t d = 0; d < D; ++d) {
    positive += static_cast<double>(q[d]) * p[d];
    mean_logit += static_cast<double>(q[d]) * mean_row[d];
  }
  // With gap = log(sum over negatives / e^{s+}): loss = log(1 + e^gap), negatives' share of the
  // softmax 1/(1 + e^-gap).
  const double gap = log_sum - positive * inv_temperature;
  const double e = std::exp(-std::abs(gap));
  const double loss = std::max(gap, 0.0) + std::log1p(e);
  const double share = (gap > 0 ? 1.0 : e) / (1.0 + e);
  static_cast<C*>(outputs.loss)[i] = static_cast<C>(loss);
  static_cast<C*>(outputs.lse)[i] = static_cast<C>(positive * inv_temperature + loss);
  static_cast<C*>(outputs.dinv_temperature)[i] = static_cast<C>(share * (mean_logit - positive));
  C* dquery = static_cast<C*>(outputs.dquery) + i * D;
  C* dpositive = static_cast<C*>(outputs.dpositive) + i * D;
  for (std::int64_t d = 0; d < D; ++d) {
    dquery[d] = static_cast<C>(share * (mean_row[d] - p[d]) * inv_temperature);
    dpositive[d] = static_cast<C>(-share * q[d] * inv_temperature);
  }
}

template <typename C>
Status forward(const BankContrastOutputs& outputs, const C* positive, const BankContrastInputs& in,
               const Executor& executor, Isa isa) {
  const BankKernels<C>& kernel = kernels<C>(isa);
  const C* query = static_cast<const C*>(in.query);
  const Tiling tiling = tile(kernel, in.B);
  const Grid grid = split(tiling.tiles, in.K, executor.num_threads);
  const std::int64_t tasks = grid.tile_groups * grid.row_ranges;
  const std::int64_t scratch_size =
      kernel.scratch_size(tiling.lanes, in.D, ceil_div(tiling.tiles, grid.tile_groups));

  const Buffer<C> packed = pack_queries(query, in.B, in.D, tiling);
  const Buffer<C> scratch = allocate<C>(tasks * scratch_size);
  const Buffer<double> mean_rows = allocate<double>(executor.num_threads * in.D);
  const PartialSums<C> sums{allocate<C>(grid.row_ranges * tiling.size()),
                            allocate<C>(grid.row_ranges * tiling.size() * in.D),
                            allocate<double>(grid.row_ranges * tiling.size())};
  if (!packed || !scratch || !mean_rows || !sums.allocated()) return Status::kOutOfMemory;

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
  executor.parallel_for(executor.num_threads, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t thread = begin; thread < end; ++thread) {
      double* mean_row = mean_rows.get() + thread * in.D;
      const Range queries = share(in.B, executor.num_threads, thread);
      for (std::int64_t i = queries.begin; i < queries.end; ++i) {
        const double log_sum = add_ranges(mean_row, sums, tiling, in.D, grid.row_ranges, i);
        finish_query(outputs, query + i * in.D, positive + i * in.D, mean_row, log_sum, i, in.D,
                     in.inv_temperature);
      }
    }
  });
  return Status::kOk;
}

template <typename C>
Status backward(void* dbank, const C* grad_loss, const C* lse, const BankContrastInputs& in,
                const Executor& executor, Isa isa) {
  const BankKernels<C>& kernel = kernels<C>(isa);
  const C* query = static_cast<const C*>(in.query);
  const Tiling tiling = tile(kernel, in.B);
  const std::int64_t columns = kernel.padded_dim(in.D), tasks = executor.num_threads;
  const std::int64_t scratch_size = kernel.scratch_size(tiling.lanes, in.D, 0);

  const Buffer<C> packed = pack_queries(query, in.B, in.D, tiling);
  const Buffer<C> scratch = allocate<C>(tasks * scratch_size);
  const Buffer<C> row_query = allocate<C>(tiling.size() * columns);
  const Buffer<C> coefficient = allocate<C>(tiling.size()), padded_lse = allocate<C>(tiling.size());
  if (!packed || !scratch || !row_query || !coefficient || !padded_lse) return Status::kOutOfMemory;
  std::fill_n(row_query.get(), tiling.size() * columns, C{0});
  for (std::int64_t i = 0; i < tiling.size(); ++i) {
    coefficient[i] = i < in.B ? grad_loss[i] * static_cast<C>(in.inv_temperature) : C{0};
    padded_lse[i] = i < in.B ? lse[i] : std::numeric_limits<C>::infinity();
    if (i < in.B) std::copy_n(query + i * in.D, in.D, row_query.get() + i * columns);
  }

  executor.parallel_for(tasks, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t n = begin; n < end; ++n) {
      const Range rows = share(in.K, tasks, n);
      kernel.backward({dbank, row_query.get(), coefficient.get(), padded_lse.get()},
                      {packed.get(), &in, tiling.lanes, 0, tiling.tiles, rows.begin, rows.end,
                       scratch.get() + n * scratch_size});
    }
  });
  return Status::kOk;
}

bool supported(const BankContrastInputs& in) {
  const bool is_double = in.dtype == DType::kFloat64;
  return (is_double || in.dtype == DType::kFloat32) &&
         (is_double || in.bank_dtype != DType::kFloat64);
}

// Runs call(C{}) in the arithmetic type that inputs ask for. Handing work to an executor allocates.
template <typename Call>
Status in_dtype(const BankContrastInputs& inputs, const Call& call) {
  try {
    return inputs.dtype == DType::kFloat64 ? call(double{}) : call(float{});
  } catch (const std::bad_alloc&) {
    return Status::kOutOfMemory;
  }
}

}  // namespace

Status bank_contrast_cpu(const BankContrastOutputs& outputs, const void* positive,
                         const BankContrastInputs& inputs, const Executor& executor, Isa isa) {
  if (!supported(inputs)) return Status::kUnsupportedDType;
  if (inputs.B == 0) return Status::kOk;
  return in_dtype(inputs, [&](auto zero) {
    return forward(outputs, static_cast<const decltype(zero)*>(positive), inputs, executor, isa);
  });
}

Status bank_contrast_backward_cpu(void* dbank, const void* grad_loss, const void* lse,
                                  const BankContrastInputs& inputs, const Executor& executor,
                                  Isa isa) {
  if (!supported(inputs)) return Status::kUnsupportedDType;
  if (inputs.K == 0) return Status::kOk;
  return in_dtype(inputs, [&](auto zero) {
    using C = decltype(zero);
    return backward(dbank, static_cast<const C*>(grad_loss), static_cast<const C*>(lse), inputs,
                    executor, isa);
  });
}

}  // namespace codir_fast
