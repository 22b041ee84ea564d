// Exponentials of long rows in whole vectors.
#pragma once

#include "core/exp_log.h"
#include "core/math.h"
#include "core/cuda/simt.h"

namespace fastkd {
inline namespace FASTKD_TARGET {

// How exp(s - max) comes from e = exp((s - max) / T): it is not wanted or T = 1; T is 2 or 4; by an exponential of its own.
enum class AtOne { same, power, exponential };

inline AtOne at_one_of(int integer_t, bool cross_entropy) {
  if (!cross_entropy || integer_t == 1) return AtOne::same;
  return integer_t == 2 || integer_t == 4 ? AtOne::power : AtOne::exponential;
}

// The factors of exponents and, for AtOne::power, exp(s - max) = e^2 (second + fourth e^2).
struct Exponents {
  float scale, second, fourth;
};

__device__ __forceinline__ Exponents make_exponents(float inv_t, int integer_t) {
  return {inv_t * kLog2E, integer_t == 2 ? 1.f : 0.f, integer_t == 4 ? 1.f : 0.f};
}

// exp(s - max), from s - max and e.
template <AtOne One>
__device__ __forceinline__ float at_one(const Exponents& c, float above_max, float e) {
  if constexpr (One == AtOne::same) return e;
  if constexpr (One == AtOne::exponential) return exp2_approximate(above_max * kLog2E);
  const float e2 = e * e;
  return e2 * (c.second + c.fourth * e2);
}

// Below this exponent of 2 an exponential is 0, and what it is multiplied by may be anything.
constexpr float kNothing = -126;

template <int N>
__device__ __forceinline__ float largest(float top, const float (&x)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) top = fmaxf(top, x[i]);  // not of NaN, which the exponentials show
  return top;
}

}  // namespace FASTKD_TARGET
}  // namespace fastkd
