// unit_rows on the CPU, on the calling thread: B rows are little beside a pass over a bank.
#include <algorithm>
#include <cmath>
#include <type_traits>

#include "contrast_cpu.h"
#include "storage.h"
#include "unit_rows.h"

namespace codir_fast {
namespace {

template <typename C, typename T>
void unit_row(C* unit, double* inverse_norm, const T* row, std::int64_t D) {
  for (std::int64_t d = 0; d < D; ++d) unit[d] = static_cast<C>(to_compute(row[d]));
  if (inverse_norm == nullptr) return;
  *inverse_norm = 1 / std::max(std::sqrt(dot(unit, unit, D)), kMinNorm);
  for (std::int64_t d = 0; d < D; ++d) unit[d] = static_cast<C>(unit[d] * *inverse_norm);
}

template <typename C>
void bring_back(C* gradient, const C* unit, double inverse_norm, std::int64_t D) {
  // A row that was shorter than kMinNorm was divided by a constant.
  const bool is_unit = inverse_norm < 1 / kMinNorm;
  const double along = is_unit ? dot(unit, gradient, D) : 0;
  for (std::int64_t d = 0; d < D; ++d)
    gradient[d] = static_cast<C>((gradient[d] - along * unit[d]) * inverse_norm);
}

}  // namespace

Status unit_rows_cpu(void* unit, double* inverse_norm, const void* rows, std::int64_t N,
                     std::int64_t D, DType rows_dtype, DType dtype) {
  return in_dtype(dtype, [&](auto zero) {
    using C = decltype(zero);
    return with_storage(rows_dtype, [&](auto* tag) {
      using T = std::remove_pointer_t<decltype(tag)>;
      for (std::int64_t n = 0; n < N; ++n) {
        unit_row(static_cast<C*>(unit) + n * D,
                 inverse_norm == nullptr ? nullptr : inverse_norm + n,
                 static_cast<const T*>(rows) + n * D, D);
      }
    });
  });
}

Status unit_rows_backward_cpu(void* gradient, const void* unit, const double* inverse_norm,
                              std::int64_t N, std::int64_t D, DType dtype) {
  return in_dtype(dtype, [&](auto zero) {
    using C = decltype(zero);
    for (std::int64_t n = 0; n < N; ++n) {
      bring_back(static_cast<C*>(gradient) + n * D, static_cast<const C*>(unit) + n * D,
                 inverse_norm[n], D);
    }
    return Status::kOk;
  });
}

}  // namespace codir_fast
