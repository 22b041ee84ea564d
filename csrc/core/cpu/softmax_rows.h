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

}  // namespace FASTKD_TARGET
}  // namespace fastkd
