// What losses over rows do alike on the CPU: the cross-entropy of a row in scratch memory with its gradient, how a row's
// gradient is stored, and the backward of what was stored.
#pragma once

#include "core/cpu/softmax_rows.h"
#include "core/dispatch.h"
#include "core/reduction.h"

namespace fastkd {
inline namespace FASTKD_TARGET {

// One network's row: logits [padded] as load_row() leaves them, their maximum; e = exp(logits - max) [padded] and its sum z.
template <class A>
struct LabelledRow {
  const A *logits, *e;
  A max, z;
  int64_t n, padded;
};

// exp(logits - max) to `to` and its sum z, from e = exp((logits - max) / T) where integer_temperature(T) is not 0, else by
// way of x [padded].
template <class A>
LabelledRow<A> at_one(const A* logits, A max, const A* e, int integer_t, int64_t n, int64_t padded, A* x, A* to) {
  const A z = integer_t ? powers(e, padded, integer_t, to) : exponentials(logits, max, A(1), padded, x, to);
  return {logits, to, max, z, n, padded};
}

// A row's cross-entropy with its label at weight 1. The gradient of weight times it goes to `grad` [padded], unless null;
// `grad` may be row.e.
template <class A>
A hard_label_loss(const LabelledRow<A>& row, int64_t label, A smoothing, A weight, A* grad) {
  A sum = 0;
  if (smoothing > 0) {
#pragma omp simd reduction(+ : sum)
    for (int64_t c = 0; c < row.n; ++c) sum += row.logits[c] - row.max;
  }
  if (grad) {
    const A *e = row.e, factor = weight / row.z, uniform = weight * smoothing / A(row.n);
#pragma omp simd
    for (int64_t c = 0; c < row.padded; ++c) grad[c] = factor * e[c] - uniform;
    grad[label] -= weight * (1 - smoothing);
  }
  return cross_entropy(row.z, row.logits[label] - row.max, sum, smoothing, row.n);
}

// The gradient of a row as it is stored: times `factor`, or in float16 times a power of two that its values, none above
// `bound`, leave room for (half_scale); the inverse of that one goes to *inverse.
template <class S, class A>
void store_gradient(const A* grad, int64_t n, A factor, A bound, S* to, A* inverse) {
  if (is_half<S>) {
    factor = A(half_scale(float(bound)));
    *inverse = 1 / factor;
  }
  store_row(grad, n, factor, to);
}

// The same of a row without a loss: 0, or NaN where its label is out of range.
template <class S, class A>
void store_no_gradient(A nothing, int64_t n, S* to, A* inverse) {
  fill_row(to, n, nothing);
  if (is_half<S>) *inverse = 1;
}

// Rows [begin, end) of a backward: the stored gradient i times upstream(i), what the reduction left out and the inverse scale
// of float16.
template <class S, class A, class Args, class F>
void scale_stored(const Args& args, int64_t begin, int64_t end, const F& upstream) {
  const A* grad_loss = static_cast<const A*>(args.grad_loss);
  const A* saved = static_cast<const A*>(args.saved);
  const A missing = static_cast<const A*>(args.aux)[0];
  for (int64_t i = begin; i < end; ++i) {
    const A factor = grad_loss[upstream(i)] * missing * (saved ? saved[i] : A(1));
    const S* from = static_cast<const S*>(args.stored) + i * args.classes;
    S* to = static_cast<S*>(args.grad) + i * args.classes;
#pragma omp simd
    for (int64_t c = 0; c < args.classes; ++c) store_as(to[c], A(load_as(from[c])) * factor);
  }
}

}  // namespace FASTKD_TARGET
}  // namespace fastkd
