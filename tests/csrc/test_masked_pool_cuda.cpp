// The CUDA kernels of masked_pool without a GPU: their own source in the emulator, against the
// definition in double.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <limits>
#include <random>
#include <vector>

#include "check.h"
#include "masked_pool_cuda_impl.h"

using namespace codir_fast;

namespace {

const PoolMode kModes[] = {PoolMode::kMean, PoolMode::kFirst, PoolMode::kLast, PoolMode::kMax};

struct Case {
  int L, B, T, H;
  int pad_t;        // elements between tokens beside H: strides that are not dense
  int first_layer;  // of the launch, in an operator with more layers
  bool has_mask, mask_is_byte, has_nan;
};

template <typename T>
T element(double value) {
  T out;
  pool::narrow(static_cast<pool::Wide<T>>(value), &out);
  return out;
}

template <typename T, int kVector>
void launch(pool::PoolArguments& a, int layers, PoolMode mode, bool backward) {
  const int chunks = (a.H + pool::kLanes * kVector - 1) / (pool::kLanes * kVector);
  std::vector<double> exchange(pool::exchange_bytes<T, kVector>() / sizeof(double) + 1, NAN);
  sm90::emulator::launch(layers * a.B * chunks, pool::kThreads, 0, false, 5, [&] {
    if (backward)
      pool::pool_backward<T, kVector>(a, mode, exchange.data());
    else
      pool::pool_forward<T, kVector>(a, mode, exchange.data());
  });
}

template <typename T>
void launch(pool::PoolArguments& a, int layers, PoolMode mode, bool backward, int vector) {
  CHECK(pool::vector_size<T>(a, backward) == vector);
  if (vector == 1)
    launch<T, 1>(a, layers, mode, backward);
  else
    launch<T, 16 / sizeof(T)>(a, layers, mode, backward);
}

template <typename T>
void test_case(const Case& c, PoolMode mode, double eps) {
  std::mt19937 random(7);
  std::normal_distribution<double> normal;
  const int all_layers = c.first_layer + c.L, stride_t = c.H + c.pad_t;
  const std::int64_t stride_b = std::int64_t{c.T + 1} * stride_t;
  std::vector<std::vector<T>> layers(c.L, std::vector<T>(c.B * stride_b + 16));
  std::vector<std::vector<T>> dhidden(c.L, std::vector<T>(c.B * c.T * c.H + 16));
  std::vector<std::uint8_t> bytes(c.B * c.T);
  std::vector<std::int64_t> longs(c.B * c.T);
  for (int n = 0; n < c.B * c.T; ++n) {
    bytes[n] = random() % 3 != 0 && n / c.T != 1;  // row 1 has no real token
    longs[n] = bytes[n] * 5;
  }
  const auto is_real = [&](int b, int t) { return !c.has_mask || bytes[b * c.T + t]; };
  const T nan = element<T>(NAN);
  const auto aligned = [](std::vector<T>& memory) {
    const std::size_t off = reinterpret_cast<std::uintptr_t>(memory.data()) % 16;
    return memory.data() + (off == 0 ? 0 : (16 - off) / sizeof(T));
  };
  pool::PoolArguments a{};
  for (int l = 0; l < c.L; ++l) {
    for (T& x : layers[l]) x = element<T>(std::round(4 * normal(random)) / 4);  // ties
    T* data = aligned(layers[l]);
    for (int b = 0; b < c.B; ++b) {
      for (int t = 0; t < c.T; ++t) {
        T* token = data + b * stride_b + t * stride_t;
        if (!is_real(b, t)) std::fill(token, token + c.H, nan);
        if (c.has_nan && random() % 4 == 0) token[random() % c.H] = nan;
        if (c.has_nan && b == 0)
          token[c.H / 2] = element<T>(-INFINITY);  // a column of nothing else
      }
    }
    a.layers[l] = {data, stride_b, stride_t};
    std::fill(dhidden[l].begin(), dhidden[l].end(), nan);
    a.dhidden[l] = aligned(dhidden[l]);
  }
  std::vector<T> pooled(c.B * all_layers * c.H, nan), grad(pooled.size());
  std::vector<std::int64_t> argmax(pooled.size(), -7);
  for (T& x : grad) x = element<T>(normal(random));
  if (c.has_mask)
    a.mask = {c.mask_is_byte ? static_cast<void*>(bytes.data()) : longs.data(), c.mask_is_byte, c.T,
              1};
  a.pooled = pooled.data(), a.argmax = argmax.data();
  a.first_layer = c.first_layer, a.L = all_layers, a.B = c.B, a.T = c.T, a.H = c.H;
  constexpr int kVector = 16 / sizeof(T);
  launch<T>(a, c.L, mode, false, c.H % kVector == 0 && stride_t % kVector == 0 ? kVector : 1);
  a.pooled = grad.data();
  if (c.T > 0) launch<T>(a, c.L, mode, true, c.H % kVector == 0 ? kVector : 1);

  const auto same = [](double got, double expected, double tolerance) {
    return (std::isnan(got) && std::isnan(expected)) || got == expected ||
           std::fabs(got - expected) <= tolerance;
  };
  int wrong = 0;
  for (int l = 0; l < c.L; ++l) {
    for (int b = 0; b < c.B; ++b) {
      std::vector<int> real;
      for (int t = 0; t < c.T; ++t) {
        if (is_real(b, t)) real.push_back(t);
      }
      for (int h = 0; h < c.H; ++h) {
        const T* data = static_cast<const T*>(a.layers[l].data) + b * stride_b + h;
        const auto at = [&](int t) { return static_cast<double>(pool::widen(data[t * stride_t])); };
        const std::size_t out = (std::size_t(b) * all_layers + c.first_layer + l) * c.H + h;
        const double g = pool::widen(grad[out]);
        double expected = 0, size = 0;
        int chosen = -1;
        if (mode == PoolMode::kMean) {
          for (const int t : real) expected += at(t), size += std::fabs(at(t));
          if (!real.empty()) expected /= double(real.size());
        } else if (!real.empty()) {
          chosen = mode == PoolMode::kLast ? real.back() : real[0];
          for (const int t : real) {
            const bool better =
                at(t) > at(chosen) || (std::isnan(at(t)) && !std::isnan(at(chosen)));
            if (mode == PoolMode::kMax && better) chosen = t;
          }
          expected = at(chosen);
        }
        wrong += !same(pool::widen(pooled[out]), expected, eps * (1 + size));
        wrong += mode == PoolMode::kMax && argmax[out] != chosen;
        const T* d = static_cast<const T*>(a.dhidden[l]) + std::size_t(b) * c.T * c.H + h;
        for (int t = 0; t < c.T; ++t) {
          const double right = mode == PoolMode::kMean ? (is_real(b, t) ? g / real.size() : 0.0)
                               : t == chosen           ? g
                                                       : 0.0;
          wrong +=
              !same(pool::widen(d[std::size_t(t) * c.H]), right, eps * std::fabs(right) + 1e-7);
        }
      }
    }
  }
  if (wrong > 0) {
    std::printf("L %d, B %d, T %d, H %d, mode %d, %d bytes: %d wrong\n", c.L, c.B, c.T, c.H,
                static_cast<int>(mode), static_cast<int>(sizeof(T)), wrong);
  }
  CHECK(wrong == 0);
}

}  // namespace

int main() {
  static_assert(2 * pool::kStep < 300, "some texts take several ballots, and slots twice");
  const Case cases[] = {
      {1, 2, 300, 24, 0, 0, false, true, false}, {1, 2, 301, 37, 0, 0, true, true, true},
      {2, 3, 50, 64, 0, 0, true, true, false},   {1, 2, 9, 300, 0, 0, true, false, true},
      {3, 2, 33, 37, 5, 0, true, true, true},    {1, 3, 1, 8, 8, 0, false, true, false},
      {2, 2, 70, 16, 3, 64, true, false, true},  {1, 2, 0, 24, 0, 0, false, true, false}};
  for (const Case& c : cases) {
    for (const PoolMode mode : kModes) {
      test_case<float>(c, mode, 1e-6);
      test_case<double>(c, mode, 1e-14);
      test_case<BFloat16>(c, mode, 1.0 / 256);
      test_case<Float16>(c, mode, 1.0 / 1024);
    }
  }
  return check::exit_code();
}
