// indexed_contrast: contrastive loss of B queries, each against its own M rows of a bank, named by
// index:
//   as bank_contrast.h, with A_i = the positions m whose row j = index[i, m] counts for query i.
// A row that is named twice counts twice. Rows are gathered as they are used: nothing of size
// B x M x D exists.
#pragma once

#include <cstdint>

#include "bank_contrast.h"

namespace codir_fast {

struct IndexedContrastInputs {
  BankContrastInputs bank;    // query, rows, masks; its contract is in bank_contrast.h
  const std::int64_t* index;  // (B, M), each in [0, K)
  std::int64_t M;
};

Status indexed_contrast_cpu(const BankContrastOutputs& outputs, const void* positive,
                            const IndexedContrastInputs& inputs, const Executor& executor,
                            Isa isa = active_isa());

// dbank (K, D) of bank_dtype, every element written; sums over repeated rows in a fixed order.
Status indexed_contrast_backward_cpu(void* dbank, const void* grad_loss, const double* lse,
                                     const IndexedContrastInputs& inputs, const Executor& executor,
                                     Isa isa = active_isa());

}  // namespace codir_fast
