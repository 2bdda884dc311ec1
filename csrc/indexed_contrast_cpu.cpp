// indexed_contrast on the CPU: spreads queries, and where these are fewer than threads their
// positions, over threads; ends each query as bank_contrast does. The pass itself is
// indexed_contrast_cpu_impl.cpp.
#include <algorithm>
#include <type_traits>

#include "contrast_cpu.h"
#include "indexed_contrast.h"
#include "indexed_contrast_cpu_impl.h"
#include "storage.h"

namespace codir_fast {
namespace {

template <typename C>
const IndexedKernels<C>& kernels(Isa isa) {
  constexpr bool is_float = std::is_same_v<C, float>;
#if CODIR_FAST_X86_DISPATCH
  if (isa == Isa::kAvx512) {
    if constexpr (is_float)
      return avx512::kIndexedKernelsFloat;
    else
      return avx512::kIndexedKernelsDouble;
  }
  if (isa == Isa::kAvx2) {
    if constexpr (is_float)
      return avx2::kIndexedKernelsFloat;
    else
      return avx2::kIndexedKernelsDouble;
  }
#endif
  static_cast<void>(isa);
  if constexpr (is_float)
    return baseline::kIndexedKernelsFloat;
  else
    return baseline::kIndexedKernelsDouble;
}

template <typename C>
Status forward(const BankContrastOutputs& outputs, const C* positive,
               const IndexedContrastInputs& inputs, const Executor& executor, Isa isa) {
  const BankContrastInputs& in = inputs.bank;
  const IndexedKernels<C>& kernel = kernels<C>(isa);
  const std::int64_t threads = std::max(executor.num_threads, 1);
  const std::int64_t ranges = ceil_div(threads, std::min(in.B, threads));
  const std::int64_t scratch_size = kernel.scratch_size(in.D);
  const Tiling tiling{1, in.B};

  const Buffer<C> scratch = allocate<C>(threads * scratch_size);
  const Buffer<double> weighted_rows = allocate<double>(threads * in.D);
  const PartialSums<C> sums(ranges, tiling, in);
  if (!scratch || !weighted_rows || !sums.allocated()) return Status::kOutOfMemory;

  executor.parallel_for(threads, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t thread = begin; thread < end; ++thread) {
      const Range work = share(ranges * in.B, threads, thread);
      for (std::int64_t n = work.begin; n < work.end; ++n) {
        const Range positions = share(inputs.M, ranges, n / in.B);
        kernel.scan(
            {sums.shift.get() + n, sums.total.get() + n, sums.weighted_rows.get() + n * in.D},
            inputs, n % in.B, positions.begin, positions.end,
            scratch.get() + thread * scratch_size);
      }
    }
  });
  executor.parallel_for(threads, [&](std::int64_t begin, std::int64_t end) {
    const C* query = static_cast<const C*>(in.query);
    for (std::int64_t thread = begin; thread < end; ++thread) {
      double* weighted_row = weighted_rows.get() + thread * in.D;
      const Range queries = share(in.B, threads, thread);
      for (std::int64_t i = queries.begin; i < queries.end; ++i) {
        const QuerySums total = add_ranges(weighted_row, sums, tiling, in.D, ranges, i);
        finish_query(outputs, query + i * in.D, positive + i * in.D, weighted_row, total, i, in);
      }
    }
  });
  return Status::kOk;
}

// Rows [rows.begin, rows.end) of dbank, by the one thread that owns them, in the order of i and m.
template <typename C>
void scatter_rows(C* dbank, const C* coefficient, const IndexedContrastInputs& inputs,
                  const Range& rows) {
  const BankContrastInputs& in = inputs.bank;
  const C* query = static_cast<const C*>(in.query);
  std::fill(dbank + rows.begin * in.D, dbank + rows.end * in.D, C{0});
  for (std::int64_t n = 0; n < in.B * inputs.M; ++n) {
    const std::int64_t j = inputs.index[n];
    if (j < rows.begin || j >= rows.end || coefficient[n] == 0) continue;
    const C* q = query + n / inputs.M * in.D;
    for (std::int64_t d = 0; d < in.D; ++d) dbank[j * in.D + d] += coefficient[n] * q[d];
  }
}

template <typename C>
Status backward(void* dbank, const C* grad_loss, const double* lse,
                const IndexedContrastInputs& inputs, const Executor& executor, Isa isa) {
  const BankContrastInputs& in = inputs.bank;
  const IndexedKernels<C>& kernel = kernels<C>(isa);
  const std::int64_t threads = std::max(executor.num_threads, 1);
  const std::int64_t scratch_size = kernel.scratch_size(in.D);
  const bool in_place = in.bank_dtype == in.dtype;

  const Buffer<C> scratch = allocate<C>(threads * scratch_size);
  const Buffer<C> coefficient = allocate<C>(in.B * inputs.M);
  // Sums run in C: a bank of a narrower type gets its gradient in one rounding at the end.
  const Buffer<C> wide = allocate<C>(in_place ? 0 : in.K * in.D);
  if (!scratch || !coefficient || !wide) return Status::kOutOfMemory;
  C* sums = in_place ? static_cast<C*>(dbank) : wide.get();

  executor.parallel_for(threads, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t thread = begin; thread < end; ++thread) {
      const Range queries = share(in.B, threads, thread);
      for (std::int64_t i = queries.begin; i < queries.end; ++i) {
        const SplitLse<C> split(lse[i]);
        kernel.coefficients(coefficient.get() + i * inputs.M, inputs, i, grad_loss[i], split.high,
                            split.low, scratch.get() + thread * scratch_size);
      }
    }
  });
  executor.parallel_for(threads, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t thread = begin; thread < end; ++thread) {
      const Range rows = share(in.K, threads, thread);
      scatter_rows(sums, coefficient.get(), inputs, rows);
      if (in_place) continue;
      with_storage(in.bank_dtype, [&](auto* tag) {
        using T = std::remove_pointer_t<decltype(tag)>;
        T* out = static_cast<T*>(dbank);
        for (std::int64_t n = rows.begin * in.D; n < rows.end * in.D; ++n) {
          from_compute(static_cast<Compute<T>>(sums[n]), &out[n]);
        }
      });
    }
  });
  return Status::kOk;
}

}  // namespace

Status indexed_contrast_cpu(const BankContrastOutputs& outputs, const void* positive,
                            const IndexedContrastInputs& inputs, const Executor& executor,
                            Isa isa) {
  if (!supported(inputs.bank.dtype, inputs.bank.bank_dtype)) return Status::kUnsupportedDType;
  if (inputs.bank.B == 0) return Status::kOk;
  return in_dtype(inputs.bank.dtype, [&](auto zero) {
    return forward(outputs, static_cast<const decltype(zero)*>(positive), inputs, executor, isa);
  });
}

Status indexed_contrast_backward_cpu(void* dbank, const void* grad_loss, const double* lse,
                                     const IndexedContrastInputs& inputs, const Executor& executor,
                                     Isa isa) {
  if (!supported(inputs.bank.dtype, inputs.bank.bank_dtype)) return Status::kUnsupportedDType;
  return in_dtype(inputs.bank.dtype, [&](auto zero) {
    using C = decltype(zero);
    return backward(dbank, static_cast<const C*>(grad_loss), lse, inputs, executor, isa);
  });
}

}  // namespace codir_fast
