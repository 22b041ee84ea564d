// The statistics of a row that lies in scratch memory, in the CPU kernels.
#pragma once

#include "core/cpu/rows.h"
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

// Sums over classes [begin, end) of a row: z = sum e, s = sum e x, and what the ranks need.
template <class A>
struct Sums {
  A z, s, below;  // below: the largest x < 0
  typename Count<A>::type greater, largest;
};

template <class A>
Sums<A> sums_of_block(const A* logits, A max, A label_logit, int64_t begin, int64_t end) {
  A z = 0, s = 0, below = -A(kInf);
  typename Count<A>::type greater = 0, largest = 0;
#pragma omp simd reduction(+ : z, s, greater, largest) reduction(max : below)
  for (int64_t c = begin; c < end; ++c) {
    const A x = logits[c] - max, e = exp_negative(x);
    z += e;
    s += e * bounded(x);
    greater += logits[c] > label_logit ? 1 : 0;
    largest += logits[c] == max ? 1 : 0;
    const A candidate = x < 0 ? x : -A(kInf);
    below = candidate > below ? candidate : below;
  }
  return {z, s, below, greater, largest};
}

// logits [padded] with -inf past the end, max of them: core/cpu/rows.h, load_row. In blocks, so that no sum has more than a
// few dozen terms a SIMD lane: with the four lanes of x86-64's first level a thousand classes would lose a digit.
template <class A>
RowStats<A> stats_of_row(const A* logits, A max, const Label<A>& label, int64_t classes, int64_t padded) {
  constexpr int64_t kBlock = 256;
  A z = 0, s = 0, below = -A(kInf);
  int64_t greater = 0, largest = 0;
  for (int64_t begin = 0; begin < padded; begin += kBlock) {
    const int64_t end = begin + kBlock < padded ? begin + kBlock : padded;
    const Sums<A> block = sums_of_block(logits, max, label.logit, begin, end);
    z += block.z;
    s += block.s;
    below = block.below > below ? block.below : below;
    greater += block.greater;
    largest += block.largest;
  }
  const A second = largest > 1 ? A(0) : below;
  const bool tie = label.given && greater == 0 && has_earlier_tie(logits, label);
  return row_stats(z, s, second, max, label, greater, tie, classes);
}

}  // namespace FASTKD_TARGET
}  // namespace fastkd::group_stats
