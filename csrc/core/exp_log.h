// exp and log without branches and calls, so that `#pragma omp simd` vectorises them on the CPU; CUDA has its own, which the
// host's run of the kernels (tests/simt) follows.
// The compiler flags matter: with -fassociative-math the rounding constants below would be optimised away.
#pragma once

#include <math.h>

#include <cstdint>

#include "core/dtype.h"

namespace fastkd {
inline namespace FASTKD_TARGET {

constexpr float kInf = __builtin_inff();

// Below this, e^x is no normal number; exp_negative stays there.
template <class A>
constexpr A kLowestExponent = A(-708);
template <>
constexpr float kLowestExponent<float> = -87.f;

constexpr float kLog2E = 1.44269504f;

#if defined(__CUDACC__) || defined(FASTKD_BACKEND_SIMT)
// 2^y within 2^-22, one instruction; 0 where that is no normal number. The host's is off as the device's may be: smoothly
// between the 64 points of a table, by 2^-24, since expf(), that instruction and a shift, is documented within 1 ulp.
FASTKD_HD float exp2_approximate(float y) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(y));
  return result;
#else
  if (y < -126.f) return 0.f;
  const double place = (y - ::floor(double(y))) * 64, u = 2 * (place - ::floor(place)) - 1;
  return float(::exp2(double(y)) * (1 + 2.6 * 0x1p-24 * (u * u * u - u)));
#endif
}
#endif

// e^x for x <= 0 (or NaN): 1 ulp, on CUDA 2^-22 + |x| 2^-24, what x itself is rounded by. Exactly 0 for -inf; a finite x gives
// at least the smallest normal number, so that a product with an infinite factor stays infinite.
FASTKD_HD float exp_negative(float x) {
#if defined(__CUDACC__) || defined(FASTKD_BACKEND_SIMT)
#if defined(__CUDA_ARCH__)
  float bounded;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(bounded) : "f"(x), "f"(kLowestExponent<float>));
#else
  const float bounded = x < kLowestExponent<float> ? kLowestExponent<float> : x;
#endif
  const float e = exp2_approximate(bounded * kLog2E);
  return x == -kInf ? 0.f : e;
#else
  const float bounded = x < kLowestExponent<float> ? kLowestExponent<float> : x;
  const float magic = 12583039.f;  // 1.5 * 2^23 + 127: adding it rounds to an integer, which lands biased in the low bits
  const float shifted = bounded * kLog2E + magic, n = shifted - magic;
  const float r = (bounded - n * 0.693359375f) - n * -2.12194440e-4f;  // n * the first part of log(2) is exact
  float p = 1.39262508315e-3f;  // (e^r - 1 - r) / r^2 within 1e-8 for |r| <= log(2) / 2
  p = p * r + 8.36323288368e-3f;
  p = p * r + 4.1666554213e-2f;
  p = p * r + 1.66665766661e-1f;
  p = p * r + 0.5f;
  p = p * r + 1.f;
  p = p * r + 1.f;
  // 2^n as a factor, not added to p's exponent bits: that would turn some NaNs into numbers.
  const float power = bits_to_float(float_to_bits(shifted) << 23);
  return x == -kInf ? 0.f : p * power;
#endif
}

FASTKD_HD double exp_negative(double x) {
  const double bounded = x < kLowestExponent<double> ? kLowestExponent<double> : x;
  return x == -__builtin_inf() ? 0. : ::exp(bounded);
}

// log(x) for a normal x > 0; x = 0 and NaN give something finite or NaN, to be masked by the caller.
FASTKD_HD float log_positive(float x) {
#if defined(__CUDA_ARCH__)
  return logf(x);
#else
  const uint32_t bits = float_to_bits(x) - 0x3f3504f3u;  // relative to sqrt(1/2)
  const float e = float(int32_t(bits) >> 23);
  const float m = bits_to_float((bits & 0x007fffffu) + 0x3f3504f3u) - 1.f;
  float p = 7.0376836292e-2f;
  p = p * m - 1.1514610310e-1f;
  p = p * m + 1.1676998740e-1f;
  p = p * m - 1.2420140846e-1f;
  p = p * m + 1.4249322787e-1f;
  p = p * m - 1.6668057665e-1f;
  p = p * m + 2.0000714765e-1f;
  p = p * m - 2.4999993993e-1f;
  p = p * m + 3.3333331174e-1f;
  const float square = m * m;
  const float tail = p * m * square + e * -2.12194440e-4f - 0.5f * square;
  return (m + tail) + e * 0.693359375f;
#endif
}

FASTKD_HD double log_positive(double x) { return ::log(x); }

}  // namespace FASTKD_TARGET
}  // namespace fastkd
