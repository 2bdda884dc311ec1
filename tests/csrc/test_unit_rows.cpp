// unit_rows and the gradient through it against their definitions in double, one thread and
// several.
#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "check.h"
#include "executors.h"
#include "storage.h"
#include "unit_rows.h"

using namespace codir_fast;

namespace {

constexpr std::int64_t N = 7;

template <typename T, typename C>
void test_against_definition(DType rows_dtype, DType dtype, double tolerance, std::int64_t D,
                             Isa isa) {
  std::mt19937 random(3);
  std::normal_distribution<double> distribution;
  std::vector<T> rows(N * D);
  std::vector<C> gradient(N * D), unit(N * D, std::numeric_limits<C>::quiet_NaN());
  for (std::int64_t n = 0; n < N * D; ++n) {
    // Row 1 is zero, row 2 shorter than kMinNorm where the type allows it.
    const double scale = n / D == 1 ? 0 : n / D == 2 ? 1e-20 : 3;
    from_compute(static_cast<Compute<T>>(scale * distribution(random)), &rows[n]);
    gradient[n] = static_cast<C>(distribution(random));
  }
  const std::vector<C> before = gradient;
  std::vector<double> inverse_norm(N);
  CHECK(unit_rows_cpu(unit.data(), inverse_norm.data(), rows.data(), N, D, rows_dtype, dtype,
                      threads(3), isa) == Status::kOk);
  CHECK(unit_rows_backward_cpu(gradient.data(), unit.data(), inverse_norm.data(), N, D, dtype,
                               threads(3), isa) == Status::kOk);
  for (std::int64_t n = 0; n < N; ++n) {
    const auto row = [&](std::int64_t d) {
      return static_cast<double>(to_compute(rows[n * D + d]));
    };
    double square = 0, along = 0;
    for (std::int64_t d = 0; d < D; ++d) square += row(d) * row(d);
    const double norm = std::sqrt(square), divisor = std::fmax(norm, 1e-12);
    for (std::int64_t d = 0; d < D; ++d) along += before[n * D + d] * row(d) / divisor;
    CHECK_CLOSE(inverse_norm[n] * divisor, 1, tolerance);
    for (std::int64_t d = 0; d < D; ++d) {
      CHECK_CLOSE(unit[n * D + d], row(d) / divisor, tolerance);
      const double projected = before[n * D + d] - (norm > 1e-12 ? along * row(d) / divisor : 0.0);
      CHECK_CLOSE(gradient[n * D + d] * divisor, projected, 10 * tolerance);
    }
  }
  CHECK(unit_rows_cpu(unit.data(), nullptr, rows.data(), N, D, rows_dtype, dtype, threads(3),
                      isa) == Status::kOk);
  for (std::int64_t n = 0; n < N * D; ++n)
    CHECK(unit[n] == static_cast<C>(to_compute(rows[n])));  // converted alone
  from_compute(std::numeric_limits<Compute<T>>::quiet_NaN(), &rows[0]);
  CHECK(unit_rows_cpu(unit.data(), inverse_norm.data(), rows.data(), N, D, rows_dtype, dtype,
                      threads(3), isa) == Status::kOk);
  CHECK(std::isnan(inverse_norm[0]) && !std::isnan(inverse_norm[3]));
  for (std::int64_t d = 0; d < D; ++d) CHECK(std::isnan(unit[d]) && !std::isnan(unit[3 * D + d]));
}

}  // namespace

int main() {
  for (int n = 0; n <= static_cast<int>(widest_isa()); ++n) {
    const Isa isa = Isa(n);
    for (const std::int64_t D : {1, 5, 64, 131, 5000}) {  // the last: a part to each thread
      test_against_definition<float, float>(DType::kFloat32, DType::kFloat32, 1e-6, D, isa);
      test_against_definition<double, double>(DType::kFloat64, DType::kFloat64, 1e-14, D, isa);
      test_against_definition<BFloat16, float>(DType::kBFloat16, DType::kFloat32, 1e-6, D, isa);
      test_against_definition<Float16, float>(DType::kFloat16, DType::kFloat32, 1e-6, D, isa);
    }
  }
  return check::exit_code();
}
