// Which rows of a loss count, and what their losses become.
#pragma once

#include "core/dtype.h"

namespace fastkd {

enum class Reduction : int { none, sum, mean };

inline namespace FASTKD_TARGET {

// What stored gradients are multiplied by in the rows' pass, as Args has it: a number, or in memory before the rows are run.
template <class A>
struct StoredFactor {
  A known;
  const A* counted;  // or null

  FASTKD_HD A value() const { return counted ? *counted : known; }
};

template <class A, class Args>
StoredFactor<A> stored_factor(const Args& args) {
  return {A(args.row_factor), args.counted ? static_cast<const A*>(args.aux) : nullptr};
}

// What the label says of a row.
enum class Label : int { none, class_index, ignored, outside };

FASTKD_HD Label label_kind(const int64_t* target, int64_t row, int64_t ignore_index, int64_t classes) {
  if (!target) return Label::none;
  const int64_t label = target[row];
  if (label == ignore_index) return Label::ignored;
  return label < 0 || label >= classes ? Label::outside : Label::class_index;
}

}  // namespace FASTKD_TARGET
}  // namespace fastkd
