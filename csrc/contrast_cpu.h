// What the drivers of the contrastive operators share on the CPU: memory, ranges of work,
// and the end of a query, from partial sums over ranges of negatives to loss and gradients, in
// double.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <type_traits>
#include <utility>
#include <vector>

#include "bank_contrast.h"
#include "rows_cpu_impl.h"

namespace codir_fast {
namespace {

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

inline std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// One allocation for all the arrays of a call: the program's allocator keeps it for the next call,
// where it would hand several of that size back to the system, and take them again page by page.
class Workspace {
 public:
  // `array` will point at `size` elements, uninitialised and on a cache line.
  template <typename Element>
  void add(Element*& array, std::int64_t size) {
    arrays_.push_back({&array, bytes_});
    bytes_ += (size * static_cast<std::int64_t>(sizeof(Element)) + 63) / 64 * 64;
  }

  // Once all are added; false when there is no memory.
  bool allocate() {
    memory_ = codir_fast::allocate<char>(bytes_);
    if (!memory_) return false;
    for (const auto& [array, offset] : arrays_) {
      const char* const at = memory_.get() + offset;
      std::memcpy(array, &at, sizeof(at));
    }
    return true;
  }

 private:
  Buffer<char> memory_;
  std::int64_t bytes_ = 0;
  std::vector<std::pair<void*, std::int64_t>> arrays_;
};

struct Range {
  std::int64_t begin, end;
};

inline Range share(std::int64_t size, std::int64_t parts, std::int64_t part) {
  return {size * part / parts, size * (part + 1) / parts};
}

// Runs run(part, range) on parts of `all` rows, one to a thread, or on all at once where they hold
// fewer elements than are done before a thread starts.
template <typename Run>
void for_parts(const Range& all, std::int64_t elements, const Executor& executor, const Run& run) {
  constexpr std::int64_t kWorthThreads = 1 << 15;
  const std::int64_t parts = elements < kWorthThreads ? 1 : executor.num_threads;
  executor.parallel_for(parts, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t part = begin; part < end; ++part) {
      const Range range = share(all.end - all.begin, parts, part);
      run(part, Range{all.begin + range.begin, all.begin + range.end});
    }
  });
}

// Where the shift of a query's sums begins: NCE's stays there, InfoNCE's follows the maximum.
inline double first_shift(const BankContrastInputs& in) {
  return in.objective == Objective::kNce ? in.log_partition + std::log(in.noise_ratio + kNceEps)
                                         : -std::numeric_limits<double>::infinity();
}

// lse as two numbers of the arithmetic's type, so that the first can be taken from a logit near to
// it without rounding.
template <typename C>
struct SplitLse {
  C high, low;

  explicit SplitLse(double lse)
      : high(static_cast<C>(lse)), low(static_cast<C>(lse - static_cast<double>(high))) {}
};

// How queries lie in tiles.
struct Tiling {
  std::int64_t lanes, tiles;
  std::int64_t size() const { return lanes * tiles; }
};

// As BankTask has them: each tile D-major.
template <typename C>
void pack_queries(C* packed, const C* query, std::int64_t B, std::int64_t D, const Tiling& tiling) {
  constexpr std::int64_t kColumns = 16;  // a cache line of each query at a time
  for (std::int64_t first = 0; first < tiling.size(); first += tiling.lanes) {
    C* tile = packed + first * D;
    for (std::int64_t begin = 0; begin < D; begin += kColumns) {
      const std::int64_t end = std::min(begin + kColumns, D);
      for (std::int64_t lane = 0; lane < tiling.lanes; ++lane) {
        const std::int64_t i = first + lane;
        for (std::int64_t d = begin; d < end; ++d)
          tile[d * tiling.lanes + lane] = i < B ? query[i * D + d] : C{0};
      }
    }
  }
}

// pack_queries the other way round.
template <typename C, typename Sum>
void unpack_queries(C* query, const Sum* packed, std::int64_t B, std::int64_t D,
                    const Tiling& tiling, const Executor& executor) {
  constexpr std::int64_t kColumns = 16;
  for_parts({0, tiling.tiles}, B * D, executor, [&](std::int64_t, const Range& tiles) {
    for (std::int64_t first = tiles.begin * tiling.lanes; first < tiles.end * tiling.lanes;
         first += tiling.lanes) {
      const Sum* tile = packed + first * D;
      const std::int64_t last = std::min(B, first + tiling.lanes);
      for (std::int64_t begin = 0; begin < D; begin += kColumns) {
        const std::int64_t end = std::min(begin + kColumns, D);
        for (std::int64_t i = first; i < last; ++i) {
          for (std::int64_t d = begin; d < end; ++d)
            query[i * D + d] = static_cast<C>(tile[d * tiling.lanes + i - first]);
        }
      }
    }
  });
}

// Per range of rows: shift and total (tiling.size(),), weighted_rows (tiling.size() * D).
template <typename C>
struct PartialSums {
  Buffer<C> shift, weighted_rows;
  Buffer<double> total;

  PartialSums(std::int64_t row_ranges, const Tiling& tiling, const BankContrastInputs& in)
      : shift(allocate<C>(row_ranges * tiling.size())),
        weighted_rows(allocate<C>(row_ranges * tiling.size() * in.D)),
        total(allocate<double>(row_ranges * tiling.size())) {
    if (shift) std::fill_n(shift.get(), row_ranges * tiling.size(), C(first_shift(in)));
  }

  bool allocated() const { return shift && weighted_rows && total; }
};

template <typename C>
const RowKernels<C>& row_kernels(Isa isa) {
  if constexpr (std::is_same_v<C, float>)
    return CODIR_FAST_KERNELS(kRowKernelsFloat, isa);
  else
    return CODIR_FAST_KERNELS(kRowKernelsDouble, isa);
}

// A query's sums over all its negatives: total of the terms, taken relative to e^shift by InfoNCE.
struct QuerySums {
  double shift, total;
};

// Adds the partial sums of query i over the ranges of rows, in their order, and its weighted rows
// into weighted_row (D,).
template <typename C>
QuerySums add_ranges(double* weighted_row, const PartialSums<C>& sums, const Tiling& tiling,
                     std::int64_t D, std::int64_t row_ranges, std::int64_t i,
                     const RowKernels<C>& kernel) {
  double shift = -std::numeric_limits<double>::infinity();
  for (std::int64_t range = 0; range < row_ranges; ++range) {
    const std::int64_t at = range * tiling.size() + i;
    if (sums.total[at] != 0) shift = std::max(shift, static_cast<double>(sums.shift[at]));
  }
  std::fill_n(weighted_row, D, 0.0);
  double total = 0;
  for (std::int64_t range = 0; range < row_ranges; ++range) {
    const std::int64_t at = range * tiling.size() + i;
    if (sums.total[at] == 0) continue;  // its shift means nothing
    const double factor =
        std::isinf(shift) ? 1.0 : std::exp(static_cast<double>(sums.shift[at]) - shift);
    const C* rows =
        sums.weighted_rows.get() + (range * tiling.tiles + i / tiling.lanes) * D * tiling.lanes;
    kernel.add(weighted_row, rows + i % tiling.lanes, tiling.lanes, factor, D);
    total += factor * sums.total[at];
  }
  return {std::isinf(shift) ? 0.0 : shift, total};
}

// log(1 + e^x) and its derivative; `excess` is the first less max(x, 0).
struct Softplus {
  double value, slope, excess;

  explicit Softplus(double x) {
    const double e = std::exp(-std::abs(x));
    excess = std::log1p(e);
    value = std::max(x, 0.0) + excess;
    slope = (x > 0 ? 1.0 : e) / (1.0 + e);
  }
};

template <typename C>
void finish_query(const BankContrastOutputs& outputs, const C* q, const C* p,
                  const double* weighted_row, const QuerySums& sums, std::int64_t i,
                  const BankContrastInputs& in, const RowKernels<C>& kernel) {
  const double positive = kernel.dot(q, p, in.D);
  const double negatives = kernel.dot_sums(q, weighted_row, in.D);
  // Both are softplus of a gap to the positive. InfoNCE: the gap is log(sum over negatives /
  // e^{s+}), the slope the negatives' share of the softmax, which their weights divide.
  const bool is_nce = in.objective == Objective::kNce;
  const double positive_logit = positive * in.inv_temperature;
  const double log_sum = is_nce ? first_shift(in) : sums.shift + std::log(sums.total);
  const Softplus gap(log_sum - positive_logit);
  const double loss = is_nce ? gap.value + sums.total : gap.value;
  const double lse = is_nce ? log_sum : std::max(log_sum, positive_logit) + gap.excess;
  const double weight = is_nce ? 1 : sums.total == 0 ? 0 : gap.slope / sums.total;

  static_cast<C*>(outputs.loss)[i] = static_cast<C>(loss);
  outputs.lse[i] = lse;
  static_cast<C*>(outputs.dinv_temperature)[i] =
      static_cast<C>(weight * negatives - gap.slope * positive);
  kernel.gradients(static_cast<C*>(outputs.dquery) + i * in.D,
                   static_cast<C*>(outputs.dpositive) + i * in.D, q, p, weighted_row,
                   {weight, gap.slope, in.inv_temperature}, in.D);
}

inline bool supported(DType dtype, DType bank_dtype) {
  const bool is_double = dtype == DType::kFloat64;
  return (is_double || dtype == DType::kFloat32) && (is_double || bank_dtype != DType::kFloat64);
}

// Runs call(C{}) with C the arithmetic type that dtype names. Handing work to an executor
// allocates.
template <typename Call>
Status in_dtype(DType dtype, const Call& call) {
  try {
    return dtype == DType::kFloat64 ? call(double{}) : call(float{});
  } catch (const std::bad_alloc&) {
    return Status::kOutOfMemory;
  }
}

}  // namespace
}  // namespace codir_fast
