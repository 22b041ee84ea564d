// A row of one student and its teachers in scratch memory, and its cross-entropy, in the CPU kernels.
#pragma once

#include "core/cpu/softmax_rows.h"
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

  A weight(int k) const {
    if (args.host_weight) return A(args.host_weight[k]);
    return static_cast<const A*>(args.weight)[k * args.weight_stride_teacher + index * args.weight_stride_row];
  }

  // Of teacher k in this row: a weight of 0 is for the statistics alone.
  bool is_read(int k) const { return args.kl || weight(k) != 0; }

  void keep_divergence(int k, A kl) const {
    if (args.kl) static_cast<A*>(args.kl)[k * args.rows + index] = kl;
  }
};

// The gradient of ce_weight * CE to s.grad: its factor times e, minus ce_weight times the labels' probabilities.
template <class A>
A hard_label(Row<A>& row, int64_t label, const A* e, A z) {
  const Scratch<A>& s = row.s;
  const A smoothing = A(row.args.label_smoothing), ce_weight = A(row.args.ce_weight);
  A sum = 0;
  if (smoothing > 0) {
#pragma omp simd reduction(+ : sum)
    for (int64_t c = 0; c < row.n; ++c) sum += s.student[c] - row.max_student;
  }
  if (row.args.need_grad) {
    const A factor = ce_weight / z, uniform = ce_weight * smoothing / A(row.n);
#pragma omp simd
    for (int64_t c = 0; c < row.padded; ++c) s.grad[c] = factor * e[c] - uniform;
    s.grad[label] -= ce_weight * (1 - smoothing);
  }
  return cross_entropy(z, s.student[label] - row.max_student, sum, smoothing, row.n);
}

template <class A>
A soft_label(Row<A>& row, const A* e, A z) {
  const Scratch<A>& s = row.s;
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
  if (row.args.need_grad) {
    const A ce_weight = A(row.args.ce_weight), factor = ce_weight * total / z;
#pragma omp simd
    for (int64_t c = 0; c < row.n; ++c) s.grad[c] = factor * e[c] - ce_weight * y[c];
    for (int64_t c = row.n; c < row.padded; ++c) s.grad[c] = 0;
  }
  return total * natural_log(z) - dot;
}

// CE. student_exp stands at temperature[0].
template <class A>
A label_loss(Row<A>& row, int64_t label) {
  const Scratch<A>& s = row.s;
  A *e = s.teacher_exp, z = 0;
  if (const int t = integer_temperature(row.args.temperature[0]))
    z = powers(s.student_exp, row.padded, t, e);
  else
    z = exponentials(s.student, row.max_student, A(1), row.padded, s.teacher, e);
  return row.args.soft.data ? soft_label(row, e, z) : hard_label(row, label, e, z);
}

}  // namespace FASTKD_TARGET
}  // namespace fastkd::multi_teacher
