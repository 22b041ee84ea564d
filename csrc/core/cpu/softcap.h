// Softcap and logit scale of a row in scratch memory: y = cap tanh(scale x / cap), or scale x where cap is 0.
#pragma once

#include "core/exp_log.h"
#include "core/math.h"

namespace fastkd {
inline namespace FASTKD_TARGET {

// tanh by one exponential, and by its series near 0, where 1 - e^(-2 x) would cancel.
FASTKD_HD float hyperbolic_tangent(float x) {
  const float size = magnitude(x), e = exp_negative(-2 * size), square = x * x;
  const float far = (1 - e) / (1 + e);
  const float near = size * (1 - square * (1.f / 3 - square * (2.f / 15 - square * (17.f / 315 - square * (62.f / 2835)))));
  const float value = size < 0x1p-3f ? near : far;
  return x < 0 ? -value : value;
}
FASTKD_HD double hyperbolic_tangent(double x) { return ::tanh(x); }

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
