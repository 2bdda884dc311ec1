// indexed_contrast on the CPU: takes the index as it is or in the order of the bank, spreads it
// over threads, and ends each query as bank_contrast does. The pass itself is
// indexed_contrast_cpu_impl.cpp.
#include <algorithm>
#include <type_traits>

#include "contrast_cpu.h"
#include "indexed_contrast.h"
#include "indexed_contrast_cpu_impl.h"
#include "indexed_contrast_order.h"
#include "storage.h"

namespace codir_fast {
namespace {

template <typename C>
const IndexedKernels<C>& kernels(Isa isa) {
  if constexpr (std::is_same_v<C, float>)
    return CODIR_FAST_KERNELS(kIndexedKernelsFloat, isa);
  else
    return CODIR_FAST_KERNELS(kIndexedKernelsDouble, isa);
}

// Sums of B queries per range, to which the kernels add.
template <typename C>
struct RunningSums {
  PartialSums<C> partial;
  Buffer<C> run;
  Buffer<std::int64_t> rows_in_run;
  C first;
  std::int64_t ranges, B, D;

  RunningSums(std::int64_t ranges, std::int64_t B, const BankContrastInputs& in)
      : partial(ranges, {1, B}, in),
        run(allocate<C>(ranges * B * in.D)),
        rows_in_run(allocate<std::int64_t>(ranges * B)),
        first(static_cast<C>(first_shift(in))),
        ranges(ranges),
        B(B),
        D(in.D) {}

  bool allocated() const { return partial.allocated() && run && rows_in_run; }

  IndexedSums<C> operator()(std::int64_t range, std::int64_t i) const {
    const std::int64_t n = range * B + i;
    return {partial.shift.get() + n, partial.total.get() + n, partial.weighted_rows.get() + n * D,
            run.get() + n * D, rows_in_run.get() + n};
  }

  void begin() const {
    const std::int64_t size = ranges * B;
    std::fill_n(partial.shift.get(), size, first);
    std::fill_n(partial.total.get(), size, 0.0);
    std::fill_n(rows_in_run.get(), size, std::int64_t{0});
    std::fill_n(partial.weighted_rows.get(), size * D, C{0});
    std::fill_n(run.get(), size * D, C{0});
  }

  void end(std::int64_t range, std::int64_t i) const {
    const IndexedSums<C> sums = (*this)(range, i);
    for (std::int64_t d = 0; d < D; ++d) sums.weighted_rows[d] += sums.run[d];
  }
};

template <typename C>
void finish_queries(const BankContrastOutputs& outputs, const C* positive,
                    const BankContrastInputs& in, const RunningSums<C>& sums, std::int64_t ranges,
                    const Range& queries, const Executor& executor, double* weighted_rows,
                    const RowKernels<C>& kernel) {
  const std::int64_t threads = std::max(executor.num_threads, 1);
  const C* query = static_cast<const C*>(in.query);
  executor.parallel_for(threads, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t thread = begin; thread < end; ++thread) {
      double* weighted_row = weighted_rows + thread * in.D;
      const Range local = share(queries.end - queries.begin, threads, thread);
      for (std::int64_t n = local.begin; n < local.end; ++n) {
        const std::int64_t i = queries.begin + n;
        for (std::int64_t range = 0; range < ranges; ++range) sums.end(range, n);
        const QuerySums total =
            add_ranges(weighted_row, sums.partial, {1, sums.B}, in.D, ranges, n, kernel);
        finish_query(outputs, query + i * in.D, positive + i * in.D, weighted_row, total, i, in,
                     kernel);
      }
    }
  });
}

// Query by query, rows as the list names them.
template <typename C>
Status forward_by_lists(const BankContrastOutputs& outputs, const C* positive,
                        const IndexedContrastInputs& inputs, const Executor& executor,
                        const IndexedKernels<C>& kernel, const RowKernels<C>& of_rows) {
  const BankContrastInputs& in = inputs.bank;
  const std::int64_t threads = std::max(executor.num_threads, 1);
  const std::int64_t ranges = ceil_div(threads, std::min(in.B, threads));
  const std::int64_t scratch_size = kernel.scratch_size(in.D);

  const Buffer<C> scratch = allocate<C>(threads * scratch_size);
  const Buffer<double> weighted_rows = allocate<double>(threads * in.D);
  const RunningSums<C> sums(ranges, in.B, in);
  if (!scratch || !weighted_rows || !sums.allocated()) return Status::kOutOfMemory;
  sums.begin();

  executor.parallel_for(threads, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t thread = begin; thread < end; ++thread) {
      const Range work = share(ranges * in.B, threads, thread);
      for (std::int64_t n = work.begin; n < work.end; ++n) {
        const std::int64_t range = n / in.B, i = n % in.B;
        const Range positions = share(inputs.M, ranges, range);
        kernel.scan_list(sums(range, i), inputs, i, inputs.index + i * inputs.M + positions.begin,
                         positions.end - positions.begin, scratch.get() + thread * scratch_size);
      }
    }
  });
  finish_queries(outputs, positive, in, sums, ranges, {0, in.B}, executor, weighted_rows.get(),
                 of_rows);
  return Status::kOk;
}

// Block by block, as far as rows are named more than once. Threads share a part's pairs of a query
// and a row in equal numbers, wherever in the bank these are.
template <typename C>
Status forward_by_blocks(const BankContrastOutputs& outputs, const C* positive,
                         const IndexedContrastInputs& inputs, const Executor& executor,
                         const IndexedKernels<C>& kernel, const RowKernels<C>& of_rows,
                         const Parts& parts) {
  const BankContrastInputs& in = inputs.bank;
  const std::int64_t threads = std::max(executor.num_threads, 1);
  const std::int64_t scratch_size = kernel.scratch_size(in.D);
  const Buffer<C> scratch = allocate<C>(threads * scratch_size);
  const Buffer<double> weighted_rows = allocate<double>(threads * in.D);
  BlockOrder order(parts, in);
  const RunningSums<C> sums(threads, parts.queries, in);
  if (!scratch || !weighted_rows || !order.allocated() || !sums.allocated()) {
    return Status::kOutOfMemory;
  }

  for (std::int64_t first = 0; first < in.B; first += parts.queries) {
    const Range queries{first, std::min(first + parts.queries, in.B)};
    sums.begin();
    for (std::int64_t m = 0; m < inputs.M; m += parts.positions) {
      const Range positions{m, std::min(m + parts.positions, inputs.M)};
      order.sort(inputs, queries, positions, executor);
      executor.parallel_for(threads, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t thread = begin; thread < end; ++thread) {
          const Range pairs = share(order.num_pairs(), threads, thread);
          std::int64_t at = 0;
          for (std::int64_t block = 0; block < order.blocks; ++block) {
            const std::int64_t size = order.size(block);
            const Range own{std::max(pairs.begin - at, std::int64_t{0}),
                            std::min(pairs.end - at, size)};
            at += size;
            if (own.begin >= own.end) continue;
            order.visit(block, own, [&](std::int64_t n, const BlockRows& rows, Upcoming& upcoming) {
              kernel.scan_block(sums(thread, n), inputs, queries.begin + n, rows, upcoming,
                                scratch.get() + thread * scratch_size);
            });
          }
        }
      });
    }
    finish_queries(outputs, positive, in, sums, threads, queries, executor, weighted_rows.get(),
                   of_rows);
  }
  return Status::kOk;
}

template <typename C>
Status forward(const BankContrastOutputs& outputs, const C* positive,
               const IndexedContrastInputs& inputs, const Executor& executor, Isa isa) {
  const BankContrastInputs& in = inputs.bank;
  const IndexedKernels<C>& kernel = kernels<C>(isa);
  const Parts parts = Parts::cut(inputs);
  const RowKernels<C>& of_rows = row_kernels<C>(isa);
  return parts.pay(in)
             ? forward_by_blocks(outputs, positive, inputs, executor, kernel, of_rows, parts)
             : forward_by_lists(outputs, positive, inputs, executor, kernel, of_rows);
}

void store_gradient(void* dbank, const double* gradient, const Range& rows,
                    const BankContrastInputs& in) {
  with_storage(in.bank_dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    T* out = static_cast<T*>(dbank) + rows.begin * in.D;
    for (std::int64_t n = 0; n < (rows.end - rows.begin) * in.D; ++n) {
      from_compute(static_cast<Compute<T>>(gradient[n]), &out[n]);
    }
  });
}

// Block by block, each by one thread; a block's gradient is summed in double, in the order of
// queries.
template <typename C>
Status backward(void* dbank, const C* grad_loss, const double* lse,
                const IndexedContrastInputs& inputs, const Executor& executor, Isa isa) {
  const BankContrastInputs& in = inputs.bank;
  const IndexedKernels<C>& kernel = kernels<C>(isa);
  const std::int64_t threads = std::max(executor.num_threads, 1);
  const std::int64_t scratch_size = kernel.scratch_size(in.D);
  BlockOrder order(Parts::whole(inputs), in);
  const std::int64_t gradient_size = order.block_rows() * in.D;
  const Buffer<C> scratch = allocate<C>(threads * scratch_size);
  const Buffer<double> gradients = allocate<double>(threads * gradient_size);
  const Buffer<std::int64_t> sizes = allocate<std::int64_t>(order.blocks);
  if (!scratch || !gradients || !sizes || !order.allocated()) return Status::kOutOfMemory;

  order.sort(inputs, {0, in.B}, {0, inputs.M}, executor);
  order.sizes(sizes.get());
  // What a block costs: its pairs, and its rows, which are written whether named or not.
  const std::int64_t cost = order.num_pairs() + in.K;
  executor.parallel_for(threads, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t thread = begin; thread < end; ++thread) {
      const Range own = share(cost, threads, thread);
      double* gradient = gradients.get() + thread * gradient_size;
      std::int64_t at = 0;
      for (std::int64_t block = 0; block < order.blocks; ++block) {
        const Range rows = order.rows(block);
        const bool is_own = at >= own.begin && at < own.end;
        at += sizes[block] + rows.end - rows.begin;
        if (!is_own) continue;
        std::fill_n(gradient, (rows.end - rows.begin) * in.D, 0.0);
        order.visit(block, {0, sizes[block]},
                    [&](std::int64_t i, const BlockRows& named, Upcoming& upcoming) {
                      const SplitLse<C> split(lse[i]);
                      kernel.add_gradient(gradient, inputs, i, named, upcoming,
                                          {grad_loss[i], split.high, split.low},
                                          scratch.get() + thread * scratch_size);
                    });
        store_gradient(dbank, gradient, rows, in);
      }
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
