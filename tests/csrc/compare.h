// What tests of kernels share: results against what is expected of them, on each instruction set.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <vector>

#include "check.h"
#include "simd/isa.h"
#include "storage.h"

namespace codir_fast {

template <typename Element>
double value_of(Element element) {
  return static_cast<double>(to_compute(element));
}

// The largest error within tolerance times the largest value expected, plus `floor`.
template <typename Element>
void check_all(const std::vector<Element>& got, const std::vector<double>& expected,
               double tolerance, double floor, const char* what) {
  CHECK(got.size() == expected.size());
  double scale = 0, error = 0;
  for (std::size_t n = 0; n < expected.size(); ++n) {
    scale = std::max(scale, std::abs(expected[n]));
    const double difference = std::abs(value_of(got[n]) - expected[n]);
    error = difference <= error ? error : difference;  // NaN sticks
    if (std::isnan(difference)) error = std::numeric_limits<double>::infinity();
  }
  check::close(error, 0, tolerance * scale + floor, what, __FILE__, __LINE__);
}

inline std::vector<Isa> isas() {
  std::vector<Isa> out;
  for (const Isa isa : {Isa::kBaseline, Isa::kAvx2, Isa::kAvx512}) {
    if (isa <= widest_isa()) out.push_back(isa);
  }
  return out;
}

}  // namespace codir_fast
