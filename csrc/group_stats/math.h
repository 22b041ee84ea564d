// The arithmetic of one row, shared by CPU and CUDA. Derivation: README.md here.
#pragma once

#include <math.h>

#include "core/exp_log.h"
#include "core/math.h"
#include "group_stats/op.h"

namespace fastkd::group_stats {
inline namespace FASTKD_TARGET {

FASTKD_HD float one_minus_exp(float x) { return -::expm1f(x); }
FASTKD_HD double one_minus_exp(double x) { return -::expm1(x); }

// exp_negative() is never below the smallest normal number for a finite x, so x may not be large in a product with it: a
// logit of -3e38 (a mask) would add -6 to the sum of e^x x.
template <class A>
FASTKD_HD A bounded(A x) {
  return x < kLowestExponent<A> ? kLowestExponent<A> : x;
}

// What a row says: from z = sum e^x, s = sum e^x x, with x = logit - maximum, and the second largest x.
template <class A>
struct RowStats {
  A ce, confidence, entropy, margin;
  int64_t label_rank;
  bool correct;
};

// The label of a row, and its logit: +inf where there is none, which no class exceeds.
template <class A>
struct Label {
  bool given;
  int64_t index;
  A logit;
};

template <class T, class A>
FASTKD_HD Label<A> label_of(const int64_t* target, int64_t row, int64_t ignore_index, int64_t classes, const T* logits) {
  const int64_t index = target ? target[row] : -1;
  if (index < 0 || index >= classes || index == ignore_index) return {false, -1, A(kInf)};
  return {true, index, A(load_as(logits[index]))};
}

// greater: classes above the label's logit; earlier_tie: a class before the label has its logit, and so is the argmax.
template <class A>
FASTKD_HD RowStats<A> row_stats(A z, A s, A second, A max, const Label<A>& label, int64_t greater, bool earlier_tie,
                                int64_t classes) {
  const bool broken = z != z;  // NaN or +inf in the row, or every class masked
  const A log_z = natural_log(z), not_a_number = A(__builtin_nanf(""));
  RowStats<A> row;
  row.ce = label.given ? log_z - (label.logit - max) : not_a_number;
  row.confidence = 1 / z;
  row.entropy = log_z - s / z;
  row.margin = one_minus_exp(second) / z;
  row.label_rank = !label.given ? -1 : broken ? classes : greater;
  row.correct = label.given && !broken && greater == 0 && !earlier_tie;
  return row;
}

template <class A>
FASTKD_HD void store(const Output& out, int64_t i, const RowStats<A>& row) {
  static_cast<A*>(out.ce)[i] = row.ce;
  static_cast<A*>(out.confidence)[i] = row.confidence;
  static_cast<A*>(out.entropy)[i] = row.entropy;
  static_cast<A*>(out.margin)[i] = row.margin;
  out.label_rank[i] = row.label_rank;
  out.correct[i] = row.correct;
}

// Into statistics of this type or a wider one.
template <class A>
FASTKD_HD void store(const Output& out, int64_t i, const RowStats<A>& row, bool wide) {
  if (!wide || sizeof(A) == sizeof(double)) return store(out, i, row);
  const RowStats<double> same{double(row.ce),     double(row.confidence), double(row.entropy),
                              double(row.margin), row.label_rank,         row.correct};
  store(out, i, same);
}

// The cross-entropy with probabilities t: sum t (log z - x). weight = sum t; below = sum t (maximum - logit), where a
// class of probability 0 adds nothing, be it masked or not.
template <class A>
FASTKD_HD A soft_cross_entropy(A weight, A below, A confidence) {
  return below - weight * natural_log(confidence);
}

// One class's part of `below`.
template <class A>
FASTKD_HD A soft_term(A probability, A below_max) {
  return probability == 0 ? A(0) : probability * below_max;
}

// One class of a soft row: kernels for many rows read it in its own type.
template <class A>
FASTKD_HD A soft_at(const Network& soft, int64_t row, int64_t c) {
  switch (soft.type) {
    case DType::f64: return A(row_of<double>(soft, row)[c]);
    case DType::f16: return A(load_as(row_of<Half>(soft, row)[c]));
    case DType::bf16: return A(load_as(row_of<BFloat16>(soft, row)[c]));
    default: return A(row_of<float>(soft, row)[c]);
  }
}

// What a soft row's label is: none where the target [R] beside it is ignored.
FASTKD_HD int64_t label_of_soft(const Args& args, int64_t row, int64_t largest) {
  return args.target && args.target[row] == args.ignore_index ? -1 : largest;
}

}  // namespace FASTKD_TARGET
}  // namespace fastkd::group_stats
