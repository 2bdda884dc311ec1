// bank_contrast: contrastive loss of B queries against all K rows of a bank, loss and gradients in
// one pass over the bank. With s_ij = <q_i, b_j> / t over the allowed rows A_i, s_i+ = <q_i, p_i> /
// t and softplus(a) = log(1 + e^a):
//   InfoNCE  lse_i = log(e^{s_i+} + sum_j e^{s_ij}),  loss_i = lse_i - s_i+
//   NCE      lse_i = log Z + log(c + eps),
//            loss_i = softplus(lse_i - s_i+) + sum_j (softplus(s_ij - lse_i) + log(1 + eps / c))
// Nothing of size B x K exists: only partial sums of size B x D per thread group. All memory is the
// caller's, except scratch space that a call allocates and frees. Arrays are dense and row-major.
#pragma once

#include <cstdint>

#include "common.h"
#include "simd/isa.h"

namespace codir_fast {

enum class Objective { kInfoNce, kNce };

constexpr double kNceEps = 1e-7;  // as in the code of Tian et al. 2020

// Null means: not given. Row j of the bank counts as bank_scale[j] * bank[j]. It is a negative of
// query i when valid[j], bank_labels[j] != labels[i] and j != exclude_index[i]; the contents of a
// row that is not valid are never used.
struct BankContrastInputs {
  const void* query;       // (B, D) of dtype
  const void* bank;        // (K, D) of bank_dtype
  const void* bank_scale;  // (K,) of dtype
  const std::int64_t* labels;
  const std::int64_t* bank_labels;
  const std::int64_t* exclude_index;
  const bool* valid;
  std::int64_t B, K, D;
  DType dtype;       // float32 or float64: what arithmetic runs in
  DType bank_dtype;  // any
  double inv_temperature;
  Objective objective;
  double log_partition;  // NCE: log Z
  double noise_ratio;    // NCE: c > 0, noise samples per query over the number of examples
};

// Per query: loss, lse and d loss / d(1/t), (B,); d loss / d query and d loss / d positive, (B, D).
// All of dtype but lse, which is double: e^{s - lse} of a logit s in float must not be off by e to
// the rounding of a large lse.
struct BankContrastOutputs {
  void* loss;
  double* lse;
  void* dquery;
  void* dpositive;
  void* dinv_temperature;
};

// An empty A_i gives loss 0 and zero gradients with InfoNCE, the positive's term alone with NCE.
// Results depend on the number of threads, not on their timing.
Status bank_contrast_cpu(const BankContrastOutputs& outputs, const void* positive,
                         const BankContrastInputs& inputs, const Executor& executor,
                         Isa isa = active_isa());

// dbank (K, D) of bank_dtype: dbank_j = bank_scale_j * sum_i grad_loss_i * e^{s_ij - lse_i} * q_i /
// t over the i with j in A_i. grad_loss (B,) of dtype, lse (B,) as bank_contrast_cpu gave it.
Status bank_contrast_backward_cpu(void* dbank, const void* grad_loss, const double* lse,
                                  const BankContrastInputs& inputs, const Executor& executor,
                                  Isa isa = active_isa());

}  // namespace codir_fast
