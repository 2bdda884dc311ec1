// Vectors of the instruction set that the including file is compiled for, in the compiler's own
// vector extension. Include only from files that are compiled once per instruction set: everything
// is in an unnamed namespace.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__F16C__)
#include <immintrin.h>  // its functions are always inlined: no symbol leaves this file
#endif

#include "storage.h"

namespace codir_fast {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <typename C>
struct Simd;

template <>
struct Simd<float> {
  using Int = std::int32_t;
  typedef float Vec __attribute__((vector_size(kVectorBytes)));
  typedef Int IntVec __attribute__((vector_size(kVectorBytes)));
};

template <>
struct Simd<double> {
  using Int = std::int64_t;
  typedef double Vec __attribute__((vector_size(kVectorBytes)));
  typedef Int IntVec __attribute__((vector_size(kVectorBytes)));
};

template <typename C>
using Vec = typename Simd<C>::Vec;
template <typename C>
using IntVec = typename Simd<C>::IntVec;
template <typename C>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(C));

template <typename V, typename Element>
inline V load(const Element* from) {
  V value;
  std::memcpy(&value, from, sizeof(V));
  return value;
}

template <typename V, typename Element>
inline void store(Element* to, V value) {
  std::memcpy(to, &value, sizeof(V));
}

template <typename C>
inline Vec<C> splat(C value) {
  return value - Vec<C>{};  // value + 0 would turn -0 into 0
}

// The value as rounded: without it the compiler may fuse a product with the sum that follows, which
// then sees it exact.
template <typename V>
inline V rounded(V value) {
#if defined(__AVX512F__)
  asm("" : "+v"(value));
#elif defined(__SSE2__)
  asm("" : "+x"(value));
#elif defined(__aarch64__)
  asm("" : "+w"(value));
#else
  asm("" : "+m"(value));
#endif
  return value;
}

// e^x for x <= 88 (float) or 709 (double): within 2 ulp, 0 where the result would not be a normal
// number, NaN for NaN. x = n ln 2 + r with |r| <= ln 2 / 2; n is rounded by adding 1.5 *
// 2^mantissa, whose low bits are then n.
inline Vec<float> exp(Vec<float> x) {
  constexpr float kMagic = 0x1.8p23f, kLowest = -87.33f;
  const Vec<float> bounded = x < kLowest ? splat(kLowest) : x;
  const Vec<float> shifted = bounded * 1.44269504f + kMagic;
  const Vec<float> n = shifted - kMagic;
  const Vec<float> r = (bounded - n * 0.693359375f) + n * 2.12194440e-4f;
  Vec<float> p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const IntVec<float> exponent = ((IntVec<float>)shifted + 127) << 23;
  const Vec<float> power = p * (Vec<float>)exponent;
  return x < kLowest ? Vec<float>{} : power;
}

inline Vec<double> exp(Vec<double> x) {
  constexpr double kMagic = 0x1.8p52, kLowest = -708.39;
  const Vec<double> bounded = x < kLowest ? splat(kLowest) : x;
  const Vec<double> shifted = bounded * 1.4426950408889634 + kMagic;
  const Vec<double> n = shifted - kMagic;
  const Vec<double> r = (bounded - n * 6.93147180369123816490e-1) - n * 1.90821492927058770002e-10;
  // Taylor to r^13: the next term is below 5e-18 of the result.
  constexpr double kInverseFactorial[] = {
      1.0 / 6227020800, 1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40320,
      1.0 / 5040,       1.0 / 720,       1.0 / 120,      1.0 / 24,      1.0 / 6,      0.5};
  Vec<double> p = splat(kInverseFactorial[0]);
#pragma GCC unroll 12
  for (int k = 1; k < 12; ++k) p = p * r + kInverseFactorial[k];
  p = p * (r * r) + r + 1.0;
  const IntVec<double> exponent = ((IntVec<double>)shifted + 1023) << 52;
  const Vec<double> power = p * (Vec<double>)exponent;
  return x < kLowest ? Vec<double>{} : power;
}

// log(1 + x) for 0 <= x <= 1: within 2 ulp, x where x is tiny, NaN for NaN. It is 2 atanh(z) with z
// = x / (2 + x) <= 1/3, and 2z = x - xz; the first term left out of atanh(z) / z, z^(2 kTerms + 2)
// / (2 kTerms + 3), is below 0.2 ulp.
template <typename C>
inline Vec<C> log1p(Vec<C> x) {
  constexpr int kTerms = sizeof(C) == 4 ? 7 : 15;
  const Vec<C> z = x / (x + C{2}), w = z * z;
  Vec<C> p = splat(C{2} / (2 * kTerms + 1));
#pragma GCC unroll 16
  for (int k = kTerms - 1; k > 0; --k) p = p * w + C{2} / (2 * k + 1);
  return x - z * (x - p * w);
}

template <typename C, typename T>
void convert(C* out, const T* in, std::int64_t size) {
  for (std::int64_t n = 0; n < size; ++n) out[n] = static_cast<C>(to_compute(in[n]));
}

#if defined(__F16C__)
// One instruction for what takes a dozen without F16C.
inline void convert(float* out, const Float16* in, std::int64_t size) {
  std::int64_t n = 0;
  for (; n + 8 <= size; n += 8) {
    _mm256_storeu_ps(out + n, _mm256_cvtph_ps(load<__m128i>(in + n)));
  }
  for (; n < size; ++n) out[n] = to_compute(in[n]);
}
#endif

}  // namespace
}  // namespace codir_fast
