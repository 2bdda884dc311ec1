// masked_pool and its backward against sums in double, over modes, dtypes, layers with strides and
// rows without tokens.
#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "check.h"
#include "executors.h"
#include "masked_pool.h"
#include "storage.h"

using namespace codir_fast;

namespace {

constexpr std::int64_t L = 3, B = 5, T = 37, H = 301;
constexpr double kHalfOfSmallestFloat16 = 0x1p-25;
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

struct Mask {
  std::vector<std::int64_t> offsets{0}, tokens;
  RealTokens view() const { return {offsets.data(), tokens.data()}; }
};

// Row 0: all tokens, row 1: none, the others at random.
Mask random_mask(std::mt19937& random) {
  Mask mask;
  for (std::int64_t b = 0; b < B; ++b) {
    for (std::int64_t t = 0; t < T; ++t) {
      if (b == 0 || (b > 1 && random() % 3 != 0)) mask.tokens.push_back(t);
    }
    mask.offsets.push_back(static_cast<std::int64_t>(mask.tokens.size()));
  }
  return mask;
}

template <typename Element>
std::vector<Element> filled(std::size_t size, double value) {
  std::vector<Element> out(size);
  for (Element& element : out) from_compute(static_cast<Compute<Element>>(value), &element);
  return out;
}

template <typename Element>
std::vector<Element> normal(std::size_t size, std::mt19937& random) {
  std::normal_distribution<double> distribution;
  std::vector<Element> out(size);
  for (Element& element : out)
    from_compute(static_cast<Compute<Element>>(distribution(random)), &element);
  return out;
}

// The weight of token t in the pooled value, from the definition.
double weight_of(PoolMode mode, const std::int64_t* tokens, std::int64_t count, std::int64_t t,
                 std::int64_t best) {
  const bool real = std::find(tokens, tokens + count, t) != tokens + count;
  if (!real) return 0;
  if (mode == PoolMode::kMean) return 1.0 / static_cast<double>(count);
  if (mode == PoolMode::kFirst) return t == tokens[0];
  if (mode == PoolMode::kLast) return t == tokens[count - 1];
  return t == best;
}

template <typename Element>
void test_mode(DType dtype, PoolMode mode, double epsilon, int num_threads, Isa isa) {
  std::mt19937 random(7);
  const Mask mask = random_mask(random);
  // Token rows are H + 3 apart, batch rows T + 1 tokens apart.
  const std::int64_t stride_t = H + 3, stride_b = (T + 1) * stride_t;
  std::vector<std::vector<Element>> storage;
  std::vector<HiddenState> layers;
  for (std::int64_t l = 0; l < L; ++l) storage.push_back(normal<Element>(B * stride_b, random));
  for (const auto& layer : storage) layers.push_back({layer.data(), stride_b, stride_t});

  std::vector<Element> pooled = filled<Element>(B * L * H, kNan);
  std::vector<std::int64_t> argmax(B * L * H, -7);
  const Executor executor = threads(num_threads);
  CHECK(masked_pool_cpu(pooled.data(), argmax.data(), layers.data(), mask.view(), L, B, H, dtype,
                        mode, executor, isa) == Status::kOk);
  const std::vector<Element> grad = normal<Element>(B * L * H, random);
  std::vector<Element> dhidden = filled<Element>(L * B * T * H, kNan);
  std::vector<void*> by_layer;
  for (std::int64_t l = 0; l < L; ++l) by_layer.push_back(&dhidden[l * B * T * H]);
  CHECK(masked_pool_backward_cpu(by_layer.data(), grad.data(),
                                 mode == PoolMode::kMax ? argmax.data() : nullptr, mask.view(), L,
                                 B, T, H, dtype, mode, executor, isa) == Status::kOk);

  for (std::int64_t l = 0; l < L; ++l) {
    for (std::int64_t b = 0; b < B; ++b) {
      const std::int64_t* tokens = mask.tokens.data() + mask.offsets[b];
      const std::int64_t count = mask.offsets[b + 1] - mask.offsets[b];
      for (std::int64_t h = 0; h < H; ++h) {
        const auto value = [&](std::int64_t t) {
          return static_cast<double>(to_compute(storage[l][b * stride_b + t * stride_t + h]));
        };
        std::int64_t best = -1;
        for (std::int64_t n = 0; n < count; ++n) {
          if (best < 0 || value(tokens[n]) > value(best)) best = tokens[n];
        }
        const std::int64_t column = (b * L + l) * H + h;
        if (mode == PoolMode::kMax) CHECK(argmax[column] == best);
        double expected = 0;
        for (std::int64_t t = 0; t < T; ++t) {
          const double weight = weight_of(mode, tokens, count, t, best);
          expected += weight * value(t);
          const double gradient = weight * static_cast<double>(to_compute(grad[column]));
          CHECK_CLOSE(to_compute(dhidden[((l * B + b) * T + t) * H + h]), gradient,
                      epsilon * std::abs(gradient) + kHalfOfSmallestFloat16);
        }
        CHECK_CLOSE(to_compute(pooled[column]), expected, 4 * epsilon);
      }
    }
  }
}

void test_first_nan_is_the_maximum() {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const std::vector<float> states{1, nan, 3, nan};
  const HiddenState layer{states.data(), 4, 1};
  const std::vector<std::int64_t> offsets{0, 4}, tokens{0, 1, 2, 3};
  float pooled = 0;
  std::int64_t argmax = -7;
  masked_pool_cpu(&pooled, &argmax, &layer, {offsets.data(), tokens.data()}, 1, 1, 1,
                  DType::kFloat32, PoolMode::kMax, Executor{});
  CHECK(std::isnan(pooled));
  CHECK(argmax == 1);
}

void test_float16_rounds_to_nearest_even() {
  const auto half = [](float value) {
    Float16 out;
    from_compute(value, &out);
    return out.bits;
  };
  CHECK(half(1.0f) == 0x3c00 && half(-2.0f) == 0xc000);
  CHECK(half(65519.0f) == 0x7bff && half(65520.0f) == 0x7c00);
  CHECK(half(0x1p-24f) == 0x0001 && half(0x1p-25f) == 0x0000 && half(0x1.8p-24f) == 0x0002);
  CHECK(half(1 + 0x1p-11f) == 0x3c00 && half(1 + 0x1.8p-10f) == 0x3c02);
  for (std::uint32_t bits = 0; bits < 0x10000; ++bits) {
    const float value = to_compute(Float16{static_cast<std::uint16_t>(bits)});
    if (!std::isnan(value)) CHECK(half(value) == bits);
  }
}

}  // namespace

int main() {
  for (const PoolMode mode : {PoolMode::kMean, PoolMode::kFirst, PoolMode::kLast, PoolMode::kMax}) {
    for (const int num_threads : {1, 3, 8}) {  // 8: more than rows can feed, which are cut
      for (int set = 0; set <= static_cast<int>(widest_isa()); ++set) {
        const Isa isa = static_cast<Isa>(set);
        test_mode<float>(DType::kFloat32, mode, 0x1p-23, num_threads, isa);
        test_mode<double>(DType::kFloat64, mode, 0x1p-52, num_threads, isa);
        test_mode<BFloat16>(DType::kBFloat16, mode, 0x1p-8, num_threads, isa);
        test_mode<Float16>(DType::kFloat16, mode, 0x1p-11, num_threads, isa);
      }
    }
  }
  test_first_nan_is_the_maximum();
  test_float16_rounds_to_nearest_even();
  return check::exit_code();
}
