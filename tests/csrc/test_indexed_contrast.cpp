// indexed_contrast and its backward against the definition in double: both objectives, every
// instruction set of this CPU, odd sizes, repeated, clustered and masked rows, storage types, any
// number of threads; the index as it is and, for banks that L2 does not hold, put in order. Outputs
// start as NaN, and so does what lies in rows that are not valid.
#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "check.h"
#include "executors.h"
#include "indexed_contrast.h"
#include "indexed_contrast_order.h"
#include "storage.h"

using namespace codir_fast;

namespace {

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

struct Sizes {
  std::int64_t B, K, M, D;
  bool in_order = false;  // the index is expected to be put in order
  std::int64_t clusters = 0;
};

// Of as many clusters, where these are not 0: rows of one are alike to 1 %.
template <typename Element>
std::vector<Element> unit_rows(std::int64_t rows, std::int64_t D, std::mt19937& random,
                               std::int64_t clusters = 0) {
  std::normal_distribution<double> distribution;
  std::vector<Element> out(rows * D);
  std::vector<double> row(D), centres(clusters * D);
  for (double& value : centres) value = distribution(random);
  for (std::int64_t n = 0; n < rows; ++n) {
    double square = 0;
    for (double& value : row) {
      value = distribution(random);
      if (clusters > 0) value = 0.01 * value + centres[n % clusters * D + (&value - row.data())];
      square += value * value;
    }
    for (std::int64_t d = 0; d < D; ++d) {
      from_compute(static_cast<Compute<Element>>(row[d] / std::sqrt(square)), &out[n * D + d]);
    }
  }
  return out;
}

double softplus(double x) { return std::max(x, 0.0) + std::log1p(std::exp(-std::abs(x))); }
double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

// A value x may be off by tolerance * (1 + |x|).
template <typename C, typename T>
void test_against_definition(Sizes size, DType dtype, DType bank_dtype, double tolerance,
                             double out_tolerance, bool masks, Objective objective, Isa isa,
                             int num_threads) {
  const auto [B, K, M, D, in_order, clusters] = size;
  std::mt19937 random(static_cast<unsigned>(B * 31 + M));
  const double inv_temperature = 4;
  const std::vector<C> query = unit_rows<C>(B, D, random), positive = unit_rows<C>(B, D, random);
  std::vector<T> bank = unit_rows<T>(K, D, random, clusters);
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
  inputs.bank.objective = objective;
  inputs.bank.log_partition = 2;
  inputs.bank.noise_ratio = 0.3;
  inputs.index = index.data();
  inputs.M = M;
  CHECK(supported(dtype, bank_dtype) && Parts::cut(inputs).pay(inputs.bank) == in_order);

  std::vector<C> loss(B, kNan), dinv(B, kNan);
  std::vector<double> lse(B, kNan);
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
    const bool is_nce = objective == Objective::kNce;
    const double expected_lse = is_nce ? 2 + std::log(0.3 + kNceEps) : std::log(total);
    const double gap = expected_lse - inv_temperature * positive_logit;
    double expected_loss = is_nce ? softplus(gap) : gap;
    const double positive_weight = is_nce ? -sigmoid(gap) : std::exp(-gap) - 1;
    double expected_dinv = positive_weight * positive_logit;
    std::vector<double> expected_dquery(D);
    for (std::int64_t d = 0; d < D; ++d) {
      expected_dquery[d] = positive_weight * positive[i * D + d];
    }
    for (std::size_t n = 0; n < allowed.size(); ++n) {
      const std::int64_t j = allowed[n];
      const double negative_gap = inv_temperature * dot[n] - expected_lse;
      const double share = is_nce ? sigmoid(negative_gap) : std::exp(negative_gap);
      if (is_nce) expected_loss += softplus(negative_gap) + std::log1p(kNceEps / 0.3);
      expected_dinv += share * dot[n];
      for (std::int64_t d = 0; d < D; ++d) {
        expected_dquery[d] += share * row(j, d);
        expected_dbank[j * D + d] += (masks ? scale[j] : C{1}) * grad[i] * share * query[i * D + d];
      }
    }
    const auto close = [&](double got, double expected) {
      CHECK_CLOSE(got, expected, tolerance * (1 + std::abs(expected)));
    };
    close(loss[i], expected_loss);
    close(lse[i], expected_lse);
    close(dinv[i], expected_dinv);
    for (std::int64_t d = 0; d < D; ++d) {
      close(dquery[i * D + d], inv_temperature * expected_dquery[d]);
      close(dpositive[i * D + d], inv_temperature * positive_weight * query[i * D + d]);
    }
  }
  for (std::int64_t n = 0; n < K * D; ++n) {
    const double expected = inv_temperature * expected_dbank[n];
    CHECK_CLOSE(to_compute(dbank[n]), expected,
                tolerance + (tolerance + out_tolerance) * std::abs(expected));
  }
}

struct Case {
  std::vector<float> query, positive, bank;
  std::vector<std::int64_t> index;
  IndexedContrastInputs inputs{};
};

Case random_case(Sizes size, Objective objective) {
  const auto [B, K, M, D, in_order, clusters] = size;
  std::mt19937 random(9);
  Case out{unit_rows<float>(B, D, random), unit_rows<float>(B, D, random),
           unit_rows<float>(K, D, random, clusters), std::vector<std::int64_t>(B * M)};
  for (std::int64_t& j : out.index) j = static_cast<std::int64_t>(random() % K);
  out.inputs.bank.query = out.query.data();
  out.inputs.bank.bank = out.bank.data();
  out.inputs.bank.B = B;
  out.inputs.bank.K = K;
  out.inputs.bank.D = D;
  out.inputs.bank.dtype = out.inputs.bank.bank_dtype = DType::kFloat32;
  out.inputs.bank.inv_temperature = 1 / 0.07;
  out.inputs.bank.objective = objective;
  out.inputs.bank.log_partition = 3;
  out.inputs.bank.noise_ratio = 0.3;
  out.inputs.index = out.index.data();
  out.inputs.M = M;
  CHECK(B == 0 || Parts::cut(out.inputs).pay(out.inputs.bank) == in_order);
  return out;
}

struct Results {
  std::vector<float> loss;
  std::vector<double> lse;
  std::vector<float> dinv, dquery, dpositive, dbank;
};

Results run(const Case& some, int num_threads, Isa isa) {
  const BankContrastInputs& in = some.inputs.bank;
  const auto poisoned = [](std::int64_t size) {
    return std::vector<float>(size, static_cast<float>(kNan));
  };
  Results out{poisoned(in.B),        std::vector<double>(in.B, kNan), poisoned(in.B),
              poisoned(in.B * in.D), poisoned(in.B * in.D),           poisoned(in.K * in.D)};
  const std::vector<float> grad(in.B, 0.5f);
  CHECK(indexed_contrast_cpu({out.loss.data(), out.lse.data(), out.dquery.data(),
                              out.dpositive.data(), out.dinv.data()},
                             some.positive.data(), some.inputs, threads(num_threads),
                             isa) == Status::kOk);
  CHECK(indexed_contrast_backward_cpu(out.dbank.data(), grad.data(), out.lse.data(), some.inputs,
                                      threads(num_threads), isa) == Status::kOk);
  return out;
}

// A NaN in a row that is named reaches all that comes of it, wherever the row stands in the list;
// in one that is not named, nothing.
void test_nan(Sizes size, Objective objective, Isa isa) {
  const std::int64_t K = size.K, M = size.M, D = size.D;
  for (const std::int64_t m : {std::int64_t{0}, std::int64_t{63}, std::int64_t{64}, M - 1}) {
    Case some = random_case(size, objective);
    const std::int64_t lone = K - 1;
    for (std::int64_t& j : some.index) j = j == lone ? 0 : j;
    some.bank[lone * D + 5] = static_cast<float>(kNan);
    for (const float element : run(some, 2, isa).dbank) CHECK(!std::isnan(element));

    some.index[M + m] = lone;
    const Results got = run(some, 2, isa);
    CHECK(!std::isnan(got.loss[0]) && std::isnan(got.loss[1]) && !std::isnan(got.loss[2]));
    for (std::int64_t d = 0; d < D; ++d) {
      CHECK(std::isnan(got.dquery[D + d]) && std::isnan(got.dbank[lone * D + d]));
    }
  }
}

// Bit by bit, for a number of threads.
void test_repeatable(Sizes size, Objective objective, Isa isa) {
  const Case some = random_case(size, objective);
  const Results once = run(some, 3, isa), again = run(some, 3, isa);
  CHECK(once.loss == again.loss && once.lse == again.lse && once.dinv == again.dinv);
  CHECK(once.dquery == again.dquery && once.dpositive == again.dpositive);
  CHECK(once.dbank == again.dbank);
}

// Logits around 1e11 are rounded by thousands: a weight still is at most 1.
void test_huge_logits(Objective objective, Isa isa) {
  Case some = random_case({4, 60, 200, 33}, objective);
  for (float& element : some.bank) element *= 1e6f;
  for (float& element : some.query) element *= 1e4f;
  const Results got = run(some, 2, isa);
  const double bound = 4 * 200 * 1e4 / 0.07;
  for (const float loss : got.loss) CHECK(std::isfinite(loss));
  for (const float element : got.dquery) CHECK(std::isfinite(element));
  for (const float element : got.dbank) CHECK(std::abs(element) <= bound);
}

// One row of K, named 600,000 times: a running float sum would stagnate on it. So many positions
// are put in order by two parts.
void test_sums_of_sums(std::int64_t K, bool in_order, Objective objective, Isa isa) {
  const std::int64_t M = 600000, D = 35;
  Case some = random_case({1, K, M, D, in_order}, objective);
  std::fill(some.index.begin(), some.index.end(), 1);
  double dot = 0, positive = 0;
  for (std::int64_t d = 0; d < D; ++d) {
    dot += static_cast<double>(some.query[d]) * some.bank[D + d];
    positive += static_cast<double>(some.query[d]) * some.positive[d];
  }
  const double offset = 3 + std::log(0.3 + kNceEps), s = dot / 0.07, s_positive = positive / 0.07;
  const bool is_nce = objective == Objective::kNce;
  const double loss = is_nce ? softplus(offset - s_positive) +
                                   M * (softplus(s - offset) + std::log1p(kNceEps / 0.3))
                             : softplus(std::log(M) + s - s_positive);
  const double weight = is_nce ? M * sigmoid(s - offset) : sigmoid(std::log(M) + s - s_positive);
  const double positive_weight = is_nce ? sigmoid(offset - s_positive) : weight;
  for (const int num_threads : {1, 2}) {
    const Results got = run(some, num_threads, isa);
    CHECK_CLOSE(got.loss[0], loss, 2e-6 * loss);
    for (std::int64_t d = 0; d < D; ++d) {
      const double expected =
          (weight * some.bank[D + d] - positive_weight * some.positive[d]) / 0.07;
      CHECK_CLOSE(got.dquery[d], expected, 2e-6 * weight / 0.07);
      CHECK_CLOSE(got.dbank[D + d], 0.5 * weight * some.query[d] / 0.07, 4e-6 * weight / 0.07);
    }
  }
}

// NCE without negatives leaves the positive's term.
void test_without_negatives(Isa isa) {
  const std::vector<char> valid(20, 0);
  for (const std::int64_t M : {0, 70}) {
    Case some = random_case({2, 20, M, 9}, Objective::kNce);
    some.inputs.bank.valid = reinterpret_cast<const bool*>(valid.data());
    const Results got = run(some, 2, isa);
    for (const std::int64_t i : {0, 1}) {
      double gap = 3 + std::log(0.3 + kNceEps);
      for (std::int64_t d = 0; d < 9; ++d) {
        gap -= some.query[i * 9 + d] * some.positive[i * 9 + d] / 0.07;
      }
      CHECK_CLOSE(got.loss[i], softplus(gap), 1e-5 * softplus(gap));
    }
    for (const float element : got.dbank) CHECK(element == 0);
  }
}

void test_empty_sizes(Objective objective, Isa isa) {
  CHECK(run(random_case({0, 4, 0, 3}, objective), 2, isa).dbank == std::vector<float>(12, 0));
  run(random_case({0, 4, 7, 3}, objective), 2, isa);
  Case none = random_case({2, 1, 0, 3}, objective);
  none.inputs.bank.K = 0;
  for (const float loss : run(none, 2, isa).loss) CHECK(std::isfinite(loss));
}

// Every type, with a tolerance that float is held to.
void test_types(Sizes size, bool masks, Objective objective, Isa isa, int num_threads) {
  constexpr DType kF32 = DType::kFloat32, kF64 = DType::kFloat64;
  test_against_definition<float, float>(size, kF32, kF32, 1e-5, 0, masks, objective, isa,
                                        num_threads);
  test_against_definition<double, double>(size, kF64, kF64, 1e-13, 0, masks, objective, isa,
                                          num_threads);
  test_against_definition<double, float>(size, kF64, kF32, 1e-13, 1e-7, masks, objective, isa,
                                         num_threads);
  test_against_definition<float, BFloat16>(size, kF32, DType::kBFloat16, 1e-5, 0.01, masks,
                                           objective, isa, num_threads);
  test_against_definition<float, Float16>(size, kF32, DType::kFloat16, 1e-5, 0.001, masks,
                                          objective, isa, num_threads);
}

}  // namespace

int main() {
  const Sizes sizes[] = {
      {1, 1, 1, 1}, {3, 5, 0, 7}, {2, 40, 67, 13}, {5, 90, 200, 128}, {2, 30, 150, 769}};
  // Put in order whatever the type: more than 1 MiB of float16. Blocks, cells and chunks end at odd
  // places; of 67 queries 34 are in a part, then 33.
  const Sizes ordered[] = {{5, 5501, 1201, 97, true}, {67, 35003, 1031, 16, true}};
  const Sizes clustered[] = {{4, 40009, 100003, 11, true, 64}, {1, 40009, 20011, 11, false, 64}};
  const Sizes random_sizes[] = {{3, 500, 151, 37}, {3, 9001, 3203, 37, true}};
  for (const Isa isa : {Isa::kBaseline, Isa::kAvx2, Isa::kAvx512}) {
    if (isa > widest_isa()) continue;
    for (const Objective objective : {Objective::kInfoNce, Objective::kNce}) {
      for (const int n : {1, 3}) {
        for (const Sizes& size : sizes) {
          for (const bool masks : {false, true}) test_types(size, masks, objective, isa, n);
        }
        for (const Sizes& size : ordered) test_types(size, n == 3, objective, isa, n);
        for (const Sizes& size : clustered) {
          test_against_definition<float, float>(size, DType::kFloat32, DType::kFloat32, 2e-6, 0,
                                                false, objective, isa, n);
        }
      }
      for (const Sizes& size : random_sizes) {
        test_nan(size, objective, isa);
        test_repeatable(size, objective, isa);
      }
      test_huge_logits(objective, isa);
      test_sums_of_sums(3, false, objective, isa);
      test_sums_of_sums(20011, true, objective, isa);
      test_empty_sizes(objective, isa);
    }
    test_without_negatives(isa);
  }
  return check::exit_code();
}
