// The statistics of a row that lies in scratch memory, in the CPU kernels.
#pragma once

#include "core/rows.h"
#include "group_stats/math.h"

namespace fastkd::group_stats {
inline namespace FASTKD_TARGET {

template <class A>
struct Count {
  using type = int32_t;  // as wide as A, so that both fill a SIMD register
};
template <>
struct Count<double> {
  using type = int64_t;
};

// Whether a class before `label` has its logit.
template <class A>
bool has_earlier_tie(const A* logits, const Label<A>& label) {
  typename Count<A>::type ties = 0;
#pragma omp simd reduction(+ : ties)
  for (int64_t c = 0; c < label.index; ++c) ties += logits[c] == label.logit ? 1 : 0;
  return ties > 0;
}

// logits [padded] with -inf past the end, max of them: core/rows.h, load_row.
template <class A>
RowStats<A> stats_of_row(const A* logits, A max, const Label<A>& label, int64_t classes, int64_t padded) {
  A z = 0, s = 0, below = -A(kInf);
  typename Count<A>::type greater = 0, largest = 0;
  const A label_logit = label.logit;
#pragma omp simd reduction(+ : z, s, greater, largest) reduction(max : below)
  for (int64_t c = 0; c < padded; ++c) {
    const A x = logits[c] - max, e = exp_negative(x);
    z += e;
    s += e * bounded(x);
    greater += logits[c] > label_logit ? 1 : 0;
    largest += logits[c] == max ? 1 : 0;
    const A candidate = x < 0 ? x : -A(kInf);
    below = candidate > below ? candidate : below;
  }
  const A second = largest > 1 ? A(0) : below;
  const bool tie = label.given && greater == 0 && has_earlier_tie(logits, label);
  return row_stats(z, s, second, max, label, int64_t(greater), tie, classes);
}

}  // namespace FASTKD_TARGET
}  // namespace fastkd::group_stats
