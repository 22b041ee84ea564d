// The arithmetic of one pair and one triplet, shared by CPU and CUDA. Derivation: README.md here.
#pragma once

#include <math.h>

#include "relational/op.h"

namespace fastkd::relational {
inline namespace FASTKD_TARGET {

// Below this part of |x_a|^2 + |x_b|^2 a squared distance is summed from the differences: the Gram form has lost 14 bits.
constexpr double kNear = 0x1p-14;

FASTKD_HD bool is_near(double square, double norms) { return square < kNear * norms; }

// Of rows of magnitude 1: squares of floats below may have underflowed.
constexpr double kTinySquare = 0x1p-96;

// The power of two that brings the largest magnitude into [1, 2); 1 for zeros and where it is not finite.
FASTKD_HD double row_scale(double top) {
  const bool scaled = top > 0 && top < double(__builtin_huge_val());
  const int up = scaled ? -::ilogb(top) : 0;
  return ::ldexp(1., up > 1022 ? 1022 : up);  // of subnormal doubles it would overflow
}

// Relative to the mean; everything is 0 where all rows are equal.
FASTKD_HD double inverse_mean(double mean) { return mean == 0 ? 0. : 1 / mean; }

// What planes hold of one squared distance, relative to the squared mean.
template <class A>
struct Plane {
  A hi, lo, inv;
};

template <class A>
FASTKD_HD Plane<A> plane_of(double square, double eps) {
  const A hi = A(square);
  // A NaN is no short side.
  return {hi, A(square - double(hi)), square <= eps * eps ? A(0) : A(::sqrt(0.5 / square))};
}

template <class A>
FASTKD_HD A huber_slope(A difference) {
  return difference > 1 ? A(1) : difference < -1 ? A(-1) : difference;
}

// Huber loss of a difference with this slope.
template <class A>
FASTKD_HD A huber(A difference, A slope) {
  return slope * (difference - A(0.5) * slope);
}

// a + b - c for the squared sides of a triangle. Where a or b is short the two others nearly cancel, and their difference
// is exact; `lo` holds what float left out of each.
template <class A>
FASTKD_HD A doubled_product(A a, A a_lo, A b, A b_lo, A c, A c_lo) {
  const A longer = a > b ? a : b, shorter = a > b ? b : a;
  const A sum = (longer - c) + shorter;
  if constexpr (sizeof(A) == sizeof(double)) return sum;
  return sum + ((a_lo - c_lo) + b_lo);
}

// A product that is not contracted with the difference it goes into, so that the difference of two equal ones is exactly 0.
// On the CPU it may be: the vectoriser knows no such barrier, and the loss of equal networks is the square of a rounding.
FASTKD_HD float rounded_product(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#elif defined(FASTKD_BACKEND_SIMT) && defined(__GNUC__) && __GNUC__ >= 12
  return __builtin_assoc_barrier(a * b);
#else
  return a * b;
#endif
}
FASTKD_HD double rounded_product(double a, double b) {
#if defined(__CUDA_ARCH__)
  return __dmul_rn(a, b);
#elif defined(FASTKD_BACKEND_SIMT) && defined(__GNUC__) && __GNUC__ >= 12
  return __builtin_assoc_barrier(a * b);
#else
  return a * b;
#endif
}

// One vertex j, two sides to i and k: the difference of the cosines, its loss, and the derivatives by the student's squared
// sides jk, ji (without sign) and ik (whose sign is negative).
template <class A>
struct Triplet {
  A loss, by_side_i, by_side_k, by_opposite;
};

template <class A>
FASTKD_HD Triplet<A> triplet(const Plane<A>& si, const Plane<A>& sk, A s_hi, A s_lo, const Plane<A>& ti, const Plane<A>& tk,
                             A t_hi, A t_lo, A weight) {
  const A product = si.inv * sk.inv;
  const A cosine = rounded_product(doubled_product(si.hi, si.lo, sk.hi, sk.lo, s_hi, s_lo), product);
  const A target = rounded_product(doubled_product(ti.hi, ti.lo, tk.hi, tk.lo, t_hi, t_lo), ti.inv * tk.inv);
  const A difference = cosine - target, slope = huber_slope(difference), weighted = slope * weight;
  const A by_opposite = weighted * product, turn = weighted * cosine;
  return {huber(difference, slope), by_opposite - turn * (si.inv * si.inv), by_opposite - turn * sk.inv * sk.inv, by_opposite};
}

// Both sides the same: the cosine is 1, or 0 for a short side.
template <class A>
FASTKD_HD double same_side_loss(A student_inv, A teacher_inv) {
  return (student_inv == 0) != (teacher_inv == 0) ? 0.5 : 0.;
}

// Half of the triplets were summed, and N^2 is what a vertex's loss is divided by.
FASTKD_HD double vertex_factor(int64_t n) { return 1 / (double(n) * double(n)); }

// From the derivative by a squared distance relative to the mean's square to an element of `laplacian` beside its diagonal.
FASTKD_HD double element_factor(double mean) {
  const double inverse = inverse_mean(mean);
  return -2 * inverse * inverse;
}

// Derivative by the distance over twice the distance: by its square. `correction`: the part that goes through the mean.
FASTKD_HD double distance_by_square(double student, double slope, double weights, double correction) {
  return student == 0 ? 0. : (weights * slope - correction) / (2 * student);
}

}  // namespace FASTKD_TARGET
}  // namespace fastkd::relational
