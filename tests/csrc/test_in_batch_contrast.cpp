// in_batch_contrast and its backward against the definition: one direction and both, every
// instruction set of this CPU, odd sizes, labels, temperatures, any number of threads, incoming
// gradients of either sign. Outputs start as NaN.
#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <type_traits>
#include <vector>

#include "check.h"
#include "compare.h"
#include "executors.h"
#include "in_batch_contrast.h"

using namespace codir_fast;

namespace {

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr double kInfinity = std::numeric_limits<double>::infinity();

template <typename C>
struct Case {
  std::int64_t B, D;
  bool symmetric = false;
  double temperature = 0.07;
  std::vector<C> query, positive, grad_loss;
  std::vector<std::int64_t> labels;

  InBatchContrastInputs inputs() const {
    return {query.data(),
            positive.data(),
            labels.empty() ? nullptr : labels.data(),
            B,
            D,
            std::is_same_v<C, double> ? DType::kFloat64 : DType::kFloat32,
            1 / temperature,
            symmetric};
  }

  bool is_negative(std::int64_t i, std::int64_t j) const {
    return i != j && (labels.empty() || labels[i] != labels[j]);
  }
};

template <typename C>
Case<C> random_case(std::int64_t B, std::int64_t D) {
  std::mt19937 random(static_cast<unsigned>(B + 1000 * D));
  std::uniform_real_distribution<double> uniform(-1, 1);
  Case<C> out;
  out.B = B;
  out.D = D;
  out.query = unit_rows<C>(B, D, random);
  out.positive = unit_rows<C>(B, D, random);
  for (std::int64_t i = 0; i < B; ++i) out.grad_loss.push_back(static_cast<C>(uniform(random)));
  return out;
}

// Few labels, some of which differ in their upper half only.
template <typename C>
void add_labels(Case<C>& some) {
  std::mt19937 random(5);
  for (std::int64_t i = 0; i < some.B; ++i)
    some.labels.push_back(static_cast<std::int64_t>(random() % 3) * (std::int64_t{1} << 33) - 1);
}

template <typename Element>
struct Results {
  std::vector<Element> loss, dquery, dpositive, dinv_temperature;
  std::vector<double> lse;
};

// In long double, so that it is more exact than what it judges in double too; `largest` is that of
// the logits.
template <typename C>
Results<double> definition(const Case<C>& some, double& largest) {
  using Real = long double;
  const std::int64_t B = some.B, D = some.D;
  const Real inv_temperature = 1 / some.temperature;  // a double, as the kernel gets it
  const int directions = some.symmetric ? 2 : 1;
  std::vector<Real> logit(B * B), weight(B * B), dquery(B * D), dpositive(B * D);
  for (std::int64_t i = 0; i < B; ++i) {
    for (std::int64_t j = 0; j < B; ++j) {
      Real& s = logit[i * B + j] = 0;
      for (std::int64_t d = 0; d < D; ++d)
        s += Real{some.query[i * D + d]} * some.positive[j * D + d];
      s *= inv_temperature;
      largest = std::max(largest, static_cast<double>(std::abs(s)));
    }
  }
  Results<double> out;
  out.loss.assign(B, 0);
  for (int direction = 0; direction < directions; ++direction) {
    const auto at = [&](std::int64_t i, std::int64_t j) {
      return direction == 0 ? i * B + j : j * B + i;
    };
    for (std::int64_t i = 0; i < B; ++i) {
      const Real positive = logit[at(i, i)], factor = Real{some.grad_loss[i]} / directions;
      Real maximum = positive, others = 0;
      for (std::int64_t j = 0; j < B; ++j)
        if (some.is_negative(i, j)) maximum = std::max(maximum, logit[at(i, j)]);
      for (std::int64_t j = 0; j < B; ++j)
        if (some.is_negative(i, j)) others += std::exp(logit[at(i, j)] - maximum);
      // Of the positive alone: log1p keeps the digits of a small loss.
      const Real own = std::exp(positive - maximum);
      const Real loss = own == 1 ? std::log1p(others) : maximum - positive + std::log(own + others);
      out.loss[i] += static_cast<double>(loss / directions);
      out.lse.push_back(static_cast<double>(positive + loss));
      for (std::int64_t j = 0; j < B; ++j) {
        if (some.is_negative(i, j))
          weight[at(i, j)] += factor * std::exp(logit[at(i, j)] - positive - loss);
      }
      weight[at(i, i)] -= factor * others / (own + others);
    }
  }
  Real dinv_temperature = 0;
  for (std::int64_t i = 0; i < B; ++i) {
    for (std::int64_t j = 0; j < B; ++j) {
      const Real w = weight[i * B + j];
      dinv_temperature += w * logit[i * B + j] / inv_temperature;
      for (std::int64_t d = 0; d < D; ++d) {
        dquery[i * D + d] += w * some.positive[j * D + d] * inv_temperature;
        dpositive[j * D + d] += w * some.query[i * D + d] * inv_temperature;
      }
    }
  }
  out.dquery.assign(dquery.begin(), dquery.end());
  out.dpositive.assign(dpositive.begin(), dpositive.end());
  out.dinv_temperature = {static_cast<double>(dinv_temperature)};
  return out;
}

template <typename C>
Results<C> run(const Case<C>& some, int num_threads, Isa isa) {
  const C nan = static_cast<C>(kNan);
  const std::vector<C> matrix(some.B * some.D, nan);
  const std::vector<double> of_directions(some.B * (some.symmetric ? 2 : 1), kNan);
  Results<C> out{std::vector<C>(some.B, nan), matrix, matrix, {nan}, of_directions};
  CHECK(in_batch_contrast_cpu(out.loss.data(), out.lse.data(), some.inputs(), threads(num_threads),
                              isa) == Status::kOk);
  CHECK(in_batch_contrast_backward_cpu(
            {out.dquery.data(), out.dpositive.data(), out.dinv_temperature.data()},
            some.grad_loss.data(), out.lse.data(), some.inputs(), threads(num_threads),
            isa) == Status::kOk);
  return out;
}

// A logit s is known to epsilon |s|, and so, relatively, is its weight.
template <typename C>
void check_case(Case<C> some, const std::vector<int>& thread_counts = {1, 3}) {
  for (const bool symmetric : {false, true}) {
    some.symmetric = symmetric;
    double largest = 0;
    const Results<double> expected = definition(some, largest);
    const double epsilon = std::numeric_limits<C>::epsilon();
    const double relative = 6 * epsilon * (1 + largest), tiny = 0x1p-100;
    for (const Isa isa : isas()) {
      for (const int num_threads : thread_counts) {
        const int failures_before = check::failures();
        const Results<C> got = run(some, num_threads, isa);
        check_all(got.loss, expected.loss, relative, tiny, "loss");
        check_all(got.lse, expected.lse, relative, tiny, "lse");
        check_all(got.dquery, expected.dquery, relative, tiny / some.temperature, "dquery");
        check_all(got.dpositive, expected.dpositive, relative, tiny / some.temperature,
                  "dpositive");
        // Terms of either sign: their sum may be much smaller than they are.
        check_all(got.dinv_temperature, expected.dinv_temperature, relative,
                  relative * std::sqrt(some.B), "dinv_temperature");
        if (check::failures() == failures_before) continue;
        std::printf("  with B=%lld D=%lld temperature=%g, %zu bytes, %d threads, %s%s%s\n",
                    static_cast<long long>(some.B), static_cast<long long>(some.D),
                    some.temperature, sizeof(C), num_threads, isa_name(isa),
                    symmetric ? ", symmetric" : "", some.labels.empty() ? "" : ", labels");
      }
    }
  }
}

constexpr std::int64_t kSizes[][2] = {{1, 1},   {1, 128},  {2, 7},     {3, 1021}, {16, 16},
                                      {17, 64}, {33, 130}, {41, 5},    {64, 100}, {65, 31},
                                      {126, 9}, {131, 24}, {127, 257}, {300, 33}};

template <typename C>
void test_sizes_and_labels() {
  for (const auto& [B, D] : kSizes) {
    Case<C> some = random_case<C>(B, D);
    check_case(some);
    add_labels(some);
    check_case(some);
  }
}

// So many threads and columns that the positive keys are done a part at a time, and so many
// queries that their sums have several runs.
template <typename C>
void test_parts_and_runs() {
  check_case(random_case<C>(256, 1021), {64});
  check_case(random_case<C>(1100, 3), {1, 2});
  if (sizeof(C) == 4) check_case(random_case<C>(2700, 2), {3});
}

template <typename C>
void test_temperatures() {
  for (const double temperature : {1e-3, 1e-2, 0.5, 1.0, 1e2}) {
    Case<C> some = random_case<C>(140, 48);
    some.temperature = temperature;
    check_case(some);
  }
}

// The maxima rise over rows and columns up to the thousands, and fall again.
template <typename C>
void test_rows_of_any_length() {
  Case<C> some = random_case<C>(200, 9);
  for (std::int64_t i = 0; i < some.B; ++i) {
    for (std::int64_t d = 0; d < some.D; ++d) {
      some.query[i * some.D + d] *= static_cast<C>(i % 70);
      some.positive[i * some.D + d] *= static_cast<C>((i + 40) % 90);
    }
  }
  check_case(some);
}

// The positive outweighs all negatives by e^40: the loss is about B e^-40, not 0.
template <typename C>
void test_small_losses_keep_their_digits() {
  Case<C> some = random_case<C>(20, 256);
  some.positive = some.query;
  for (std::int64_t i = 0; i < some.B; ++i) {
    for (std::int64_t d = 0; d < some.D; ++d) {
      some.query[i * some.D + d] = some.positive[i * some.D + d] = d == i ? 1 : 0;
    }
  }
  some.temperature = 0.025;
  check_case(some);
  some.symmetric = true;
  for (const C loss : run(some, 1, active_isa()).loss) CHECK(loss > 0 && loss < C{1e-12});
}

// A query that is no number is one for its own loss and, both ways, for every loss; all others keep
// theirs one way.
template <typename C>
void test_nan_is_not_hidden() {
  for (const bool symmetric : {false, true}) {
    Case<C> some = random_case<C>(37, 20);
    some.symmetric = symmetric;
    some.query[5 * some.D + 3] = static_cast<C>(kNan);
    const Results<C> got = run(some, 2, active_isa());
    for (std::int64_t i = 0; i < some.B; ++i)
      CHECK(std::isnan(got.loss[i]) == (symmetric || i == 5));
    for (const C element : got.dpositive) CHECK(std::isnan(element));
  }
}

template <typename C>
void test_alone_and_nobody() {
  for (const bool symmetric : {false, true}) {
    Case<C> some = random_case<C>(1, 20);
    some.symmetric = symmetric;
    const Results<C> alone = run(some, 2, active_isa());
    CHECK(alone.loss[0] == 0 && alone.dinv_temperature[0] == 0);
    for (const C element : alone.dquery) CHECK(element == 0);
    Case<C> nobody = random_case<C>(0, 20);
    nobody.symmetric = symmetric;
    CHECK(run(nobody, 2, active_isa()).dinv_temperature[0] == 0);
  }
}

template <typename C>
void test_results_repeat() {
  Case<C> some = random_case<C>(150, 140);
  some.symmetric = true;
  const Results<C> first = run(some, 3, active_isa());
  for (int n = 0; n < 20; ++n) {
    const Results<C> again = run(some, 3, active_isa());
    CHECK(again.loss == first.loss && again.dquery == first.dquery &&
          again.dpositive == first.dpositive && again.dinv_temperature == first.dinv_temperature);
  }
}

template <typename C>
void test_all() {
  test_sizes_and_labels<C>();
  test_parts_and_runs<C>();
  test_temperatures<C>();
  test_rows_of_any_length<C>();
  test_small_losses_keep_their_digits<C>();
  test_nan_is_not_hidden<C>();
  test_alone_and_nobody<C>();
  test_results_repeat<C>();
}

}  // namespace

int main() {
  test_all<float>();
  test_all<double>();
  Case<float> some = random_case<float>(3, 4);
  InBatchContrastInputs half = some.inputs();
  half.dtype = DType::kFloat16;
  std::vector<double> lse(3);
  CHECK(in_batch_contrast_cpu(some.grad_loss.data(), lse.data(), half, threads(1)) ==
        Status::kUnsupportedDType);
  return check::exit_code();
}
