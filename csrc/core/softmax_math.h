// The arithmetic of divergences and cross-entropies of one row, shared by operations, CPU and CUDA. Derivation:
// csrc/multi_teacher/README.md.
#pragma once

#include "core/exp_log.h"
#include "core/math.h"

namespace fastkd {
inline namespace FASTKD_TARGET {

// KL(p || q) from sums relative to each network's own maximum: z_t = sum e_t, a = sum e_t (x_t - x_s), z_s = sum e_s,
// with x = (logit - maximum) / T and e = exp(x). Below zero is rounding; NaN stays.
template <class A>
FASTKD_HD A divergence(A a, A z_t, A z_s) {
  const A value = a / z_t + natural_log(z_s / z_t);
  return value < 0 ? A(0) : value;
}

// e (x_t - x_s), one class's part of a. Where e underflows the class counts 0, however large x_t - x_s is: classes are also
// masked by the most negative finite number. Infinite where only the student is -inf.
template <class A>
FASTKD_HD A masked_gap(A e, A x_t, A gap) {
  return x_t < kLowestExponent<A> && !(gap == A(kInf)) ? A(0) : e * gap;
}

template <class A>
FASTKD_HD A weighted_gap(A e, A x_t, A x_s) {
  return masked_gap(e, x_t, x_t - x_s);
}

// (d - 1) e^d + 1 for small d: the class's part of KL(p || q) is q of it at d = log(p / q). Of KL(q || p), p of it at -d.
template <class A>
FASTKD_HD A near_gap(A d) {
  return d * d *
         (A(1. / 2) +
          d * (A(1. / 3) + d * (A(1. / 8) + d * (A(1. / 30) + d * (A(1. / 144) + d * (A(1. / 840) + d * A(1. / 5760)))))));
}
template <class A>
constexpr A kNearGap = sizeof(A) == 4 ? A(0x1p-2) : A(0x1p-5);

// Below this, divergence() has lost digits: what cancels in it was rounded by 1e-7 of its size. kl_part() loses none.
constexpr double kNearDivergence = 0x1p-6;

// One class's part of KL(p || q) as p d - p + q, d = log(p / q), of a row whose divergence is finite: no part is below 0, so
// that nothing cancels between near networks, and their sum is the divergence. p and q in units of the student's exponentials.
// d is infinite or NaN where a class is masked, and p is 0 there.
template <class A>
FASTKD_HD A kl_part(A p, A q, A d) {
  constexpr A kMost = A(0x1p+100);  // far above any finite d that counts, and finite times a p of 0
  d = d > -kMost ? d : -kMost;  // so is NaN, of two masked classes
  d = d < kMost ? d : kMost;
  const A near = q * near_gap(d);
  return d * d <= kNearGap<A> * kNearGap<A> ? near : (p * d - p) + q;
}

// Cross-entropy with label smoothing: z = sum exp(s - max), x_target = s_target - max, sum = sum_c (s_c - max).
template <class A>
FASTKD_HD A cross_entropy(A z, A x_target, A sum, A smoothing, int64_t classes) {
  const A log_z = natural_log(z);
  A value = (1 - smoothing) * (log_z - x_target);
  if (smoothing > 0) value += smoothing * (log_z - sum / A(classes));
  return value;
}

// The same with probabilities y as labels: mass = sum y, along = sum y (s - max).
template <class A>
FASTKD_HD A cross_entropy_of_soft(A z, A mass, A along, A sum, A smoothing, int64_t classes) {
  const A log_z = natural_log(z);
  A value = (1 - smoothing) * (mass * log_z - along);
  if (smoothing > 0) value += smoothing * (log_z - sum / A(classes));
  return value;
}

// One class's part of `along`: a class of probability 0 adds nothing, be it masked or not.
template <class A>
FASTKD_HD A soft_part(A y, A x) {
  return y == 0 ? A(0) : y * x;
}

// The factor of KL in the loss, and of (q - p) in the gradient, at one temperature.
template <class A>
struct Scale {
  A loss, grad;
};
template <class A>
FASTKD_HD Scale<A> temperature_scale(double t, bool scale_by_t2) {
  return scale_by_t2 ? Scale<A>{A(t * t), A(t)} : Scale<A>{A(1), A(1 / t)};
}

// What exponentials are taken relative to: the maximum, or 0 where that is -inf, so that every difference of bases is finite.
template <class A>
FASTKD_HD A base_of(A max) {
  return max == -A(kInf) ? A(0) : max;
}

// A weight of 0 also removes an infinite divergence.
template <class A>
FASTKD_HD A weighted(A weight, A scale, A kl) {
  return weight == 0 && kl == A(kInf) ? A(0) : weight * scale * kl;
}

// A power of two that brings gradients bounded by `bound` near 2^15: stored in float16 without it, small ones are lost.
FASTKD_HD float half_scale(float bound) {
  if (!(bound > 0x1p-14f)) bound = 0x1p-14f;
  if (!(bound < 0x1p+30f)) bound = 0x1p+30f;
  const uint32_t exponent = float_to_bits(bound) >> 23;  // bound < 2^(exponent - 126)
  return bits_to_float((127u + 15u + 126u - exponent) << 23);
}

// An integer T up to kMostIntegerT gives exp(s - max) as a power of exp((s - max) / T): no second exponential.
constexpr int kMostIntegerT = 6;

// T where it is such an integer, else 0.
FASTKD_HD int integer_temperature(double t) { return t >= 1 && t <= kMostIntegerT && t == int(t) ? int(t) : 0; }

template <class A>
FASTKD_HD A integer_power(A e, int t) {
  const A e2 = e * e;
  switch (t) {
    case 1: return e;
    case 2: return e2;
    case 3: return e2 * e;
    case 4: return e2 * e2;
    case 5: return e2 * e2 * e;
    default: return e2 * e2 * e2;
  }
}

// exp(s - max), from e = exp((s - max) / T) where integer_temperature(T) is not 0.
template <class A>
FASTKD_HD A exponential_at_one(int integer_t, A above_max, A e) {
  return integer_t ? integer_power(e, integer_t) : exp_negative(above_max);
}

}  // namespace FASTKD_TARGET
}  // namespace fastkd
