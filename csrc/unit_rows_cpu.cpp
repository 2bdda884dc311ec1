// unit_rows on the CPU, on the calling thread: B rows are little beside a pass over a bank.
#include "contrast_cpu.h"
#include "unit_rows.h"

namespace codir_fast {

Status unit_rows_cpu(void* unit, double* inverse_norm, const void* rows, std::int64_t N,
                     std::int64_t D, DType rows_dtype, DType dtype, Isa isa) {
  return in_dtype(dtype, [&](auto zero) {
    using C = decltype(zero);
    return row_kernels<C>(isa).unit_rows(static_cast<C*>(unit), inverse_norm, rows, N, D,
                                         rows_dtype);
  });
}

Status unit_rows_backward_cpu(void* gradient, const void* unit, const double* inverse_norm,
                              std::int64_t N, std::int64_t D, DType dtype, Isa isa) {
  return in_dtype(dtype, [&](auto zero) {
    using C = decltype(zero);
    row_kernels<C>(isa).unit_rows_backward(static_cast<C*>(gradient), static_cast<const C*>(unit),
                                           inverse_norm, N, D);
    return Status::kOk;
  });
}

}  // namespace codir_fast
