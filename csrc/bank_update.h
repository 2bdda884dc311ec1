// bank_update: rows of a memory bank are moved towards new keys and brought back to unit length, in
// place:
//   bank[r] = normalise(m * bank[r] + (1 - m) * keys[n]),  r = index[n],  m = 0 for a row that was
//   never filled.
// A row that is named more than once takes its keys one after the other, in the order of n.
#pragma once

#include <cstdint>

#include "common.h"
#include "simd/isa.h"

namespace codir_fast {

// bank (K, D) of bank_dtype; index (N,), each in [0, K); keys (N, D) in float32, or float64 for a
// float64 bank. filled (K,) is set to true for every row written; null means that all rows hold
// something.
Status bank_update_cpu(void* bank, bool* filled, const std::int64_t* index, const void* keys,
                       std::int64_t N, std::int64_t D, DType bank_dtype, double momentum,
                       const Executor& executor, Isa isa = active_isa());

}  // namespace codir_fast
