// Rows brought to unit length, and gradients brought back from there: what a contrastive operator
// does to queries and positive keys before and after its pass when it is asked to normalise.
#pragma once

#include <cstdint>

#include "common.h"
#include "simd/isa.h"

namespace codir_fast {

constexpr double kMinNorm = 1e-12;  // as in torch.nn.functional.normalize

// unit (N, D) of dtype (float32 or float64) <- rows (N, D) of rows_dtype / max(|row|, kMinNorm);
// inverse_norm (N,) <- 1 / max(|row|, kMinNorm). With inverse_norm null, rows are only converted.
Status unit_rows_cpu(void* unit, double* inverse_norm, const void* rows, std::int64_t N,
                     std::int64_t D, DType rows_dtype, DType dtype, const Executor& executor,
                     Isa isa = active_isa());

// gradient (N, D) of dtype, with respect to the unit rows, becomes the one with respect to the
// rows: (g - u <u, g>) / |row|, or g / kMinNorm where the row is shorter than that.
Status unit_rows_backward_cpu(void* gradient, const void* unit, const double* inverse_norm,
                              std::int64_t N, std::int64_t D, DType dtype, const Executor& executor,
                              Isa isa = active_isa());

}  // namespace codir_fast
