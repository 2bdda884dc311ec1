// The objectives as the kernels see them: what a negative with logit s adds to its query's sum, and
// the weight of its row in the gradients, both functions of the gap s - shift. A kernel takes one
// of them as a compile-time argument. Include only from files that are compiled once per
// instruction set.
#pragma once

#include <cmath>
#include <limits>

#include "bank_contrast.h"
#include "simd/vec.h"

namespace codir_fast {
namespace {

template <typename C>
struct Terms {
  Vec<C> term, weight;
};

// The sum of e^{s - shift}. The shift follows the maximum of the logits, lest the sum overflows.
template <typename C>
struct InfoNce {
  static constexpr bool kFollowsMaximum = true;

  Terms<C> operator()(Vec<C> gap) const {
    const Vec<C> weight = exp(gap);
    return {weight, weight};
  }
};

// The sum of softplus(s - shift) + log(1 + eps / c), whose derivative is a sigmoid. The shift is
// log Z + log(c + eps) and stays; a logit of -inf, which no negative has, adds nothing. Only e to
// the minus |s - shift| is taken: nothing overflows, and what is tiny keeps its digits.
template <typename C>
struct Nce {
  static constexpr bool kFollowsMaximum = false;
  C eps_term;

  explicit Nce(const BankContrastInputs& in)
      : eps_term(static_cast<C>(std::log1p(kNceEps / in.noise_ratio))) {}

  Terms<C> operator()(Vec<C> gap) const {
    using V = Vec<C>;
    const V e = exp(gap > C{0} ? -gap : gap);
    const V linear = gap > C{0} ? gap : V{};
    const V extra = gap > -std::numeric_limits<C>::infinity() ? splat(eps_term) : V{};
    return {linear + (log1p<C>(e) + extra), (gap > C{0} ? splat(C{1}) : e) / (e + C{1})};
  }
};

// Calls run(objective) with the one that the inputs name.
template <typename C, typename Run>
void with_objective(const BankContrastInputs& in, const Run& run) {
  if (in.objective == Objective::kNce) return run(Nce<C>(in));
  run(InfoNce<C>());
}

}  // namespace
}  // namespace codir_fast
