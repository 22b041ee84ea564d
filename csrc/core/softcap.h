// Softcap and logit scale of a logit: y = cap tanh(scale x / cap), or scale x where cap is 0.
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

}  // namespace FASTKD_TARGET
}  // namespace fastkd
