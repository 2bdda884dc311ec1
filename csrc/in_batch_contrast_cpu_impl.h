// What in_batch_contrast_cpu.cpp (threads, memory, combination) asks of
// in_batch_contrast_cpu_impl.cpp, which is compiled once per instruction set. Plain data and
// declarations only: code here would be shared between instruction sets.
#pragma once

#include <cstdint>

#include "bank_contrast_cpu_impl.h"
#include "simd/kernels_by_isa.h"

namespace codir_fast {

// What a task reads beyond the rows that it has: arrays that are indexed by row hold this many more
// numbers.
constexpr std::int64_t kRowsBeyond = 16;

constexpr std::int64_t kRowsPerRun = 1008;  // a multiple of the rows of any block

// For each query of the task's tiles, and each of its rows, the sum of e^{s - shift} over what the
// other side of the task has of allowed ones; where there is none, shift -inf and total 0.
template <typename C>
struct InBatchSums {
  C* shift;              // [tile][lane], from tile_begin
  double* total;         // likewise
  double* column_shift;  // [row], from row_begin; null unless symmetric
  double* column_total;
};

// lse = high + low, and coefficient = the loss's incoming gradient of a direction. By lane: lse is
// +inf and the coefficient 0 past B. By row: null unless symmetric, zeros past B.
template <typename C>
struct InBatchWeights {
  const C *high, *low, *coefficient;
};

// With W_ij = coefficient_i e^{s_ij - lse_i} (+ that of the other direction), over allowed pairs:
// sum_j W_ij p_j is added to query_sums, [tile][d][lane] from tile_begin, for the task's rows j,
// at most kRowsPerRun, lest the sums stagnate; positive_sums, [row][padded_D] from row_begin,
// become sum_i W_ij q_i over the task's queries. To query_weights, [tile][lane], and
// positive_weights, [row] (null unless symmetric), is added what each direction's own part of W
// sums up to: what the positive's weight lacks of 1, of the weights as they were rounded.
template <typename C>
struct InBatchProducts {
  C *query_sums, *positive_sums;
  double *query_weights, *positive_weights;
  const C* row_query;  // (B, padded_D): q again, padded with 0
  InBatchWeights<C> of_lanes, of_rows;
};

template <typename C>
struct InBatchKernels {
  std::int64_t vector_lanes, max_tile_vectors;
  std::int64_t (*padded_dim)(std::int64_t D);
  std::int64_t (*scratch_size)(std::int64_t lanes, std::int64_t D, bool is_backward);
  void (*scan)(const InBatchSums<C>&, const BankTask<C>&);
  void (*backward)(const InBatchProducts<C>&, const BankTask<C>&);
};

CODIR_FAST_DECLARE_KERNELS(InBatchKernels<float>, kInBatchKernelsFloat)
CODIR_FAST_DECLARE_KERNELS(InBatchKernels<double>, kInBatchKernelsDouble)

}  // namespace codir_fast
