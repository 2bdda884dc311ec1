// The error bounds that simd/vec.h states, over millions of points of each type, on every
// instruction set of this CPU; and what the functions make of limits and NaN.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <type_traits>
#include <vector>

#include "check.h"
#include "simd/isa.h"
#include "vec_functions.h"

using namespace codir_fast;

namespace {

constexpr std::int64_t kPoints = 1 << 21;

template <typename C>
using Function = void (*)(C* out, const C* in, std::int64_t size);

const VecFunctions& functions(Isa isa) {
#if CODIR_FAST_X86_DISPATCH
  if (isa == Isa::kAvx512) return avx512::kVecFunctions;
  if (isa == Isa::kAvx2) return avx2::kVecFunctions;
#endif
  static_cast<void>(isa);
  return baseline::kVecFunctions;
}

template <typename C>
std::vector<C> uniform(double low, double high) {
  std::mt19937_64 random(3);
  std::uniform_real_distribution<double> distribution(low, high);
  std::vector<C> out(kPoints);
  for (C& x : out) x = static_cast<C>(distribution(random));
  return out;
}

// The largest error in units of the last place of the exact value, which float's judge finds in
// double and double's in long double.
template <typename C, typename Exact>
double largest_error(Function<C> function, const std::vector<C>& in, const Exact& exact) {
  using Real = std::conditional_t<std::is_same_v<C, float>, double, long double>;
  std::vector<C> out(in.size());
  function(out.data(), in.data(), static_cast<std::int64_t>(in.size()));
  double largest = 0;
  for (std::size_t n = 0; n < in.size(); ++n) {
    const Real expected = exact(static_cast<Real>(in[n]));
    const C magnitude = std::abs(static_cast<C>(expected));
    const C ulp = std::nextafter(magnitude, std::numeric_limits<C>::infinity()) - magnitude;
    largest = std::max(largest, static_cast<double>(std::abs(out[n] - expected) / ulp));
  }
  return largest;
}

template <typename C>
void test_errors(Function<C> exp_function, Function<C> log1p_function, Isa isa) {
  const auto exact_exp = [](auto x) { return std::exp(x); };
  const auto exact_log1p = [](auto x) { return std::log1p(x); };
  const double lowest = std::is_same_v<C, float> ? -87.3 : -708.3;
  const double highest = std::is_same_v<C, float> ? 88 : 709;
  std::vector<C> small = uniform<C>(lowest, 0);
  for (C& x : small) x = std::exp(x);  // all magnitudes down to the smallest normal number

  const double errors[] = {
      largest_error(exp_function, uniform<C>(lowest, highest), exact_exp),
      largest_error(exp_function, uniform<C>(-1, 1), exact_exp),
      largest_error(log1p_function, uniform<C>(0, 1), exact_log1p),
      largest_error(log1p_function, small, exact_log1p),
  };
  std::printf("%s, %zu bytes: exp within %.2f and %.2f ulp, log1p within %.2f and %.2f\n",
              isa_name(isa), sizeof(C), errors[0], errors[1], errors[2], errors[3]);
  for (const double error : errors) CHECK(error <= 2);
}

template <typename C>
void test_limits(Function<C> exp_function, Function<C> log1p_function) {
  const C infinity = std::numeric_limits<C>::infinity(), nan = std::numeric_limits<C>::quiet_NaN();
  C in[16] = {0, -infinity, static_cast<C>(-1e11), nan}, out[16];
  exp_function(out, in, 16);
  CHECK(out[0] == 1 && out[1] == 0 && out[2] == 0 && std::isnan(out[3]));

  in[1] = 1, in[2] = std::numeric_limits<C>::min();
  log1p_function(out, in, 16);
  CHECK(out[0] == 0 && out[2] == in[2] && std::isnan(out[3]));
  CHECK_CLOSE(out[1], std::log(2.0), std::numeric_limits<C>::epsilon());
}

}  // namespace

int main() {
  for (const Isa isa : {Isa::kBaseline, Isa::kAvx2, Isa::kAvx512}) {
    if (isa > widest_isa()) continue;
    const VecFunctions& of = functions(isa);
    test_errors(of.exp_float, of.log1p_float, isa);
    test_errors(of.exp_double, of.log1p_double, isa);
    test_limits(of.exp_float, of.log1p_float);
    test_limits(of.exp_double, of.log1p_double);
  }
  return check::exit_code();
}
