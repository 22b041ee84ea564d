// The arithmetic of one element, shared by CPU and CUDA. Derivation: README.md here.
#pragma once

#include "core/exp_log.h"
#include "core/math.h"
#include "core/softmax_math.h"
#include "multi_label/op.h"

namespace fastkd::multi_label {
inline namespace FASTKD_TARGET {

// a / b for b in [1, 4].
FASTKD_HD float quotient(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fdividef(a, b);
#else
  return a / b;
#endif
}
FASTKD_HD double quotient(double a, double b) { return a / b; }

// e = exp(-|z / T|). With c = likelier(e) = 1 / (1 + e), the likelier outcome has probability c and the other one e c: neither
// rounds to 1 what the other one still shows. No struct of both: in the CPU's loops GCC 12 keeps its address, and them scalar.
template <class A>
FASTKD_HD A odds_of(A z, A inv_t) {
  return exp_negative(-magnitude(z) * inv_t);
}

template <class A>
FASTKD_HD A likelier(A e) {
  return quotient(A(1), 1 + e);
}

// sigmoid(z / T).
template <class A>
FASTKD_HD A probability(A z, A e, A c) {
  return z > 0 ? c : rounded_product(e, c);
}

// log((1 + a) / (1 + b)) for a and b in [0, 1], of a small one all digits: 2 artanh(x), |x| <= 1 / 3, within 2^-25.
FASTKD_HD float log_ratio(float a, float b) {
  const float x = quotient(a - b, 2.f + (a + b)), square = x * x;
  const float series = 0.333333194f + square * (0.200038359f + square * (0.141169786f + square * 0.134337738f));
  return 2 * x * (1 + square * series);
}
FASTKD_HD double log_ratio(double a, double b) { return ::log1p((a - b) / (1 + b)); }

// The part of KL(p || q) at log-odds d apart that is left after its factor p (1 - p) d^2, for |d| <= kNearOdds: the cumulants
// of an outcome, v = p (1 - p), m = 1 - 2 p.
template <class A>
constexpr A kNearOdds = sizeof(A) == 4 ? A(0x1p-1) : A(0x1p-5);

template <class A>
FASTKD_HD A near_series(A d, A v, A m) {
  A rest = 0;
  if constexpr (sizeof(A) == 8) rest = d * m * (1 + v * (-252 + v * (5040 - v * 20160))) * A(1. / 362880);
  rest = d * ((1 + v * (-126 + v * (1680 - v * 5040))) * A(1. / 40320) + rest);
  rest = d * (m * (1 + v * (-60 + v * 360)) * A(1. / 5040) + rest);
  rest = d * ((1 + v * (-30 + v * 120)) * A(1. / 720) + rest);
  rest = d * (m * (1 - 12 * v) * A(1. / 120) + rest);
  rest = d * ((1 - 6 * v) * A(1. / 24) + rest);
  return A(1. / 2) + d * (m * A(1. / 6) + rest);
}

// One teacher's divergence from the student in one class, KL(p || q), and q - p.
template <class A>
struct Element {
  A kl, push;
};

// s and t: logits at T = 1, whose difference is exact for near networks, and 0 for equal ones whatever is fused.
template <class A>
FASTKD_HD Element<A> element_of(A s, A q_e, A q_c, A t, A p_e, A p_c, A inv_t) {
  const bool flipped = t > 0;  // the outcomes change places: from here on p <= 1/2
  const A gap = (s - t) * inv_t, d = flipped ? -gap : gap, x = flipped ? -s : s;
  const bool apart = x > 0;  // q > 1/2
  const A w = p_e * p_c, v = w * p_c;
  const A push = q_c * p_c * (apart ? 1 - q_e * p_e : q_e - p_e);
  // log(1 - p) - log(1 - q) - p d; a p of 0 leaves nothing of an infinite d.
  const A odds = w * (apart ? magnitude(t) * inv_t : d);
  const A far = ((apart ? p_c * (x * inv_t) : A(0)) - (p_e == 0 ? A(0) : odds)) + log_ratio(q_e, p_e);
  const A near = v * (d * d) * near_series(d, v, 1 - 2 * w);
  const A kl = magnitude(d) <= kNearOdds<A> ? near : far;
  return {kl < 0 ? A(0) : kl, flipped ? -push : push};  // below 0 is rounding; NaN stays
}

// Binary cross-entropy with a label y in [0, 1] and its derivative; a part of weight 0 counts 0.
template <class A>
struct Labelled {
  A ce, push;
};

template <class A>
FASTKD_HD Labelled<A> label_loss(A s, A e, A c, A y, A pos_weight) {
  const A positive = pos_weight * y, negative = 1 - y, log = log_ratio(e, A(0)), less = e * c;
  const A of_one = (s < 0 ? -s : A(0)) + log, of_zero = (s > 0 ? s : A(0)) + log;
  const A q = s > 0 ? c : less, rest = s > 0 ? less : c;
  return {(positive == 0 ? A(0) : positive * of_one) + (negative == 0 ? A(0) : negative * of_zero),
          negative * q - positive * rest};
}

// A mixture's logit from the probabilities of both outcomes, which underflow to 0 where a teacher's logit is infinite.
template <class A>
FASTKD_HD A logit_of(A p, A rest, A t) {
  const A logit = t * log_positive(p / rest);
  const A bounded = p == 0 ? -A(kInf) : rest == 0 ? A(kInf) : logit;
  return p == p ? bounded : p;
}

// No element of a row's gradient is above it: `weights` is the sum of |w_k| times the scale of each, `largest` of pos_weight.
template <class A>
FASTKD_HD A gradient_bound(const Args& args, A weights, A largest) {
  return (magnitude(A(args.kd_weight)) * weights + magnitude(A(args.ce_weight)) * largest) * A(args.class_factor);
}

}  // namespace FASTKD_TARGET
}  // namespace fastkd::multi_label
