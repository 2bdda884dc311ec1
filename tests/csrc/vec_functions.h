// The vector functions of simd/vec.h over arrays, one table per instruction set: sizes are
// multiples of 16.
#pragma once

#include <cstdint>

namespace codir_fast {

struct VecFunctions {
  void (*exp_float)(float* out, const float* in, std::int64_t size);
  void (*exp_double)(double* out, const double* in, std::int64_t size);
  void (*log1p_float)(float* out, const float* in, std::int64_t size);
  void (*log1p_double)(double* out, const double* in, std::int64_t size);
};

namespace baseline {
extern const VecFunctions kVecFunctions;
}

#if CODIR_FAST_X86_DISPATCH
namespace avx2 {
extern const VecFunctions kVecFunctions;
}

namespace avx512 {
extern const VecFunctions kVecFunctions;
}
#endif

}  // namespace codir_fast
