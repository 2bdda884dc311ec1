// What the drivers of bank_contrast and indexed_contrast share on the CPU: memory, ranges of work,
// and the end of a query, from partial sums over ranges of negatives to loss and gradients, in
// double.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <memory>
#include <new>

#include "bank_contrast.h"

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

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

struct Range {
  std::int64_t begin, end;
};

Range share(std::int64_t size, std::int64_t parts, std::int64_t part) {
  return {size * part / parts, size * (part + 1) / parts};
}

// How queries lie in tiles.
struct Tiling {
  std::int64_t lanes, tiles;
  std::int64_t size() const { return lanes * tiles; }
};

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

bool supported(DType dtype, DType bank_dtype) {
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
