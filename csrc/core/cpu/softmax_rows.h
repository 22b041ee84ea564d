// Loops over the rows that core/cpu/rows.h loads into scratch memory: exponentials and their sums. Lengths are padded ones.
#pragma once

#include "core/cpu/rows.h"
#include "core/softmax_math.h"

namespace fastkd {
inline namespace FASTKD_TARGET {

// x = (logit - max) / T, e = exp(x); the sum of e.
template <class A>
A exponentials(const A* logits, A max, A inv_t, int64_t n, A* x, A* e) {
  A z = 0;
#pragma omp simd reduction(+ : z)
  for (int64_t c = 0; c < n; ++c) {
    x[c] = (logits[c] - max) * inv_t;
    e[c] = exp_negative(x[c]);
    z += e[c];
  }
  return z;
}

// to = from^T; the sum. T is a template argument: a switch in the loop would keep it scalar.
template <int T, class A>
A powers(const A* from, int64_t n, A* to) {
  A z = 0;
#pragma omp simd reduction(+ : z)
  for (int64_t c = 0; c < n; ++c) {
    to[c] = integer_power(from[c], T);
    z += to[c];
  }
  return z;
}

// The same for 1 <= t <= kMostIntegerT.
template <class A>
A powers(const A* from, int64_t n, int t, A* to) {
  switch (t) {
    case 1: return powers<1>(from, n, to);
    case 2: return powers<2>(from, n, to);
    case 3: return powers<3>(from, n, to);
    case 4: return powers<4>(from, n, to);
    case 5: return powers<5>(from, n, to);
    default: return powers<6>(from, n, to);
  }
}

// KL(p || q) of two rows x_t and x_s with their exponentials and sums, from `value`, what divergence() makes of them: by a
// sweep of its own where that is so near 0 that it lost digits.
template <class A>
A exact_divergence(A value, const A* x_t, const A* e_t, A z_t, const A* x_s, const A* e_s, A z_s, int64_t n) {
  if (!(value < A(kNearDivergence))) return value;
  const A ratio = z_s / z_t, log_ratio = natural_log(ratio);
  A sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t c = 0; c < n; ++c) sum += kl_part(ratio * e_t[c], e_s[c], (x_t[c] - x_s[c]) + log_ratio);
  return sum < 0 ? A(0) : sum / z_s;
}

}  // namespace FASTKD_TARGET
}  // namespace fastkd
