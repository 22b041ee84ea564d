// What mutual adds to the arithmetic of core/softmax_math.h. Derivation: README.md here.
#pragma once

#include "core/softmax_math.h"
#include "mutual/op.h"

namespace fastkd::mutual {
inline namespace FASTKD_TARGET {

// How a network teaches a learner in one row: gradient += factor * (e_learner - ratio * e_network) with
// factor = w * scale / z_learner and ratio = z_learner / z_network, so that equal networks give exactly 0.
template <class A>
struct Pull {
  A factor, ratio;
};

template <class A>
FASTKD_HD Pull<A> pull(A weight, A scale, A z_learner, A z_network) {
  return {weight * scale / z_learner, z_learner / z_network};
}

template <class A>
FASTKD_HD A weight_of(const Weights& w, int m, int n, int64_t row) {
  const int64_t at = m * w.stride_learner + n * w.stride_network;
  return w.host ? A(w.host[at]) : static_cast<const A*>(w.data)[at + row * w.stride_row];
}

// The probability that a soft target's smoothed row gives a class.
template <class A>
FASTKD_HD A smoothed(A probability, A smoothing, int64_t classes) {
  return (1 - smoothing) * probability + smoothing / A(classes);
}

// A row's loss from its terms; a weight of 0 also removes an infinite one.
template <class A>
FASTKD_HD A weigh(A kd_weight, A kd, A ce_weight, A ce) {
  return (kd_weight == 0 ? A(0) : kd_weight * kd) + (ce_weight == 0 ? A(0) : ce_weight * ce);
}

}  // namespace FASTKD_TARGET
}  // namespace fastkd::mutual
