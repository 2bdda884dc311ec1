// indexed_contrast and its backward against the definition in double: every instruction set of this
// CPU, odd sizes, repeated and masked rows, storage types, any number of threads. Outputs start as
// NaN, and so does what lies in rows that are not valid.
#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "check.h"
#include "executors.h"
#include "indexed_contrast.h"
#include "storage.h"

using namespace codir_fast;

namespace {

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

struct Sizes {
  std::int64_t B, K, M, D;
};

template <typename Element>
std::vector<Element> unit_rows(std::int64_t rows, std::int64_t D, std::mt19937& random) {
  std::normal_distribution<double> distribution;
  std::vector<Element> out(rows * D);
  std::vector<double> row(D);
  for (std::int64_t n = 0; n < rows; ++n) {
    double square = 0;
    for (double& value : row) {
      value = distribution(random);
      square += value * value;
    }
    for (std::int64_t d = 0; d < D; ++d) {
      from_compute(static_cast<Compute<Element>>(row[d] / std::sqrt(square)), &out[n * D + d]);
    }
  }
  return out;
}

template <typename C, typename T>
void test_against_definition(Sizes size, DType dtype, DType bank_dtype, double tolerance,
                             double out_tolerance, bool masks, Isa isa, int num_threads) {
  const auto [B, K, M, D] = size;
  std::mt19937 random(static_cast<unsigned>(B * 31 + M));
  const double inv_temperature = 4;
  const std::vector<C> query = unit_rows<C>(B, D, random), positive = unit_rows<C>(B, D, random);
  std::vector<T> bank = unit_rows<T>(K, D, random);
  std::vector<std::int64_t> index(B * M), labels(B), bank_labels(K), exclude(B);
  std::vector<char> valid(K);
  std::vector<C> scale(K), grad(B);
  for (std::int64_t& j : index) j = static_cast<std::int64_t>(random() % K);
  for (std::int64_t& label : labels) label = static_cast<std::int64_t>(random() % 3) << 40;
  for (std::int64_t& label : bank_labels) label = static_cast<std::int64_t>(random() % 3) << 40;
  for (std::int64_t& j : exclude) j = static_cast<std::int64_t>(random() % (K + 1)) - 1;
  for (char& flag : valid) flag = random() % 4 != 0;
  for (C& value : scale) value = static_cast<C>(0.5 + (random() % 100) / 100.0);
  for (C& value : grad) value = static_cast<C>(0.5 + (random() % 100) / 100.0);
  for (std::int64_t j = 0; masks && j < K; ++j) {
    for (std::int64_t d = 0; !valid[j] && d < D; ++d) {
      from_compute(static_cast<Compute<T>>(kNan), &bank[j * D + d]);
    }
  }

  static_assert(sizeof(bool) == sizeof(char), "flags are bytes");
  IndexedContrastInputs inputs{};
  inputs.bank.query = query.data();
  inputs.bank.bank = bank.data();
  if (masks) {
    inputs.bank.bank_scale = scale.data();
    inputs.bank.labels = labels.data();
    inputs.bank.bank_labels = bank_labels.data();
    inputs.bank.exclude_index = exclude.data();
    inputs.bank.valid = reinterpret_cast<const bool*>(valid.data());
  }
  inputs.bank.B = B;
  inputs.bank.K = K;
  inputs.bank.D = D;
  inputs.bank.dtype = dtype;
  inputs.bank.bank_dtype = bank_dtype;
  inputs.bank.inv_temperature = inv_temperature;
  inputs.index = index.data();
  inputs.M = M;

  std::vector<C> loss(B, kNan), lse(B, kNan), dinv(B, kNan);
  std::vector<C> dquery(B * D, kNan), dpositive(B * D, kNan);
  std::vector<T> dbank(K * D);
  for (T& value : dbank) from_compute(static_cast<Compute<T>>(kNan), &value);
  const Executor executor = threads(num_threads);
  CHECK(
      indexed_contrast_cpu({loss.data(), lse.data(), dquery.data(), dpositive.data(), dinv.data()},
                           positive.data(), inputs, executor, isa) == Status::kOk);
  CHECK(indexed_contrast_backward_cpu(dbank.data(), grad.data(), lse.data(), inputs, executor,
                                      isa) == Status::kOk);

  std::vector<double> expected_dbank(K * D, 0.0);
  for (std::int64_t i = 0; i < B; ++i) {
    const auto row = [&](std::int64_t j, std::int64_t d) {
      return static_cast<double>(to_compute(bank[j * D + d])) *
             (masks ? static_cast<double>(scale[j]) : 1.0);
    };
    double positive_logit = 0;
    for (std::int64_t d = 0; d < D; ++d) {
      positive_logit += static_cast<double>(query[i * D + d]) * positive[i * D + d];
    }
    std::vector<std::int64_t> allowed;
    for (std::int64_t m = 0; m < M; ++m) {
      const std::int64_t j = index[i * M + m];
      if (!masks || (valid[j] && labels[i] != bank_labels[j] && exclude[i] != j)) {
        allowed.push_back(j);
      }
    }
    std::vector<double> dot(allowed.size(), 0.0);
    double total = std::exp(inv_temperature * positive_logit);
    for (std::size_t n = 0; n < allowed.size(); ++n) {
      for (std::int64_t d = 0; d < D; ++d) dot[n] += query[i * D + d] * row(allowed[n], d);
      total += std::exp(inv_temperature * dot[n]);
    }
    const double positive_share = std::exp(inv_temperature * positive_logit) / total;
    double expected_dinv = (positive_share - 1) * positive_logit;
    std::vector<double> expected_dquery(D);
    for (std::int64_t d = 0; d < D; ++d) {
      expected_dquery[d] = (positive_share - 1) * positive[i * D + d];
    }
    for (std::size_t n = 0; n < allowed.size(); ++n) {
      const std::int64_t j = allowed[n];
      const double share = std::exp(inv_temperature * dot[n]) / total;
      expected_dinv += share * dot[n];
      for (std::int64_t d = 0; d < D; ++d) {
        expected_dquery[d] += share * row(j, d);
        expected_dbank[j * D + d] += (masks ? scale[j] : C{1}) * grad[i] * share * query[i * D + d];
      }
    }
    CHECK_CLOSE(loss[i], std::log(total) - inv_temperature * positive_logit, tolerance);
    CHECK_CLOSE(lse[i], std::log(total), tolerance);
    CHECK_CLOSE(dinv[i], expected_dinv, tolerance);
    for (std::int64_t d = 0; d < D; ++d) {
      CHECK_CLOSE(dquery[i * D + d], inv_temperature * expected_dquery[d], tolerance);
      CHECK_CLOSE(dpositive[i * D + d], inv_temperature * (positive_share - 1) * query[i * D + d],
                  tolerance);
    }
  }
  for (std::int64_t n = 0; n < K * D; ++n) {
    const double expected = inv_temperature * expected_dbank[n];
    CHECK_CLOSE(to_compute(dbank[n]), expected, tolerance + out_tolerance * std::abs(expected));
  }
}

}  // namespace

int main() {
  const Sizes sizes[] = {{1, 1, 1, 1}, {3, 5, 0, 7}, {2, 40, 67, 13}, {5, 90, 200, 128}};
  for (const Isa isa : {Isa::kBaseline, Isa::kAvx2, Isa::kAvx512}) {
    if (isa > widest_isa()) continue;
    for (const Sizes& size : sizes) {
      for (const bool masks : {false, true}) {
        for (const int n : {1, 3}) {
          test_against_definition<float, float>(size, DType::kFloat32, DType::kFloat32, 1e-5, 0,
                                                masks, isa, n);
          test_against_definition<double, double>(size, DType::kFloat64, DType::kFloat64, 1e-13, 0,
                                                  masks, isa, n);
          test_against_definition<double, float>(size, DType::kFloat64, DType::kFloat32, 1e-13,
                                                 1e-7, masks, isa, n);
          test_against_definition<float, BFloat16>(size, DType::kFloat32, DType::kBFloat16, 1e-5,
                                                   0.01, masks, isa, n);
          test_against_definition<float, Float16>(size, DType::kFloat32, DType::kFloat16, 1e-5,
                                                  0.001, masks, isa, n);
        }
      }
    }
  }
  return check::exit_code();
}
