// One teacher of a row: its logits in scratch memory, its statistics, its divergence and the gradient of that.
#pragma once

#include "group_stats/row.h"
#include "multi_teacher/cpu_divergence.h"

namespace fastkd::multi_teacher {
inline namespace FASTKD_TARGET {

// The statistics of a network, the student's or teacher k's at 0 or k + 1, from the row that was just loaded to scratch.
template <class A>
void keep_stats(const Row<A>& row, int network, const A* logits, A max) {
  const Args& args = row.args;
  const int64_t* target = args.labels ? args.target : nullptr;
  const auto label = group_stats::label_of<A, A>(target, row.index, args.ignore_index, row.n, logits);
  group_stats::store(args.stats, network * args.rows + row.index,
                     group_stats::stats_of_row(logits, max, label, row.n, row.padded));
}

// The teacher's x and e at a temperature, from `t` in place; its sum z.
template <class A>
A teacher_at(const Row<A>& row, A* t, A max_t, double temperature) {
  return exponentials(t, max_t, A(1 / temperature), row.padded, t, row.s.teacher_exp);
}

// a = sum e (x_t - x_s): math.h, divergence(). Not in the loop of the exponentials: of two sums in one loop GCC keeps one in
// memory, and adds the other in another order than the student's.
template <class A>
A gaps(const A* e_t, const A* x_t, const A* x_s, int64_t n) {
  A a = 0;
#pragma omp simd reduction(+ : a)
  for (int64_t c = 0; c < n; ++c) a += weighted_gap(e_t[c], x_t[c], x_s[c]);
  return a;
}

// The same, and grad += factor * (e_s - ratio * e_t): exactly 0 where both networks are the same, with and without FMA.
template <class A>
A gaps_and_gradient(const A* e_t, const A* x_t, const A* x_s, const A* e_s, A factor, A ratio, A* grad, int64_t n) {
  A a = 0;
#pragma omp simd reduction(+ : a)
  for (int64_t c = 0; c < n; ++c) {
    a += weighted_gap(e_t[c], x_t[c], x_s[c]);
    grad[c] += factor * (e_s[c] - ratio * e_t[c]);
  }
  return a;
}

// KL(p || q) of a teacher in scratch from a, the sum of its gaps.
template <class A>
A divergence_of(const Row<A>& row, A a, const A* x_t, A z) {
  const Scratch<A>& s = row.s;
  return exact_divergence(divergence(a, z, row.z_student), x_t, s.teacher_exp, z, s.student_x, s.student_exp, row.z_student,
                          row.padded);
}

template <class A>
A divergence_alone(const Row<A>& row, const A* x_t, A z) {
  return divergence_of(row, gaps(row.s.teacher_exp, x_t, row.s.student_x, row.padded), x_t, z);
}

// The student's x and e at a temperature.
template <class A>
void student_at(Row<A>& row, double temperature) {
  const Scratch<A>& s = row.s;
  const A inv_t = A(1 / temperature);
  row.z_student = exponentials(s.student, row.max_student, inv_t, row.padded, s.student_x, s.student_exp);
}

// What a loss with another divergence than forward keeps for the statistics.
template <class A>
void keep_forward(const Row<A>& row, int k, const A* x_t, A z) {
  if (row.args.kl) row.keep_divergence(k, divergence_alone(row, x_t, z));
}

// One teacher's divergence, of any kind but forward; its weighted gradient. `k` < 0: of a mixture.
template <class A>
A teach_otherwise(Row<A>& row, int k, A* teacher, A max_teacher, A weight, double temperature) {
  const Scratch<A>& s = row.s;
  const A z = teacher_at(row, teacher, max_teacher, temperature), ratio = row.z_student / z;
  if (k >= 0) keep_forward(row, k, teacher, z);
  const TwoRows<A> rows{teacher, s.student_x,        s.student_exp, s.teacher_exp,
                        ratio,   natural_log(ratio), row.z_student, row.padded};
  return diverge(row, rows, A(1), weight, temperature_scale<A>(temperature, row.args.scale_by_t2).grad);
}

// One teacher's divergence, forward; its weighted gradient. `teacher` [padded] in scratch, at temperature T, student_exp at the same.
template <class A>
A teach(Row<A>& row, A* teacher, A max_teacher, A weight, double temperature) {
  const Scratch<A>& s = row.s;
  const Scale<A> scale = temperature_scale<A>(temperature, row.args.scale_by_t2);
  const A z = teacher_at(row, teacher, max_teacher, temperature);
  if (!row.args.need_grad || weight == 0) return divergence_alone(row, teacher, z);
  const A factor = A(row.args.kd_weight) * weight * scale.grad / row.z_student;
  const A a =
      gaps_and_gradient(s.teacher_exp, teacher, s.student_x, s.student_exp, factor, row.z_student / z, s.grad, row.padded);
  return divergence_of(row, a, teacher, z);
}

// Teacher k in scratch, its maximum; its next row is on its way meanwhile.
template <class A>
A load_teacher(const Row<A>& row, int k) {
  const Network& teacher = row.args.teacher[k];
  const A top = row.load(k + 1, row.s.teacher);
  if (row.index + 1 < row.args.rows) prefetch_row(teacher, row.index + 1, row.n);
  if (row.args.kl) keep_stats(row, k + 1, row.s.teacher, top);
  return top;
}

// Where a combination does without the single divergences, for the statistics. Leaves the teacher as it was loaded.
template <class A>
void keep_divergence_alone(Row<A>& row, int k, A max_teacher, double temperature) {
  if (!row.args.kl) return;
  const A z = teacher_at(row, row.s.teacher, max_teacher, temperature);
  row.keep_divergence(k, divergence_alone(row, row.s.teacher, z));
  row.load(k + 1, row.s.teacher);
}

}  // namespace FASTKD_TARGET
}  // namespace fastkd::multi_teacher
