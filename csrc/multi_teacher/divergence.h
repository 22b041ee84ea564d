// One class's part of the divergences besides forward, and what the sums over classes make. Derivation: README.md here.
#pragma once

#include "multi_teacher/math.h"

namespace fastkd::multi_teacher {
inline namespace FASTKD_TARGET {

// Of one row. pair: a = w_f, b = w_r. mixture: a = w_p, b = w_q and the student's and teacher's shares of m.
template <class A>
struct DivergenceNumbers {
  A a = 0, b = 0, of_teacher = 0, of_student = 0;
};

template <class A>
FASTKD_HD DivergenceNumbers<A> numbers_of(Divergence kind, const double* number) {
  if (kind == Divergence::pair) return {A(number[0]), A(number[1])};
  return {A(number[1]), A(number[2]), A(number[0]), A(1 - number[0])};
}

// What one class adds to two sums, and `push`, from which its gradient is push - q sum push. In units of the student's
// exponentials: a teacher's come times z_s / z_t.
template <class A>
struct ClassPart {
  A first, second, push;
};

// log(1 + y) for -1 < y <= 0.
FASTKD_HD float log_one_plus(float y) {
#if defined(__CUDA_ARCH__)
  return log1pf(y);
#else
  const float sum = 1.f + y;
  return log_positive(sum) + (y - (sum - 1.f));
#endif
}
FASTKD_HD double log_one_plus(double y) { return ::log1p(y); }

// (1 + y) log(1 + y) - y for small y.
template <class A>
FASTKD_HD A near_entropy(A y) {
  return y * y *
         (A(1. / 2) -
          y * (A(1. / 6) - y * (A(1. / 12) - y * (A(1. / 20) - y * (A(1. / 30) - y * (A(1. / 42) - y * A(1. / 56)))))));
}

// KL(p || q) and KL(q || p): first and second, each as a sum of terms that are none below 0. A class whose exponential
// underflows counts 0, however large d is; infinite where only the other network is -inf.
template <class A>
FASTKD_HD ClassPart<A> pair_part(A p, A q, A d, const DivergenceNumbers<A>& w) {
  const bool near = magnitude(d) <= kNearGap<A>;
  const A forward = near ? q * near_gap(d) : p * d - p + q;
  const A backward = near ? p * near_gap(-d) : p - q - q * d;
  ClassPart<A> part;
  part.first = p == 0 ? (d == A(kInf) ? A(kInf) : q) : forward;
  part.second = q == 0 ? (d == -A(kInf) ? A(kInf) : p) : backward;
  const A of_reverse = w.b == 0 || q == 0 ? A(0) : w.b * (q * d);
  part.push = w.a * (q - p) - of_reverse;
  return part;
}

// w_p KL(p || m) + w_q KL(q || m), m = b p + (1 - b) q: first; second is push. The larger of p and q, hi, gives log(m / hi)
// as log1p, exactly 0 where they are the same; log(m / lo) = log(m / hi) + |d|.
template <class A>
FASTKD_HD ClassPart<A> mixture_part(A p, A q, A d, const DivergenceNumbers<A>& w) {
  constexpr A kLeast = A(0x1p-120), kNear = sizeof(A) == 4 ? A(0x1p-3) : A(0x1p-7);
  const A m = w.of_teacher * p + w.of_student * q;
  const bool counts = !(m <= kLeast), above = p > q;  // NaN counts
  const A hi = above ? p : q, lo = above ? q : p;
  const A apart = counts ? (p - q) / m : A(0);  // p = m (1 + of_student apart), q = m (1 - of_teacher apart)
  const A log_m_hi = log_one_plus((above ? w.of_student : w.of_teacher) * (counts ? (lo - hi) / hi : A(0)));
  const A log_m_lo = lo == 0 ? A(0) : log_m_hi + magnitude(d);
  const A log_m_p = above ? log_m_hi : log_m_lo, log_m_q = above ? log_m_lo : log_m_hi;
  const A excess = w.b * w.of_teacher - w.a * w.of_student;  // 0 for jsd
  const A near = m * (w.a * near_entropy(w.of_student * apart) + w.b * near_entropy(-w.of_teacher * apart));
  const A far = excess * (p - q) - w.a * (p * log_m_p) - w.b * (q * log_m_q);
  ClassPart<A> part;
  part.first = magnitude(apart) <= kNear ? near : counts ? far : A(0);
  part.push = counts ? q * (w.of_student * excess * apart - w.b * log_m_q) : A(0);
  part.second = part.push;
  return part;
}

template <class A>
FASTKD_HD ClassPart<A> tvd_part(A p, A q) {
  const A push = p == q ? A(0) : p > q ? A(-0.5) * q : A(0.5) * q;
  return {A(0.5) * magnitude(p - q), push, push};
}

// x_t, x_s: logits over T relative to the maxima, e_t and e_s their exponentials; d = x_t - x_s + log(z_s / z_t).
template <Divergence Kind, class A>
FASTKD_HD ClassPart<A> class_part(A x_t, A e_t, A x_s, A e_s, A d, const DivergenceNumbers<A>& w) {
  const A p = x_t < kLowestExponent<A> ? A(0) : e_t, q = x_s < kLowestExponent<A> ? A(0) : e_s;
  if constexpr (Kind == Divergence::pair) return pair_part(p, q, d, w);
  if constexpr (Kind == Divergence::mixture) return mixture_part(p, q, d, w);
  return tvd_part(p, q);
}

// log(exp(old) + share (exp(next) - exp(old))), exactly `old` where both are the same.
template <class A>
FASTKD_HD A mix_log(A old, A next, A share) {
  const A top = next > old ? next : old, low = next > old ? old : next, part = next > old ? 1 - share : share;
  const A mixed = top + log_one_plus(part * (exp_negative(low - top) - 1));
  return top == -A(kInf) ? top : mixed;
}

// Of a row: the divergence, what q is multiplied by in the gradient push - q pull, and a bound of the gradient's elements.
template <class A>
struct RowDivergence {
  A value, pull, bound;
};

// From the sums over classes, divided by z_s. `mass`: of p, which p was divided by in a pair, and not in a mixture.
template <class A>
FASTKD_HD RowDivergence<A> row_divergence(Divergence kind, A first, A second, const DivergenceNumbers<A>& w, A mass) {
  const A one = first < 0 ? A(0) : first, other = second < 0 ? A(0) : second;
  if (kind != Divergence::pair) return {one, second, 2 * one + 2};
  const A log_mass = mass == 1 ? A(0) : natural_log(mass);
  const A forward = w.a == 0 ? A(0) : w.a * mass * (one + log_mass), backward = w.b == 0 ? A(0) : w.b * (other - log_mass);
  return {forward + backward, w.b == 0 ? A(0) : w.b * second, magnitude(w.a) * mass + magnitude(w.b) * (2 * other + 1)};
}

}  // namespace FASTKD_TARGET
}  // namespace fastkd::multi_teacher
