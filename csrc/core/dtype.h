// The floating-point types of tensors and their conversion to the type that is computed in (float, or double for double).
// On the CPU the conversions are integer arithmetic without branches, which vectorises; GCC 12 does not vectorise _Float16.
#pragma once

#include <cstdint>

#include "core/config.h"

namespace fastkd {

enum class DType : int { f32, f64, f16, bf16 };

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

inline namespace FASTKD_TARGET {

template <class T>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};
template <class T>
using accumulate_t = typename Accumulate<T>::type;

template <class T>
constexpr bool is_half = false;
template <>
constexpr bool is_half<Half> = true;

FASTKD_HD int64_t bytes_of(DType type) { return type == DType::f64 ? 8 : type == DType::f32 ? 4 : 2; }

FASTKD_HD float bits_to_float(uint32_t bits) { return __builtin_bit_cast(float, bits); }
FASTKD_HD uint32_t float_to_bits(float value) { return __builtin_bit_cast(uint32_t, value); }

FASTKD_HD float load_as(float value) { return value; }
FASTKD_HD double load_as(double value) { return value; }

FASTKD_HD float load_as(BFloat16 value) { return bits_to_float(uint32_t(value.bits) << 16); }

FASTKD_HD float load_as(Half value) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
  return result;
#else
  const uint32_t magnitude = uint32_t(value.bits & 0x7fff) << 13;
  const uint32_t finite = float_to_bits(bits_to_float(magnitude) * 0x1p112f);
  const uint32_t result = magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : finite;  // infinite and NaN
  return bits_to_float(result | uint32_t(value.bits & 0x8000) << 16);
#endif
}

FASTKD_HD void store_as(float& to, float value) { to = value; }
FASTKD_HD void store_as(double& to, double value) { to = value; }

FASTKD_HD void store_as(BFloat16& to, float value) {
#if defined(__CUDA_ARCH__)
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(to.bits) : "f"(value));
#else
  const uint32_t bits = float_to_bits(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest, ties to even
  to.bits = uint16_t((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
#endif
}

FASTKD_HD void store_as(Half& to, float value) {
#if defined(__CUDA_ARCH__)
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(to.bits) : "f"(value));
#else
  const uint32_t bits = float_to_bits(value);
  const uint32_t magnitude = bits & 0x7fffffffu;
  // Below 2^-14 the sum with 0.5 leaves the subnormal's bits, rounded to nearest even, at the end of the mantissa.
  const uint32_t small = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t large = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t rounded = magnitude < 0x38800000u ? small : normal;
  to.bits = uint16_t((magnitude >= 0x47800000u ? large : rounded) | ((bits >> 16) & 0x8000u));
#endif
}

}  // namespace FASTKD_TARGET
}  // namespace fastkd
