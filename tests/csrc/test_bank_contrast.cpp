// bank_contrast and its backward against the definition: both objectives, every instruction set of
// this CPU, odd sizes, masks, storage types, temperatures, banks on which sums stagnate, any number
// of threads. Outputs start as NaN.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <new>
#include <random>
#include <vector>

#include "bank_contrast.h"
#include "check.h"
#include "compare.h"
#include "executors.h"
#include "storage.h"

using namespace codir_fast;

namespace {

static_assert(sizeof(bool) == sizeof(char), "flags are bytes");
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr double kInfinity = std::numeric_limits<double>::infinity();

template <typename Element>
constexpr DType dtype_of = DType::kFloat32;
template <>
constexpr DType dtype_of<double> = DType::kFloat64;
template <>
constexpr DType dtype_of<BFloat16> = DType::kBFloat16;
template <>
constexpr DType dtype_of<Float16> = DType::kFloat16;

// Distance of 1 to the next number.
template <typename Element>
constexpr double epsilon = 0x1p-23;
template <>
constexpr double epsilon<double> = 0x1p-52;
template <>
constexpr double epsilon<BFloat16> = 0x1p-7;
template <>
constexpr double epsilon<Float16> = 0x1p-10;

// One call's arguments; C is what arithmetic runs in, T how the bank is stored. Empty vectors are
// arguments not given.
template <typename C, typename T = C>
struct Case {
  std::int64_t B, K, D;
  double temperature = 0.07;
  std::vector<C> query, positive, bank_scale, grad_loss;
  std::vector<T> bank;
  std::vector<std::int64_t> labels, bank_labels, exclude_index;
  std::vector<char> valid;
  Objective objective = Objective::kInfoNce;
  double log_partition = 3, noise_ratio = 0.3;

  bool is_nce() const { return objective == Objective::kNce; }

  BankContrastInputs inputs() const {
    const auto given = [](const auto& argument) {
      return argument.empty() ? nullptr : argument.data();
    };
    return {query.data(),
            bank.data(),
            given(bank_scale),
            given(labels),
            given(bank_labels),
            given(exclude_index),
            reinterpret_cast<const bool*>(given(valid)),
            B,
            K,
            D,
            dtype_of<C>,
            dtype_of<T>,
            1 / temperature,
            objective,
            log_partition,
            noise_ratio};
  }

  bool is_negative(std::int64_t i, std::int64_t j) const {
    return (valid.empty() || valid[j]) && (labels.empty() || bank_labels[j] != labels[i]) &&
           (exclude_index.empty() || exclude_index[i] != j);
  }
};

template <typename C, typename T = C>
Case<C, T> random_case(std::int64_t B, std::int64_t K, std::int64_t D) {
  std::mt19937 random(static_cast<unsigned>(B + 1000 * K + 7 * D));
  std::uniform_real_distribution<double> uniform(-1, 1);
  Case<C, T> out;
  out.B = B;
  out.K = K;
  out.D = D;
  out.query = unit_rows<C>(B, D, random);
  out.positive = unit_rows<C>(B, D, random);
  out.bank = unit_rows<T>(K, D, random);
  for (std::int64_t i = 0; i < B; ++i) out.grad_loss.push_back(rounded<C>(uniform(random)));
  return out;
}

// Few labels, some of which differ in their upper half only; rows that are not valid hold NaN.
template <typename C, typename T>
void add_masks(Case<C, T>& some) {
  std::mt19937 random(5);
  const auto label = [&] {
    return static_cast<std::int64_t>(random() % 3) * (std::int64_t{1} << 33) - 1;
  };
  for (std::int64_t i = 0; i < some.B; ++i) some.labels.push_back(label());
  for (std::int64_t i = 0; i < some.B; ++i) {
    some.exclude_index.push_back(i % 3 == 0 ? -1 : static_cast<std::int64_t>(random() % some.K));
  }
  for (std::int64_t j = 0; j < some.K; ++j) {
    some.bank_labels.push_back(label());
    some.valid.push_back(random() % 4 != 0);
    if (!some.valid[j]) std::fill_n(&some.bank[j * some.D], some.D, rounded<T>(kNan));
  }
}

template <typename C, typename T>
void add_scale(Case<C, T>& some) {
  std::mt19937 random(6);
  std::uniform_real_distribution<double> uniform(0.25, 1.5);
  for (std::int64_t j = 0; j < some.K; ++j) {
    const bool used = some.valid.empty() || some.valid[j];
    some.bank_scale.push_back(rounded<C>(used ? uniform(random) : kNan));
  }
}

template <typename C, typename T = C>
struct Results {
  std::vector<C> loss;
  std::vector<double> lse;
  std::vector<C> dquery, dpositive, dinv_temperature;
  std::vector<T> dbank;
};

struct Expected {
  std::vector<double> loss, lse, dquery, dpositive, dinv_temperature, dbank;
  double largest_logit = 0;  // in absolute value, and so is NCE's offset
};

struct Softplus {
  long double value, slope;
};

// log(1 + e^x) and its derivative.
Softplus softplus(long double x) {
  const long double e = std::exp(-std::abs(x));
  return {std::max(x, 0.0L) + std::log1p(e), (x > 0 ? 1 : e) / (1 + e)};
}

// In long double, so that it is more exact than what it judges in double too.
template <typename C, typename T>
Expected definition(const Case<C, T>& some) {
  using Real = long double;
  const std::int64_t B = some.B, K = some.K, D = some.D;
  const Real inv_temperature = 1 / some.temperature;  // a double, as the kernel gets it
  Expected out;
  std::vector<Real> row_gradient(K * D), similarity(K);
  const auto scale = [&](std::int64_t j) {
    return some.bank_scale.empty() ? Real{1} : Real{some.bank_scale[j]};
  };
  for (std::int64_t i = 0; i < B; ++i) {
    const C *q = &some.query[i * D], *p = &some.positive[i * D];
    Real positive = 0, maximum = -kInfinity;
    for (std::int64_t d = 0; d < D; ++d) positive += Real{q[d]} * p[d];
    for (std::int64_t j = 0; j < K; ++j) {
      if (!some.is_negative(i, j)) continue;
      similarity[j] = 0;
      for (std::int64_t d = 0; d < D; ++d)
        similarity[j] += scale(j) * q[d] * value_of(some.bank[j * D + d]);
      maximum = std::max(maximum, similarity[j] * inv_temperature);
      out.largest_logit = std::max(out.largest_logit,
                                   static_cast<double>(std::abs(similarity[j] * inv_temperature)));
    }
    out.largest_logit =
        std::max(out.largest_logit, static_cast<double>(std::abs(positive * inv_temperature)));
    const Real offset = some.log_partition + std::log(some.noise_ratio + Real{kNceEps});
    if (some.is_nce()) {
      out.largest_logit = std::max(out.largest_logit, static_cast<double>(std::abs(offset)));
    }
    // Relative to the largest negative: the loss keeps its digits where the positive wins by far.
    Real total = 0, terms = 0;
    for (std::int64_t j = 0; j < K; ++j) {
      if (!some.is_negative(i, j)) continue;
      total += std::exp(similarity[j] * inv_temperature - maximum);
      terms += softplus(similarity[j] * inv_temperature - offset).value +
               std::log1p(kNceEps / Real{some.noise_ratio});
    }
    const Real log_sum = some.is_nce() ? offset
                         : total == 0  ? -kInfinity
                                       : maximum + std::log(total);
    const auto [gap_loss, share] = softplus(log_sum - positive * inv_temperature);
    const Real loss = some.is_nce() ? gap_loss + terms : gap_loss;
    const Real lse = some.is_nce() ? offset : positive * inv_temperature + loss;
    Real dinv_temperature = -share * positive;
    std::vector<Real> dquery(D);
    for (std::int64_t d = 0; d < D; ++d) dquery[d] = -share * p[d] * inv_temperature;
    for (std::int64_t j = 0; j < K; ++j) {
      if (!some.is_negative(i, j)) continue;
      const Real gap = similarity[j] * inv_temperature - lse;
      const Real weight = some.is_nce() ? softplus(gap).slope : std::exp(gap);
      dinv_temperature += weight * similarity[j];
      for (std::int64_t d = 0; d < D; ++d) {
        dquery[d] += weight * scale(j) * value_of(some.bank[j * D + d]) * inv_temperature;
        row_gradient[j * D + d] += scale(j) * some.grad_loss[i] * weight * q[d] * inv_temperature;
      }
    }
    out.dquery.insert(out.dquery.end(), dquery.begin(), dquery.end());
    for (std::int64_t d = 0; d < D; ++d)
      out.dpositive.push_back(static_cast<double>(-share * q[d] * inv_temperature));
    out.loss.push_back(static_cast<double>(loss));
    out.lse.push_back(static_cast<double>(lse));
    out.dinv_temperature.push_back(static_cast<double>(dinv_temperature));
  }
  out.dbank.assign(row_gradient.begin(), row_gradient.end());
  return out;
}

template <typename C, typename T>
Results<C, T> run(const Case<C, T>& some, int num_threads, Isa isa) {
  const C nan = static_cast<C>(kNan);
  Results<C, T> out{
      std::vector<C>(some.B, nan),          std::vector<double>(some.B, kNan),
      std::vector<C>(some.B * some.D, nan), std::vector<C>(some.B * some.D, nan),
      std::vector<C>(some.B, nan),          std::vector<T>(some.K * some.D, rounded<T>(kNan))};
  CHECK(bank_contrast_cpu({out.loss.data(), out.lse.data(), out.dquery.data(), out.dpositive.data(),
                           out.dinv_temperature.data()},
                          some.positive.data(), some.inputs(), threads(num_threads),
                          isa) == Status::kOk);
  CHECK(bank_contrast_backward_cpu(out.dbank.data(), some.grad_loss.data(), out.lse.data(),
                                   some.inputs(), threads(num_threads), isa) == Status::kOk);
  return out;
}

// A logit s is known to epsilon |s|, and so, relatively, is its weight.
template <typename C, typename T>
void check_objective(const Case<C, T>& some, const std::vector<int>& thread_counts) {
  const Expected expected = definition(some);
  const double relative = 6 * epsilon<C> * (1 + expected.largest_logit);
  const double tiny = 0x1p-100;
  for (const Isa isa : isas()) {
    for (const int num_threads : thread_counts) {
      const int failures_before = check::failures();
      const Results<C, T> got = run(some, num_threads, isa);
      check_all(got.loss, expected.loss, relative, tiny, "loss");
      check_all(got.lse, expected.lse, relative, tiny, "lse");
      check_all(got.dquery, expected.dquery, relative, tiny / some.temperature, "dquery");
      check_all(got.dpositive, expected.dpositive, relative, tiny / some.temperature, "dpositive");
      check_all(got.dinv_temperature, expected.dinv_temperature, relative, epsilon<C>,
                "dinv_temperature");
      check_all(got.dbank, expected.dbank, relative + epsilon<T>,
                std::is_same_v<T, Float16> ? 0x1p-25 : tiny, "dbank");
      if (check::failures() == failures_before) continue;
      std::printf(
          "  with B=%lld K=%lld D=%lld temperature=%g, %zu and %zu bytes, %d threads, %s, %s\n",
          static_cast<long long>(some.B), static_cast<long long>(some.K),
          static_cast<long long>(some.D), some.temperature, sizeof(C), sizeof(T), num_threads,
          isa_name(isa), some.is_nce() ? "NCE" : "InfoNCE");
    }
  }
}

template <typename C, typename T>
Case<C, T> with_objective(Case<C, T> some, Objective objective) {
  some.objective = objective;
  return some;
}

template <typename C, typename T>
void check_case(const Case<C, T>& some, const std::vector<int>& thread_counts = {1, 3}) {
  check_objective(with_objective(some, Objective::kInfoNce), thread_counts);
  check_objective(with_objective(some, Objective::kNce), thread_counts);
}

constexpr std::int64_t kSizes[][3] = {{1, 1, 1},      {1, 2000, 128}, {2, 41, 7},   {7, 127, 33},
                                      {16, 126, 16},  {17, 253, 64},  {33, 1, 130}, {40, 1100, 5},
                                      {64, 640, 100}, {65, 129, 31},  {100, 43, 2}, {131, 300, 24},
                                      {3, 90, 1021}};

template <typename C>
void test_sizes_and_masks() {
  for (const auto& [B, K, D] : kSizes) {
    Case<C> some = random_case<C>(B, K, D);
    check_case(some);
    add_masks(some);
    check_case(some);
    add_scale(some);
    check_case(some);
  }
}

template <typename C, typename T>
void test_storage() {
  Case<C, T> some = random_case<C, T>(37, 517, 67);
  check_case(some);
  add_masks(some);
  add_scale(some);
  check_case(some);
}

template <typename C>
void test_one_kind_of_mask_at_a_time() {
  Case<C> all = random_case<C>(19, 211, 12);
  add_masks(all);
  for (const int kind : {0, 1, 2}) {
    Case<C> some = random_case<C>(19, 211, 12);
    if (kind == 0) some.valid = all.valid;
    if (kind == 1) some.labels = all.labels, some.bank_labels = all.bank_labels;
    if (kind == 2) some.exclude_index = all.exclude_index;
    check_case(some);
  }
}

template <typename C>
void test_temperatures() {
  for (const double temperature : {1e-3, 1e-2, 0.5, 1.0, 1e2}) {
    Case<C> some = random_case<C>(21, 400, 48);
    some.temperature = temperature;
    check_case(some);
  }
}

// The maximum rises from block to block up to the thousands, so that shifts and sums follow it many
// times; the bank is long enough that sums of sums follow too.
template <typename C>
void test_rising_logits() {
  Case<C> some = random_case<C>(18, 12000, 9);
  for (std::int64_t j = 0; j < some.K; ++j) {
    for (std::int64_t d = 0; d < some.D; ++d) some.bank[j * some.D + d] *= static_cast<C>(1 + j);
  }
  check_case(some);
  some.temperature = 1e3;
  check_case(some);
}

// The positive outweighs all negatives by e^40: the loss is about K e^-40, not 0.
template <typename C>
void test_small_losses_keep_their_digits() {
  Case<C> some = random_case<C>(5, 300, 16);
  some.positive = some.query;
  for (C& element : some.bank) element *= C{0.01};
  some.temperature = 0.025;
  check_case(some);
  for (const C loss : run(some, 1, active_isa()).loss) CHECK(loss > 0 && loss < C{1e-12});
}

// Thousands of terms of about 1e-21 each, and a positive that wins by far: their sum is the loss.
template <typename C>
void test_nce_of_tiny_terms_keeps_its_digits() {
  Case<C> some = random_case<C>(5, 9000, 16);
  some.objective = Objective::kNce;
  some.positive = some.query;
  for (C& element : some.positive) element *= C{10};
  some.log_partition = 18;
  some.noise_ratio = 1e16;
  check_case(some);
  for (const C loss : run(some, 2, active_isa()).loss) CHECK(loss > 0 && loss < C{1e-12});
}

// Where a lone query has no negative, NCE leaves the positive's term.
template <typename C>
void test_nce_without_negatives() {
  Case<C> some = random_case<C>(1, 300, 20);
  some.objective = Objective::kNce;
  some.valid.assign(300, 0);
  const Results<C> got = run(some, 2, active_isa());
  CHECK(got.loss[0] > 0 && got.dinv_temperature[0] != 0);
  for (const C element : got.dbank) CHECK(element == 0);
}

// A partition or ratio at the far ends of its range: nothing overflows.
template <typename C>
void test_nce_extremes() {
  for (const double log_partition : {-1e4, 1e4}) {
    for (const double noise_ratio : {1e-12, 1e12}) {
      Case<C> some = random_case<C>(17, 250, 11);
      some.log_partition = log_partition;
      some.noise_ratio = noise_ratio;
      check_case(some);
    }
  }
}

// Rows that repeat: a running float sum stagnates on them (relative error about 1e-4), sums of sums
// do not.
void test_clustered_bank(std::int64_t B, std::int64_t K, std::int64_t D, Objective objective) {
  const std::int64_t clusters = 64;
  Case<float> some = random_case<float>(B, clusters, D);
  some.objective = objective;
  some.log_partition = 12;
  const std::vector<float> centres = some.bank;
  some.K = K;
  some.bank.resize(K * D);
  for (std::int64_t j = 0; j < K; ++j)
    std::copy_n(&centres[j % clusters * D], D, &some.bank[j * D]);
  const Expected expected = definition(some);
  for (const Isa isa : isas()) {
    for (const int num_threads : {1, 2}) {
      const Results<float> got = run(some, num_threads, isa);
      check_all(got.loss, expected.loss, 1e-6, 0, "loss of a clustered bank");
      check_all(got.dquery, expected.dquery, 1e-6, 0, "dquery of a clustered bank");
      check_all(got.dbank, expected.dbank, 4e-6, 0, "dbank of a clustered bank");
    }
  }
}

// Queries that repeat, by the thousand: the same for the sums of the bank's gradient.
void test_clustered_queries(Objective objective) {
  const std::int64_t clusters = 8;
  Case<float> some = random_case<float>(clusters, 200, 16);
  some.objective = objective;
  const Case<float> centres = some;
  some.B = 32768;
  some.query.clear(), some.positive.clear(), some.grad_loss.clear();
  for (std::int64_t i = 0; i < some.B; i += clusters) {
    some.query.insert(some.query.end(), centres.query.begin(), centres.query.end());
    some.positive.insert(some.positive.end(), centres.positive.begin(), centres.positive.end());
    some.grad_loss.insert(some.grad_loss.end(), centres.grad_loss.begin(), centres.grad_loss.end());
  }
  const Expected expected = definition(some);
  for (const Isa isa : isas()) {
    const Results<float> got = run(some, 2, isa);
    check_all(got.dbank, expected.dbank, 4e-6, 0, "dbank of clustered queries");
  }
}

// Query 0 has no negative at all; then no query has any.
template <typename C>
void test_queries_without_negatives() {
  Case<C> some = random_case<C>(6, 200, 20);
  some.labels = {7, 1, 2, 3, 4, 5};
  some.bank_labels.assign(200, 7);
  for (std::int64_t j = 0; j < 100; ++j) some.valid.push_back(1);
  some.valid.resize(200, 0);
  check_case(some);
  const Results<C> first = run(some, 2, active_isa());  // InfoNCE
  CHECK(first.loss[0] == 0 && first.dinv_temperature[0] == 0);
  for (std::int64_t d = 0; d < some.D; ++d) CHECK(first.dquery[d] == 0 && first.dpositive[d] == 0);

  some.valid.assign(200, 0);
  check_case(some);
  for (const C element : run(some, 2, active_isa()).dquery) CHECK(element == 0);
  for (const C element : run(some, 2, active_isa()).dbank) CHECK(element == 0);
}

template <typename C>
void test_empty_sizes() {
  check_case(random_case<C>(5, 0, 8));
  check_case(random_case<C>(0, 300, 8));
  check_case(random_case<C>(0, 0, 8));
}

// A NaN in a row that counts is not hidden, wherever it stands.
template <typename C>
void test_nan_propagates(Objective objective) {
  for (const std::int64_t j : {0, 125, 299}) {
    Case<C> some = random_case<C>(18, 300, 10);
    some.objective = objective;
    some.bank[j * some.D + 3] = static_cast<C>(kNan);
    for (const Isa isa : isas()) {
      const Results<C> got = run(some, 3, isa);
      for (const C loss : got.loss) CHECK(std::isnan(loss));
      for (const C element : got.dquery) CHECK(std::isnan(element));
      for (std::int64_t d = 0; d < some.D; ++d) CHECK(std::isnan(got.dbank[j * some.D + d]));
    }
  }
}

// A NaN in a row that no query may see stays out of every row's gradient, however many lanes B
// fills.
void test_nan_in_a_row_that_nobody_sees(Objective objective) {
  for (const std::int64_t B : {1, 16, 19}) {
    Case<float> some = random_case<float>(B, 40, 6);
    some.objective = objective;
    some.labels.assign(B, 7);
    some.bank_labels.assign(40, 8);
    some.bank_labels[11] = 7;
    some.bank[11 * some.D] = static_cast<float>(kNan);
    const std::vector<double> lse(B, 20.0);
    for (const Isa isa : isas()) {
      std::vector<float> dbank(40 * some.D, static_cast<float>(kNan));
      bank_contrast_backward_cpu(dbank.data(), some.grad_loss.data(), lse.data(), some.inputs(),
                                 threads(2), isa);
      for (const float element : dbank) CHECK(!std::isnan(element));
    }
  }
}

// Logits around 1e11 are rounded by thousands: a weight still is at most 1.
void test_huge_logits_keep_gradients_bounded(Objective objective) {
  Case<float> some = random_case<float>(20, 300, 33);
  some.objective = objective;
  for (float& element : some.bank) element *= 1e6f;
  for (float& element : some.query) element *= 1e4f;
  for (const Isa isa : isas()) {
    const Results<float> got = run(some, 2, isa);
    const double bound = 20 * 1e4 / some.temperature;
    for (const float loss : got.loss) CHECK(std::isfinite(loss));
    for (const float element : got.dquery) CHECK(std::isfinite(element));
    for (const float element : got.dbank) CHECK(std::abs(element) <= bound);
  }
}

// Where a thread pool finds no memory, the status says so.
void test_out_of_memory_is_a_status() {
  const Case<float> some = random_case<float>(3, 5, 4);
  Executor executor;
  executor.parallel_for = [](std::int64_t, const auto&) { throw std::bad_alloc(); };
  std::vector<float> rows(5 * some.D), queries(3 * some.D), scalars(3);
  std::vector<double> lse(3);
  CHECK(bank_contrast_cpu(
            {scalars.data(), lse.data(), queries.data(), queries.data(), scalars.data()},
            some.positive.data(), some.inputs(), executor) == Status::kOutOfMemory);
  CHECK(bank_contrast_backward_cpu(rows.data(), some.grad_loss.data(), lse.data(), some.inputs(),
                                   executor) == Status::kOutOfMemory);
}

template <typename Element>
bool same_bits(const std::vector<Element>& a, const std::vector<Element>& b) {
  return std::memcmp(a.data(), b.data(), a.size() * sizeof(Element)) == 0;
}

void test_repeats_to_the_bit(Objective objective) {
  for (const std::int64_t B : {32, 150}) {
    const Case<float> some = with_objective(random_case<float>(B, 3000, 128), objective);
    for (const int num_threads : {1, 2, 4, 7}) {
      const Results<float> first = run(some, num_threads, active_isa()),
                           again = run(some, num_threads, active_isa());
      CHECK(same_bits(first.loss, again.loss) && same_bits(first.lse, again.lse));
      CHECK(same_bits(first.dquery, again.dquery) && same_bits(first.dpositive, again.dpositive));
      CHECK(same_bits(first.dinv_temperature, again.dinv_temperature) &&
            same_bits(first.dbank, again.dbank));
    }
  }
}

void test_many_threads() {
  const std::vector<int> thread_counts = {1, 2, 5, 16};
  check_case(random_case<float>(20, 9000, 24), thread_counts);
  check_case(random_case<float>(300, 700, 24), thread_counts);
  check_case(random_case<float>(200, 3, 24), thread_counts);
}

void test_unsupported_dtypes() {
  const Case<float, double> some = random_case<float, double>(2, 3, 4);
  CHECK(bank_contrast_cpu({}, nullptr, some.inputs(), Executor()) == Status::kUnsupportedDType);
  CHECK(bank_contrast_backward_cpu(nullptr, nullptr, nullptr, some.inputs(), Executor()) ==
        Status::kUnsupportedDType);
  BankContrastInputs half = some.inputs();
  half.dtype = DType::kBFloat16;
  CHECK(bank_contrast_cpu({}, nullptr, half, Executor()) == Status::kUnsupportedDType);
}

template <typename C>
void test_in_dtype() {
  test_sizes_and_masks<C>();
  test_one_kind_of_mask_at_a_time<C>();
  test_temperatures<C>();
  test_rising_logits<C>();
  test_small_losses_keep_their_digits<C>();
  test_queries_without_negatives<C>();
  test_empty_sizes<C>();
  test_nce_of_tiny_terms_keeps_its_digits<C>();
  test_nce_without_negatives<C>();
  test_nce_extremes<C>();
  test_storage<C, BFloat16>();
  test_storage<C, Float16>();
  test_storage<C, float>();
}

}  // namespace

int main() {
  test_in_dtype<float>();
  test_in_dtype<double>();
  for (const Objective objective : {Objective::kInfoNce, Objective::kNce}) {
    test_clustered_bank(9, 65536, 32, objective);
    test_clustered_bank(2, 1 << 19, 4, objective);
    test_clustered_queries(objective);
    test_nan_propagates<float>(objective);
    test_nan_propagates<double>(objective);
    test_nan_in_a_row_that_nobody_sees(objective);
    test_huge_logits_keep_gradients_bounded(objective);
    test_repeats_to_the_bit(objective);
  }
  test_out_of_memory_is_a_status();
  test_many_threads();
  test_unsupported_dtypes();
  return check::exit_code();
}
