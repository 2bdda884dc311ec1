// in_batch_contrast: InfoNCE of B queries whose negatives are one another's positive keys. With
// s_ij = <q_i, p_j> / t, over the j other than i (and labels[j] != labels[i], where labels are):
//   lse_i  = log(e^{s_ii} + sum_j e^{s_ij}),   loss_i = lse_i - s_ii
// and, if symmetric, the other way round too, over the i of column j:
//   lse'_j = log(e^{s_jj} + sum_i e^{s_ij}),   loss_i = (lse_i + lse'_i) / 2 - s_ii
// Both directions, and the gradients to query and positive, share each product: 2 B^2 D operations
// forward and 6 B^2 D backward. Nothing of size B x B exists. All memory is the caller's, except
// scratch space that a call allocates and frees. Arrays are dense and row-major.
#pragma once

#include <cstdint>

#include "common.h"
#include "simd/isa.h"

namespace codir_fast {

struct InBatchContrastInputs {
  const void *query, *positive;  // (B, D) of dtype
  const std::int64_t* labels;    // (B,), or null
  std::int64_t B, D;
  DType dtype;  // float32 or float64
  double inv_temperature;
  bool symmetric;
};

// loss (B,) of dtype; lse (1 or 2 directions, B). Without negatives: loss 0. Results depend on the
// number of threads, not on their timing.
Status in_batch_contrast_cpu(void* loss, double* lse, const InBatchContrastInputs& inputs,
                             const Executor& executor, Isa isa = active_isa());

// Of sum_i grad_loss_i * loss_i: (B, D), (B, D) and a number, all of dtype.
struct InBatchGradients {
  void *dquery, *dpositive, *dinv_temperature;
};

// grad_loss (B,) of dtype, lse as in_batch_contrast_cpu gave it.
Status in_batch_contrast_backward_cpu(const InBatchGradients& out, const void* grad_loss,
                                      const double* lse, const InBatchContrastInputs& inputs,
                                      const Executor& executor, Isa isa = active_isa());

}  // namespace codir_fast
