// unit_rows on the CPU: the rows in ranges, one to a thread where there are enough of them.
#include <type_traits>

#include "contrast_cpu.h"
#include "storage.h"
#include "unit_rows.h"

namespace codir_fast {
namespace {

// Calls run(first row, number of rows) for ranges that cover all.
template <typename Run>
void for_ranges(std::int64_t N, std::int64_t D, const Executor& executor, const Run& run) {
  constexpr std::int64_t kWorthThreads = 1 << 15;  // elements; fewer are done before one starts
  const std::int64_t parts = N * D < kWorthThreads ? 1 : executor.num_threads;
  executor.parallel_for(parts, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t n = begin; n < end; ++n) {
      const Range range = share(N, parts, n);
      run(range.begin, range.end - range.begin);
    }
  });
}

}  // namespace

Status unit_rows_cpu(void* unit, double* inverse_norm, const void* rows, std::int64_t N,
                     std::int64_t D, DType rows_dtype, DType dtype, const Executor& executor,
                     Isa isa) {
  return in_dtype(dtype, [&](auto zero) {
    using C = decltype(zero);
    return with_storage(rows_dtype, [&](auto* tag) {
      using T = std::remove_pointer_t<decltype(tag)>;
      for_ranges(N, D, executor, [&](std::int64_t first, std::int64_t size) {
        row_kernels<C>(isa).unit_rows(static_cast<C*>(unit) + first * D,
                                      inverse_norm == nullptr ? nullptr : inverse_norm + first,
                                      static_cast<const T*>(rows) + first * D, size, D, rows_dtype);
      });
    });
  });
}

Status unit_rows_backward_cpu(void* gradient, const void* unit, const double* inverse_norm,
                              std::int64_t N, std::int64_t D, DType dtype, const Executor& executor,
                              Isa isa) {
  return in_dtype(dtype, [&](auto zero) {
    using C = decltype(zero);
    for_ranges(N, D, executor, [&](std::int64_t first, std::int64_t size) {
      row_kernels<C>(isa).unit_rows_backward(static_cast<C*>(gradient) + first * D,
                                             static_cast<const C*>(unit) + first * D,
                                             inverse_norm + first, size, D);
    });
    return Status::kOk;
  });
}

}  // namespace codir_fast
