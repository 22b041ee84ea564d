// What multi_teacher adds to the arithmetic of core/softmax_math.h. Derivation: README.md here.
#pragma once

#include "core/softmax_math.h"
#include "multi_teacher/op.h"

namespace fastkd::multi_teacher {
inline namespace FASTKD_TARGET {

// Sums of one teacher over the part of a row that was read so far, relative to running bases instead of the maxima.
template <class A>
struct RunningTeacher {
  A max, z, a;

  // New maximum of the teacher, and the growth of the student's base: x_s falls by it, so that `a` gains z times it.
  // Both in one sum: it is exactly 0 where student and teacher are the same. What was so far below that its exponentials are 0
  // is gone, however far it moved: a part masked by the most negative finite number.
  FASTKD_HD void rebase(A new_max, A student_growth, A inv_t) {
    const A fall = base_of(max) - base_of(new_max), down = fall < 0 ? fall * inv_t : A(0);
    const A factor = z == 0 || down < kLowestExponent<A> ? A(0) : exp_negative(down);
    a = factor == 0 ? A(0) : factor * (a + z * (fall + student_growth) * inv_t);
    z = rounded_product(z, factor);
    max = new_max;
  }

  // One class: x_t and x_s relative to the bases, at T = 1. A difference times 1 / T, not a difference of products, which
  // a fused multiply-add would round apart for equal networks.
  FASTKD_HD void push(A x_t, A x_s, A inv_t) {
    const A x = x_t * inv_t, e = exp_negative(x);
    z += e;
    a += masked_gap(e, x, (x_t - x_s) * inv_t);
  }
};

// p log(p / q) - p + q: one class's part of KL(p || q) where p and q sum to 1 each. None is below 0, so that nothing cancels
// between near networks. q = e / z and e = exp(x), the student's. A masked class counts 0, and so does one whose p
// underflows; infinite where only the student is -inf.
template <class A>
FASTKD_HD A mixture_gap(A p, A x, A e, A z, A inv_z) {
  constexpr A kNear = sizeof(A) == 4 ? A(0x1p-3) : A(0x1p-8);
  constexpr A kLeast = A(0x1p-86), kLogLeast = A(-59.61065752815529);  // so that every quotient is a normal number
  const A q = e * inv_z, r = (q - p) / p;
  // r - log(1 + r) for small r.
  const A series =
      r * r *
      (A(1. / 2) - r * (A(1. / 3) - r * (A(1. / 4) - r * (A(1. / 5) - r * (A(1. / 6) - r * (A(1. / 7) - r * A(1. / 8)))))));
  const A below = x < kLogLeast ? x - kLogLeast : A(0);  // what exp cannot show
  const A log_ratio = log_positive((e < kLeast ? kLeast : e) / (p * z)) + below;
  const A value = magnitude(r) <= kNear ? p * series : (q - p) - p * log_ratio;
  const A counted = p < A(0x1p-120) ? q : value;
  return p > 0 && x == -A(kInf) ? A(kInf) : counted;
}

// KL(w p || q) from the sum of mixture_gap() over the classes. Below zero is rounding; NaN stays.
template <class A>
FASTKD_HD A mixture_divergence(A gap, A weight) {
  return weight * ((gap < 0 ? A(0) : gap) + (weight == 1 ? A(0) : natural_log(weight)));
}

}  // namespace FASTKD_TARGET
}  // namespace fastkd::multi_teacher
