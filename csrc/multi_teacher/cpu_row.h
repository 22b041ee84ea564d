// A row of one student and its teachers in scratch memory, and its cross-entropy, in the CPU kernels.
#pragma once

#include "core/cpu/row_losses.h"
#include "core/cpu/softcap.h"
#include "multi_teacher/math.h"

namespace fastkd::multi_teacher {
inline namespace FASTKD_TARGET {

template <class A>
struct Scratch {  // each [padded]
  A *student, *student_x, *student_exp, *teacher, *teacher_exp, *mixture, *grad;
};

template <class A>
struct Row {
  const Args& args;
  Scratch<A> s;
  int64_t index, n, padded;
  A max_student = 0, z_student = 0;  // z: sum of student_exp
  A labels = 1;                      // the sum of the row's label probabilities
  A bound = 0;                       // of the gradient of divergences besides forward, without kd_weight

  A weight(int k) const {
    if (args.host_weight) return A(args.host_weight[k]);
    return static_cast<const A*>(args.weight)[k * args.weight_stride_teacher + index * args.weight_stride_row];
  }

  // The student's row or that of teacher k, at 0 or k + 1; its maximum.
  A load(int network, A* to) const {
    const A top = fastkd::load_row(network == 0 ? args.student : args.teacher[network - 1], index, n, padded, to);
    return args.softcap ? cap_row(to, padded, args.softcap[network], args.logit_scale[network]) : top;
  }

  // Of teacher k in this row: a weight of 0 is for the statistics alone.
  bool is_read(int k) const { return args.kl || weight(k) != 0; }

  void keep_divergence(int k, A kl) const {
    if (args.kl) static_cast<A*>(args.kl)[k * args.rows + index] = kl;
  }
};

// The cross-entropy with probabilities, which go to s.mixture, smoothed; the gradient of ce_weight times it to `grad`.
template <class A>
A soft_label_loss(Row<A>& row, const LabelledRow<A>& labelled, A* grad) {
  const Scratch<A>& s = row.s;
  const A* e = labelled.e;
  A* y = s.mixture;
  load_row(row.args.soft, row.index, row.n, row.padded, y);
  if (row.index + 1 < row.args.rows) prefetch_row(row.args.soft, row.index + 1, row.n);
  const A smoothing = A(row.args.label_smoothing), keep = 1 - smoothing, uniform = smoothing / A(row.n);
  A total = 0, dot = 0;
#pragma omp simd reduction(+ : total, dot)
  for (int64_t c = 0; c < row.n; ++c) {
    y[c] = keep * y[c] + uniform;
    total += y[c];
    dot += y[c] == 0 ? A(0) : y[c] * (s.student[c] - row.max_student);
  }
  row.labels = total;
  if (grad) {
    const A ce_weight = A(row.args.ce_weight), factor = ce_weight * total / labelled.z;
#pragma omp simd
    for (int64_t c = 0; c < row.n; ++c) grad[c] = factor * e[c] - ce_weight * y[c];
    for (int64_t c = row.n; c < row.padded; ++c) grad[c] = 0;
  }
  return total * natural_log(labelled.z) - dot;
}

// CE; the gradient of ce_weight times it to s.grad. student_exp stands at temperature[0].
template <class A>
A label_loss(Row<A>& row, int64_t label) {
  const Args& args = row.args;
  const Scratch<A>& s = row.s;
  const auto labelled = at_one(s.student, row.max_student, s.student_exp, integer_temperature(args.temperature[0]), row.n,
                               row.padded, s.teacher, s.teacher_exp);
  A* grad = args.need_grad ? s.grad : nullptr;
  if (args.soft.data) return soft_label_loss(row, labelled, grad);
  return hard_label_loss(labelled, label, A(args.label_smoothing), A(args.ce_weight), grad);
}

}  // namespace FASTKD_TARGET
}  // namespace fastkd::multi_teacher
