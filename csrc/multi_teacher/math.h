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
  // Both in one sum: it is exactly 0 where student and teacher are the same.
  FASTKD_HD void rebase(A new_max, A student_growth, A inv_t) {
    const A fall = base_of(max) - base_of(new_max);
    const A factor = z == 0 ? A(0) : exp_negative(fall < 0 ? fall * inv_t : A(0));
    a = factor * (z == 0 ? a : a + z * (fall + student_growth) * inv_t);
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

// The largest magnitude that an element of a row's gradient can have; `weights` = sum_k |w_k scale_k|.
template <class A>
FASTKD_HD A gradient_bound(Combine combine, A weights, A one_scale, A ce_weight) {
  return (combine == Combine::logits ? magnitude(one_scale) : weights) + magnitude(ce_weight);
}

}  // namespace FASTKD_TARGET
}  // namespace fastkd::multi_teacher
