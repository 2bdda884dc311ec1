// What indexed_contrast_cpu.cpp asks of indexed_contrast_cpu_impl.cpp, which is compiled once per
// instruction set. Plain data and declarations only.
#pragma once

#include <cstdint>

#include "indexed_contrast.h"

namespace codir_fast {

// Sums over the positions [begin, end) of query i, as BankSums: of the terms, and of the weighted
// rows (D,).
template <typename C>
struct IndexedSums {
  C* shift;  // in and out
  double* total;
  C* weighted_rows;
};

template <typename C>
struct IndexedKernels {
  std::int64_t (*scratch_size)(std::int64_t D);
  void (*scan)(const IndexedSums<C>&, const IndexedContrastInputs&, std::int64_t i,
               std::int64_t begin, std::int64_t end, C* scratch);
  // coefficient (M,) <- bank_scale_j * grad * weight / t for query i, with lse for shift; 0 where a
  // position does not count.
  void (*coefficients)(C* coefficient, const IndexedContrastInputs&, std::int64_t i, C grad,
                       C lse_high, C lse_low, C* scratch);
};

namespace baseline {
extern const IndexedKernels<float> kIndexedKernelsFloat;
extern const IndexedKernels<double> kIndexedKernelsDouble;
}  // namespace baseline

#if CODIR_FAST_X86_DISPATCH
namespace avx2 {
extern const IndexedKernels<float> kIndexedKernelsFloat;
extern const IndexedKernels<double> kIndexedKernelsDouble;
}  // namespace avx2

namespace avx512 {
extern const IndexedKernels<float> kIndexedKernelsFloat;
extern const IndexedKernels<double> kIndexedKernelsDouble;
}  // namespace avx512
#endif

}  // namespace codir_fast
