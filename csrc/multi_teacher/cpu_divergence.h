// The divergences besides forward, over rows in scratch memory, in the CPU kernels.
#pragma once

#include "multi_teacher/cpu_row.h"
#include "multi_teacher/divergence.h"

namespace fastkd::multi_teacher {
inline namespace FASTKD_TARGET {

template <class A>
DivergenceNumbers<A> numbers_of(const Row<A>& row) {
  const Args& args = row.args;
  if (!args.share) return numbers_of<A>(args.divergence, args.divergence_number);
  const A* share = static_cast<const A*>(args.share) + row.index * args.share_stride_row;
  return {share[0], share[args.share_stride_kind]};
}

// A teacher's and the student's row at one temperature: math.h; the teacher's exponentials times `ratio` are in the student's
// units, whose sum is z. log(p / q) = x_t - x_s + log_ratio.
template <class A>
struct TwoRows {
  const A *x_t, *x_s, *e_s;
  A* e_t;  // is overwritten
  A ratio, log_ratio, z;
  int64_t n;
};

// The divergence, and unless factor is 0, grad += factor z times its gradient with respect to x_s.
template <Divergence Kind, class A>
RowDivergence<A> diverge(const TwoRows<A>& r, const DivergenceNumbers<A>& numbers, A mass, A factor, A* grad) {
  const A *x_t = r.x_t, *x_s = r.x_s, *e_s = r.e_s, ratio = r.ratio, log_ratio = r.log_ratio;
  DivergenceNumbers<A> w = numbers;
  if (Kind == Divergence::pair) w.a *= mass;
  A *e_t = r.e_t, first = 0, second = 0;
#pragma omp simd reduction(+ : first, second)
  for (int64_t c = 0; c < r.n; ++c) {
    const auto part = class_part<Kind>(x_t[c], ratio * e_t[c], x_s[c], e_s[c], (x_t[c] - x_s[c]) + log_ratio, w);
    first += part.first;
    second += part.second;
    e_t[c] = part.push;
  }
  const auto result = row_divergence(Kind, first / r.z, second / r.z, numbers, mass);
  if (factor == 0) return result;
  const A pull = result.pull;
#pragma omp simd
  for (int64_t c = 0; c < r.n; ++c) grad[c] += factor * (e_t[c] - e_s[c] * pull);
  return result;
}

// The same for the row's kind of divergence; the bound of float16 gradients grows by this one's.
template <class A>
A diverge(Row<A>& row, const TwoRows<A>& r, A mass, A weight, A scale) {
  const auto numbers = numbers_of(row);
  const A factor = row.args.need_grad ? A(row.args.kd_weight) * weight * scale / r.z : A(0);
  RowDivergence<A> result;
  switch (row.args.divergence) {
    case Divergence::mixture: result = diverge<Divergence::mixture>(r, numbers, mass, factor, row.s.grad); break;
    case Divergence::tvd: result = diverge<Divergence::tvd>(r, numbers, mass, factor, row.s.grad); break;
    default: result = diverge<Divergence::pair>(r, numbers, mass, factor, row.s.grad);
  }
  row.bound += magnitude(weight) * scale * result.bound;
  return result.value;
}

template <class A>
void mix_logs(A* l, const A* x, A log_z, A share, int64_t n) {
#pragma omp simd
  for (int64_t c = 0; c < n; ++c) l[c] = mix_log(l[c], x[c] - log_z, share);
}

// x = x - log z, e = exp(x).
template <class A>
void normalise(A* x, A log_z, A* e, int64_t n) {
#pragma omp simd
  for (int64_t c = 0; c < n; ++c) {
    x[c] -= log_z;
    e[c] = exp_negative(x[c]);
  }
}

// From a mixture of probabilities, whose logarithms are in s.mixture, times `mass`. Logarithms, because a sum of
// probabilities that underflow has none; student and mixture go through the same exponential, so that equal ones stay equal.
template <class A>
A diverge_from_mixture(Row<A>& row, A mass, A scale) {
  const Scratch<A>& s = row.s;
  normalise(s.student_x, natural_log(row.z_student), s.student_exp, row.padded);
  normalise(s.mixture, A(0), s.teacher_exp, row.padded);
  const bool pair = row.args.divergence == Divergence::pair;
  const TwoRows<A> rows{s.mixture,     s.student_x,        s.student_exp,
                        s.teacher_exp, pair ? A(1) : mass, pair || mass == 1 ? A(0) : natural_log(mass),
                        A(1),          row.padded};
  return diverge(row, rows, mass, A(1), scale);
}

}  // namespace FASTKD_TARGET
}  // namespace fastkd::multi_teacher
