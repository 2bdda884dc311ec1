// What indexed_contrast_cpu.cpp asks of indexed_contrast_cpu_impl.cpp, which is compiled once per
// instruction set. Plain data, declarations, and nothing that links.
#pragma once

#include <cstdint>

#include "indexed_contrast.h"
#include "simd/kernels_by_isa.h"

namespace codir_fast {

// Sums of query i so far: of the terms, and of the weighted rows, (D,). The latest rows are summed
// in `run` first, lest float stagnates; weighted_rows + run is the sum.
template <typename C>
struct IndexedSums {
  C* shift;
  double* total;
  C *weighted_rows, *run;
  std::int64_t* rows_in_run;
};

// Rows of one block of the bank: first + number[n].
struct BlockRows {
  const std::uint16_t* number;
  std::int64_t first, size;
};

namespace {

inline std::int64_t element_size(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

}  // namespace

// Memory that is wanted next: [at, end), of which so many cache lines are fetched with each row.
struct Upcoming {
  const char *at, *end;
  std::int64_t lines_per_row;
};

// What the gradient to the bank takes from query i: d / d loss, and lse in two parts.
template <typename C>
struct QueryGradient {
  C grad, lse_high, lse_low;
};

template <typename C>
struct IndexedKernels {
  std::int64_t (*scratch_size)(std::int64_t D);
  // Adds to query i's sums: the rows that a list names, wherever they are, or rows of one block.
  void (*scan_list)(const IndexedSums<C>&, const IndexedContrastInputs&, std::int64_t i,
                    const std::int64_t* list, std::int64_t size, C* scratch);
  void (*scan_block)(const IndexedSums<C>&, const IndexedContrastInputs&, std::int64_t i,
                     const BlockRows& rows, Upcoming& upcoming, C* scratch);
  // gradient (rows of the block, D) += bank_scale_j * grad * weight / t * q for query i's rows,
  // with lse for shift. In double: a row may be named any number of times.
  void (*add_gradient)(double* gradient, const IndexedContrastInputs&, std::int64_t i,
                       const BlockRows& rows, Upcoming& upcoming, const QueryGradient<C>& upstream,
                       C* scratch);
};

CODIR_FAST_DECLARE_KERNELS(IndexedKernels<float>, kIndexedKernelsFloat)
CODIR_FAST_DECLARE_KERNELS(IndexedKernels<double>, kIndexedKernelsDouble)

}  // namespace codir_fast
