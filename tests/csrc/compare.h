// What tests of kernels share: results against what is expected of them, on each instruction set.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <random>
#include <vector>

#include "check.h"
#include "simd/isa.h"
#include "storage.h"

namespace codir_fast {

template <typename Element>
double value_of(Element element) {
  return static_cast<double>(to_compute(element));
}

template <typename Element>
Element rounded(double value) {
  Element out;
  from_compute(static_cast<Compute<Element>>(value), &out);
  return out;
}

// Random directions.
template <typename Element>
std::vector<Element> unit_rows(std::int64_t rows, std::int64_t D, std::mt19937& random) {
  std::normal_distribution<double> normal;
  std::vector<Element> out(rows * D);
  std::vector<double> row(D);
  for (std::int64_t n = 0; n < rows; ++n) {
    double square = 0;
    for (double& element : row) {
      element = normal(random);
      square += element * element;
    }
    for (std::int64_t d = 0; d < D; ++d)
      out[n * D + d] = rounded<Element>(row[d] / std::sqrt(square));
  }
  return out;
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
