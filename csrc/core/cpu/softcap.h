// Softcap and logit scale of a row in scratch memory: y = cap tanh(scale x / cap), or scale x where cap is 0.
#pragma once

#include "core/softcap.h"

namespace fastkd {
inline namespace FASTKD_TARGET {

// In place; the maximum. A masked class stays masked.
template <class A>
A cap_row(A* x, int64_t n, double cap, double scale) {
  const A inner = A(cap > 0 ? scale / cap : scale), outer = A(cap > 0 ? cap : 1);
  A top = -kInf;
  if (cap > 0) {
#pragma omp simd reduction(max : top)
    for (int64_t c = 0; c < n; ++c) {
      x[c] = x[c] == -A(kInf) ? x[c] : outer * hyperbolic_tangent(x[c] * inner);
      top = x[c] > top ? x[c] : top;
    }
    return top;
  }
#pragma omp simd reduction(max : top)
  for (int64_t c = 0; c < n; ++c) {
    x[c] *= inner;
    top = x[c] > top ? x[c] : top;
  }
  return top;
}

// The gradient with respect to x from that with respect to y.
template <class A>
void uncap_gradient(A* grad, const A* y, int64_t n, double cap, double scale) {
  const A inv_cap = A(cap > 0 ? 1 / cap : 0), factor = A(scale);
#pragma omp simd
  for (int64_t c = 0; c < n; ++c) {
    const A part = y[c] == -A(kInf) ? A(0) : y[c] * inv_cap;
    grad[c] *= factor * (1 - part * part);
  }
}

}  // namespace FASTKD_TARGET
}  // namespace fastkd
