// unit_rows on the CPU: the rows in ranges, one to a thread where there are enough of them.
#include <type_traits>

#include "contrast_cpu.h"
#include "storage.h"
#include "unit_rows.h"

namespace codir_fast {

Status unit_rows_cpu(void* unit, double* inverse_norm, const void* rows, std::int64_t N,
                     std::int64_t D, DType rows_dtype, DType dtype, const Executor& executor,
                     Isa isa) {
  return in_dtype(dtype, [&](auto zero) {
    using C = decltype(zero);
    return with_storage(rows_dtype, [&](auto* tag) {
      using T = std::remove_pointer_t<decltype(tag)>;
      for_parts({0, N}, N * D, executor, [&](std::int64_t, const Range& part) {
        row_kernels<C>(isa).unit_rows(static_cast<C*>(unit) + part.begin * D,
                                      inverse_norm == nullptr ? nullptr : inverse_norm + part.begin,
                                      static_cast<const T*>(rows) + part.begin * D,
                                      part.end - part.begin, D, rows_dtype);
      });
    });
  });
}

Status unit_rows_backward_cpu(void* gradient, const void* unit, const double* inverse_norm,
                              std::int64_t N, std::int64_t D, DType dtype, const Executor& executor,
                              Isa isa) {
  return in_dtype(dtype, [&](auto zero) {
    using C = decltype(zero);
    for_parts({0, N}, N * D, executor, [&](std::int64_t, const Range& part) {
      row_kernels<C>(isa).unit_rows_backward(static_cast<C*>(gradient) + part.begin * D,
                                             static_cast<const C*>(unit) + part.begin * D,
                                             inverse_norm + part.begin, part.end - part.begin, D);
    });
    return Status::kOk;
  });
}

}  // namespace codir_fast
