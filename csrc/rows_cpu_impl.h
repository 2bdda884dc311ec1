// What the drivers of the contrastive operators (contrast_cpu.h) and unit_rows_cpu.cpp ask of
// rows_cpu_impl.cpp, which is compiled once per instruction set: what is done to single rows of D
// elements before and after a pass, in double. Plain data and declarations only: code here would be
// shared between instruction sets.
#pragma once

#include <cstdint>

#include "common.h"
#include "simd/kernels_by_isa.h"

namespace codir_fast {

// d loss / d (query / t) = weight * sums - slope * p, and d loss / d positive = -slope * q / t.
struct QuerySlopes {
  double weight, slope, inv_temperature;
};

template <typename C>
struct RowKernels {
  double (*dot)(const C* a, const C* b, std::int64_t D);
  double (*dot_sums)(const C* a, const double* sums, std::int64_t D);
  // sums (D,) += factor * row, whose elements lie `stride` apart.
  void (*add)(double* sums, const C* row, std::int64_t stride, double factor, std::int64_t D);
  void (*gradients)(C* dquery, C* dpositive, const C* q, const C* p, const double* sums,
                    const QuerySlopes& slopes, std::int64_t D);
  // out = factor * (sums - slope * row)
  void (*difference)(C* out, const double* sums, const C* row, double slope, double factor,
                     std::int64_t D);
  // As unit_rows.h has them.
  Status (*unit_rows)(C* unit, double* inverse_norm, const void* rows, std::int64_t N,
                      std::int64_t D, DType rows_dtype);
  void (*unit_rows_backward)(C* gradient, const C* unit, const double* inverse_norm, std::int64_t N,
                             std::int64_t D);
};

CODIR_FAST_DECLARE_KERNELS(RowKernels<float>, kRowKernelsFloat)
CODIR_FAST_DECLARE_KERNELS(RowKernels<double>, kRowKernelsDouble)

}  // namespace codir_fast
