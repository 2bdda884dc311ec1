// Element types in memory and the types that arithmetic runs in: bfloat16 and float16 are stored,
// float computes. Conversions round to nearest even. Everything is in an unnamed namespace, so that
// files built for different instruction sets share no symbol.
#pragma once

#include <cstdint>
#include <cstring>

#include "common.h"

namespace codir_fast {
namespace {

struct BFloat16 {
  std::uint16_t bits;
};

struct Float16 {
  std::uint16_t bits;
};

inline float bits_to_float(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline std::uint32_t float_to_bits(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

inline float to_compute(float value) { return value; }
inline double to_compute(double value) { return value; }
inline float to_compute(BFloat16 value) { return bits_to_float(std::uint32_t{value.bits} << 16); }

inline float to_compute(Float16 value) {
  const std::uint32_t sign = std::uint32_t{value.bits & 0x8000u} << 16;
  const std::uint32_t magnitude = value.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return bits_to_float(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
  // Shifted into float's fields the exponent bias is 112 too small; the product mends it,
  // subnormals included.
  return bits_to_float(sign | float_to_bits(bits_to_float(magnitude << 13) * 0x1p112f));
}

inline void from_compute(float value, float* out) { *out = value; }
inline void from_compute(double value, double* out) { *out = value; }

inline void from_compute(float value, BFloat16* out) {
  const std::uint32_t bits = float_to_bits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) {
    out->bits = static_cast<std::uint16_t>((bits >> 16) | 0x40u);  // NaN stays NaN
  } else {
    out->bits = static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
  }
}

inline void from_compute(float value, Float16* out) {
  const std::uint32_t bits = float_to_bits(value);
  const std::uint32_t sign = (bits >> 16) & 0x8000u;
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  std::uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {  // 65520 and above round to infinity
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // below 2^-14: adding 0.5 leaves the subnormal's bits,
                                         // rounded, in the mantissa
    half = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  out->bits = static_cast<std::uint16_t>(sign | half);
}

// Calls run(T*), a null pointer, with the storage type T that dtype names.
template <typename Run>
Status with_storage(DType dtype, const Run& run) {
  switch (dtype) {
    case DType::kFloat32:
      run(static_cast<float*>(nullptr));
      return Status::kOk;
    case DType::kFloat64:
      run(static_cast<double*>(nullptr));
      return Status::kOk;
    case DType::kBFloat16:
      run(static_cast<BFloat16*>(nullptr));
      return Status::kOk;
    case DType::kFloat16:
      run(static_cast<Float16*>(nullptr));
      return Status::kOk;
  }
  return Status::kUnsupportedDType;
}

template <typename T>
using Compute = decltype(to_compute(T{}));

}  // namespace
}  // namespace codir_fast
