// Compiled once per instruction set, as simd/vec.h wants it.
#include "vec_functions.h"

#include "simd/vec.h"

namespace codir_fast {
namespace CODIR_FAST_ISA_NAMESPACE {
namespace {

template <typename C, typename Function>
void apply(C* out, const C* in, std::int64_t size, const Function& function) {
  for (std::int64_t n = 0; n < size; n += kLanes<C>) store(out + n, function(load<Vec<C>>(in + n)));
}

template <typename C>
void apply_exp(C* out, const C* in, std::int64_t size) {
  apply(out, in, size, [](Vec<C> x) { return exp(x); });
}

template <typename C>
void apply_log1p(C* out, const C* in, std::int64_t size) {
  apply(out, in, size, [](Vec<C> x) { return log1p<C>(x); });
}

}  // namespace

extern const VecFunctions kVecFunctions = {apply_exp<float>, apply_exp<double>, apply_log1p<float>,
                                           apply_log1p<double>};

}  // namespace CODIR_FAST_ISA_NAMESPACE
}  // namespace codir_fast
