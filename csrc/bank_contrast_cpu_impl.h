// What bank_contrast_cpu.cpp (threads, memory, combination) asks of bank_contrast_cpu_impl.cpp,
// which is compiled once per instruction set. Plain data and declarations only: code here would be
// shared between instruction sets.
#pragma once

#include <cstdint>

#include "bank_contrast.h"
#include "simd/kernels_by_isa.h"

namespace codir_fast {

// Queries are packed into tiles of `lanes` queries, each D-major: packed[(tile * D + d) * lanes +
// lane]; lanes past B hold 0. All per-query arrays of a task are in this order too: [tile * lanes +
// lane].
template <typename C>
struct BankTask {
  const C* packed_query;
  const BankContrastInputs* inputs;
  std::int64_t lanes;
  std::int64_t tile_begin, tile_end;
  std::int64_t row_begin, row_end;
  C* scratch;  // scratch_size elements, 64-byte aligned
};

// For every query of the task's tiles, over the allowed rows of its range, the sums of the terms
// and of the weighted rows that objective.h names: for InfoNCE e^{s - shift} and e^{s - shift} b.
// Indexed from tile_begin. The caller gives the shift to begin with, and it stays where no row is
// allowed.
template <typename C>
struct BankSums {
  C* shift;          // [tile][lane], in and out
  double* total;     // [tile][lane]
  C* weighted_rows;  // [tile][d][lane]
};

// Gradients to the task's bank rows, from all tiles. row_query (tiles * lanes, padded_D) holds q_i
// again, row-major with columns padded with 0; coefficient[i] = grad_loss_i / t, 0 past B;
// lse_high[i] + lse_low[i] = lse_i, +inf past B.
template <typename C>
struct BankGradient {
  void* dbank;
  const C* row_query;
  const C* coefficient;
  const C* lse_high;
  const C* lse_low;
};

template <typename C>
struct BankKernels {
  std::int64_t vector_lanes;
  std::int64_t max_tile_vectors;
  std::int64_t (*padded_dim)(std::int64_t D);
  std::int64_t (*scratch_size)(std::int64_t lanes, std::int64_t D, std::int64_t num_tiles);
  void (*scan)(const BankSums<C>&, const BankTask<C>&);
  void (*backward)(const BankGradient<C>&, const BankTask<C>&);
};

CODIR_FAST_DECLARE_KERNELS(BankKernels<float>, kBankKernelsFloat)
CODIR_FAST_DECLARE_KERNELS(BankKernels<double>, kBankKernelsDouble)

}  // namespace codir_fast
