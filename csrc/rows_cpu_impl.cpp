// Rows of D elements before and after a pass, in double, for one instruction set
// (CODIR_FAST_ISA_NAMESPACE).
#include "rows_cpu_impl.h"

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "storage.h"
#include "unit_rows.h"

namespace codir_fast {
namespace CODIR_FAST_ISA_NAMESPACE {
namespace {

// As sixteen sums: one would wait for itself.
template <typename A, typename B>
double dot(const A* a, const B* b, std::int64_t size) {
  constexpr std::int64_t kSums = 16;
  double sums[kSums] = {};
  std::int64_t n = 0;
  for (; n + kSums <= size; n += kSums) {
    for (std::int64_t k = 0; k < kSums; ++k)
      sums[k] += static_cast<double>(a[n + k]) * static_cast<double>(b[n + k]);
  }
  double rest = 0;
  for (; n < size; ++n) rest += static_cast<double>(a[n]) * static_cast<double>(b[n]);
  for (std::int64_t width = kSums / 2; width > 0; width /= 2) {
    for (std::int64_t k = 0; k < width; ++k) sums[k] += sums[k + width];
  }
  return sums[0] + rest;
}

template <typename C>
void add(double* __restrict sums, const C* __restrict row, std::int64_t stride, double factor,
         std::int64_t D) {
  if (stride == 1) {
    for (std::int64_t d = 0; d < D; ++d) sums[d] += factor * static_cast<double>(row[d]);
  } else {
    for (std::int64_t d = 0; d < D; ++d) sums[d] += factor * static_cast<double>(row[d * stride]);
  }
}

template <typename C>
void gradients(C* __restrict dquery, C* __restrict dpositive, const C* __restrict q,
               const C* __restrict p, const double* __restrict sums, const QuerySlopes& slopes,
               std::int64_t D) {
  const double weight = slopes.weight, slope = slopes.slope, inv_t = slopes.inv_temperature;
  for (std::int64_t d = 0; d < D; ++d) {
    dquery[d] = static_cast<C>((weight * sums[d] - slope * static_cast<double>(p[d])) * inv_t);
    dpositive[d] = static_cast<C>(-slope * static_cast<double>(q[d]) * inv_t);
  }
}

template <typename C>
void difference(C* __restrict out, const double* __restrict sums, const C* __restrict row,
                double slope, double factor, std::int64_t D) {
  for (std::int64_t d = 0; d < D; ++d)
    out[d] = static_cast<C>((sums[d] - slope * static_cast<double>(row[d])) * factor);
}

template <typename C, typename T>
void unit_row(C* __restrict unit, double* inverse_norm, const T* __restrict row, std::int64_t D) {
  for (std::int64_t d = 0; d < D; ++d) unit[d] = static_cast<C>(to_compute(row[d]));
  if (inverse_norm == nullptr) return;
  const double inverse = 1 / std::max(std::sqrt(dot(unit, unit, D)), kMinNorm);  // NaN stays NaN
  for (std::int64_t d = 0; d < D; ++d)
    unit[d] = static_cast<C>(static_cast<double>(unit[d]) * inverse);
  *inverse_norm = inverse;
}

template <typename C>
Status unit_rows(C* unit, double* inverse_norm, const void* rows, std::int64_t N, std::int64_t D,
                 DType rows_dtype) {
  return with_storage(rows_dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    for (std::int64_t n = 0; n < N; ++n) {
      unit_row(unit + n * D, inverse_norm == nullptr ? nullptr : inverse_norm + n,
               static_cast<const T*>(rows) + n * D, D);
    }
  });
}

template <typename C>
void unit_rows_backward(C* gradient, const C* unit, const double* inverse_norm, std::int64_t N,
                        std::int64_t D) {
  for (std::int64_t n = 0; n < N; ++n) {
    C* __restrict g = gradient + n * D;
    const C* __restrict u = unit + n * D;
    const double inverse = inverse_norm[n];
    // A row that was shorter than kMinNorm was divided by a constant.
    const double along = inverse < 1 / kMinNorm ? dot(u, g, D) : 0;
    for (std::int64_t d = 0; d < D; ++d)
      g[d] =
          static_cast<C>((static_cast<double>(g[d]) - along * static_cast<double>(u[d])) * inverse);
  }
}

template <typename C>
constexpr RowKernels<C> kKernels{
    dot<C, C>,    dot<C, double>,       add<C>, gradients<C>, difference<C>,
    unit_rows<C>, unit_rows_backward<C>};

}  // namespace

extern const RowKernels<float> kRowKernelsFloat = kKernels<float>;
extern const RowKernels<double> kRowKernelsDouble = kKernels<double>;

}  // namespace CODIR_FAST_ISA_NAMESPACE
}  // namespace codir_fast
