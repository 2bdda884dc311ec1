// bank_update against its definition in double: duplicates in order, rows that were never filled,
// any number of threads.
#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "bank_update.h"
#include "check.h"
#include "executors.h"
#include "storage.h"

using namespace codir_fast;

namespace {

constexpr std::int64_t K = 23, D = 37, N = 4000;  // enough for several threads

template <typename Element>
void test_against_definition(DType dtype, double tolerance, bool with_filled, int num_threads,
                             Isa isa) {
  std::mt19937 random(11);
  std::normal_distribution<double> distribution;
  const double momentum = 0.5;
  std::vector<Element> bank(K * D);
  std::vector<Compute<Element>> keys(N * D);
  std::vector<std::int64_t> index(N);
  std::vector<char> filled(K, 0);
  for (Element& element : bank)
    from_compute(static_cast<Compute<Element>>(distribution(random)), &element);
  for (auto& key : keys) key = static_cast<Compute<Element>>(distribution(random));
  for (std::int64_t& row : index)
    row = static_cast<std::int64_t>(random() % (K - 1));  // the last row stays as it is
  for (char& flag : filled) flag = random() % 2 == 0;
  for (std::int64_t d = 0; with_filled && d < D; ++d) {
    filled[0] = 0;  // what a row that was never filled holds doesn't matter
    from_compute(std::numeric_limits<Compute<Element>>::quiet_NaN(), &bank[d]);
  }
  index[5] = 0;

  std::vector<double> expected(K * D);
  std::vector<char> expected_filled = filled;
  for (std::int64_t n = 0; n < K * D; ++n) expected[n] = static_cast<double>(to_compute(bank[n]));
  for (std::int64_t n = 0; n < N; ++n) {
    double* row = expected.data() + index[n] * D;
    const bool keeps = !with_filled || expected_filled[index[n]];
    double square = 0;
    for (std::int64_t d = 0; d < D; ++d) {
      row[d] = (keeps ? momentum * row[d] + (1 - momentum) * keys[n * D + d]
                      : static_cast<double>(keys[n * D + d]));
      square += row[d] * row[d];
    }
    for (std::int64_t d = 0; d < D; ++d) row[d] /= std::sqrt(square);
    expected_filled[index[n]] = 1;
  }

  static_assert(sizeof(bool) == sizeof(char), "flags are bytes");
  CHECK(bank_update_cpu(bank.data(), with_filled ? reinterpret_cast<bool*>(filled.data()) : nullptr,
                        index.data(), keys.data(), N, D, dtype, momentum, threads(num_threads),
                        isa) == Status::kOk);
  for (std::int64_t n = 0; n < K * D; ++n) CHECK_CLOSE(to_compute(bank[n]), expected[n], tolerance);
  for (std::int64_t row = 0; with_filled && row < K; ++row)
    CHECK(filled[row] == expected_filled[row]);
}

}  // namespace

int main() {
  for (const bool with_filled : {false, true}) {
    for (const int num_threads : {1, 2, 5}) {
      for (int isa = 0; isa <= static_cast<int>(widest_isa()); ++isa) {
        test_against_definition<float>(DType::kFloat32, 1e-6, with_filled, num_threads, Isa(isa));
        test_against_definition<double>(DType::kFloat64, 1e-15, with_filled, num_threads, Isa(isa));
        test_against_definition<BFloat16>(DType::kBFloat16, 0.01, with_filled, num_threads,
                                          Isa(isa));
        test_against_definition<Float16>(DType::kFloat16, 0.001, with_filled, num_threads,
                                         Isa(isa));
      }
    }
  }
  return check::exit_code();
}
