// The divergences besides forward, of a row in registers (on_chip.cuh).
#pragma once

#include "multi_teacher/on_chip_row.cuh"

namespace fastkd::multi_teacher {
inline namespace FASTKD_TARGET {

// One class of teacher and student as class_part() takes it.
template <class A>
struct ClassOfTwo {
  A x_t, p, x_s, q, d;
};

template <Divergence Kind, class A, int kItems, class Of>
__device__ __forceinline__ Numbers<A, 2> push_parts(RowState<A, kItems>& row, const DivergenceNumbers<A>& w, const Of& of) {
  Numbers<A, 2> sums{{0, 0}};
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const ClassOfTwo<A> c = of(i);
    const ClassPart<A> part = class_part<Kind>(c.x_t, c.p, c.x_s, c.q, c.d, w);
    sums.v[0] += part.first;
    sums.v[1] += part.second;
    row.t[i] = part.push;
  }
  return sums;
}

// The divergence of classes of(i), in units whose sum is z, with the teacher's `mass`; row.acc += factor times its gradient
// times z. of(i) reads row.t[i], which is overwritten; q(i) is the student's part of it.
template <class A, int kItems, class Threads, class Of, class Q>
__device__ __forceinline__ RowDivergence<A> diverge(const Params<A>& p, RowState<A, kItems>& row, int64_t index, A mass, A z,
                                                    A factor, Threads& threads, const Of& of, const Q& q) {
  const DivergenceNumbers<A> numbers = p.numbers_at(index);
  DivergenceNumbers<A> w = numbers;
  Numbers<A, 2> sums;
  if (p.divergence == Divergence::pair) {
    w.a *= mass;
    sums = push_parts<Divergence::pair>(row, w, of);
  } else if (p.divergence == Divergence::mixture) {
    sums = push_parts<Divergence::mixture>(row, w, of);
  } else {
    sums = push_parts<Divergence::tvd>(row, w, of);
  }
  sums = threads.sum(sums);
  const RowDivergence<A> result = row_divergence(p.divergence, sums.v[0] / z, sums.v[1] / z, numbers, mass);
#pragma unroll
  for (int i = 0; i < kItems; ++i) row.acc[i] += factor * (row.t[i] - q(i) * result.pull);
  return result;
}

// row.t relative to its maximum; the sum of its exponentials.
template <class A, int kItems, class Threads>
__device__ __forceinline__ A teacher_sum(RowState<A, kItems>& row, A inv_t, Threads& threads) {
  const A top = threads.max(max_item(-A(kInf), row.t));
  Numbers<A, 1> z{{0}};
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    row.t[i] -= top;
    z.v[0] += exp_negative(row.t[i] * inv_t);
  }
  return threads.sum(z).v[0];
}

// With many items there are no registers for the student's exponentials beside everything else: they are made again.
template <int kItems>
constexpr bool kMakesExponentialsAgain = kItems > 8;

template <class A, int kItems>
__device__ __forceinline__ A student_exponential(const RowState<A, kItems>& row, int i, A inv_t) {
  return kMakesExponentialsAgain<kItems> ? exp_negative(row.x_s[i] * inv_t) : row.e_s[i];
}

// row.e_s for the labels, at the first temperature.
template <class A, int kItems>
__device__ __forceinline__ void restore_exponentials(const Params<A>& p, RowState<A, kItems>& row) {
  if constexpr (kMakesExponentialsAgain<kItems>) {
#pragma unroll
    for (int i = 0; i < kItems; ++i) row.e_s[i] = exp_negative(row.x_s[i] * p.inv_t[0]);
  }
}

// The teacher in row.t, or a mixture of logits.
template <class A, int kItems, class Threads>
__device__ __forceinline__ A teach_otherwise(const Params<A>& p, RowState<A, kItems>& row, int64_t index, A inv_t, A weight,
                                             const Scale<A>& scale, Threads& threads) {
  const A ratio = row.z_s / teacher_sum(row, inv_t, threads), log_ratio = natural_log(ratio);
  const auto of = [&](int i) {
    const A x_t = row.t[i] * inv_t;
    return ClassOfTwo<A>{x_t, ratio * exp_negative(x_t), row.x_s[i] * inv_t, student_exponential(row, i, inv_t),
                         (row.t[i] - row.x_s[i]) * inv_t + log_ratio};
  };
  const A factor = weight * scale.grad / row.z_s;
  const auto result =
      diverge(p, row, index, A(1), row.z_s, factor, threads, of, [&](int i) { return student_exponential(row, i, inv_t); });
  row.bound += magnitude(weight * scale.grad) * result.bound;
  return weight * scale.loss * result.value;
}

// Logarithms of probabilities of the teacher in row.t mixed into those in row.acc: cpu_divergence.h, mix_logs().
template <class A, int kItems, class Threads>
__device__ __forceinline__ void mix_log_probabilities(RowState<A, kItems>& row, A inv_t, A share, Threads& threads) {
  const A log_z = natural_log(teacher_sum(row, inv_t, threads));
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const A next = rounded_product(row.t[i], inv_t) - log_z;
    row.acc[i] = share == 1 ? next : mix_log(row.acc[i], next, share);
  }
}

template <class A, int kItems, class Threads>
__device__ __forceinline__ A diverge_from_mixture(const Params<A>& p, RowState<A, kItems>& row, int64_t index,
                                                  Threads& threads) {
  const A mass = p.total_of(index), log_z = natural_log(row.z_s), inv_t = p.inv_t[0];
  const bool pair = p.divergence == Divergence::pair;
  const A ratio = pair ? A(1) : mass, log_ratio = pair || mass == 1 ? A(0) : natural_log(mass);
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    row.t[i] = row.acc[i];
    row.acc[i] = 0;
  }
  const auto log_q = [&](int i) { return rounded_product(row.x_s[i], inv_t) - log_z; };
  const auto of = [&](int i) {
    const A x_s = log_q(i);
    return ClassOfTwo<A>{row.t[i], ratio * exp_negative(row.t[i]), x_s, exp_negative(x_s), (row.t[i] - x_s) + log_ratio};
  };
  const auto q = [&](int i) { return exp_negative(log_q(i)); };
  const auto result = diverge(p, row, index, mass, A(1), p.scale[0].grad, threads, of, q);
  row.bound = magnitude(p.scale[0].grad) * result.bound;
  return p.scale[0].loss * result.value;
}

// The distillation term; its gradient in row.acc, its bound in row.bound.
template <int Width, class A, int kItems, class Threads>
__device__ __forceinline__ A distill_otherwise(const Params<A>& p, RowState<A, kItems>& row, int64_t index, Threads& threads) {
  const unsigned reads = p.reads_of(index);
  A loss = 0, total = 0;
  row.bound = 0;
#pragma unroll
  for (int i = 0; i < kItems; ++i) row.acc[i] = 0;
#pragma unroll 1
  for (int k = next_teacher(reads, -1), count = 1; k != kNoTeacher; k = next_teacher(reads, k), ++count) {
    load_row<Width>(p, k + 1, any_row(p.network[k + 1], index), threads, row.t);
    const A weight = p.weight_of(k, index), part = p.uniform ? A(1) : weight;
    total += part;
    if (p.combine == Combine::losses) {
      if (p.several_temperatures) student_exponentials(row, p.inv_t[k], threads);
      loss += teach_otherwise(p, row, index, p.inv_t[k], weight, p.scale[k], threads);
    } else if (p.combine == Combine::probs) {
      mix_log_probabilities(row, p.inv_t[0], count == 1 ? A(1) : part / total, threads);
    } else {
#pragma unroll
      for (int i = 0; i < kItems; ++i)
        row.acc[i] = mix_logit(row.acc[i], row.t[i], p.uniform, p.uniform ? A(1) / A(count) : weight);
    }
  }
  if (p.combine == Combine::losses || reads == 0) return loss;
  if (p.combine == Combine::probs) return diverge_from_mixture(p, row, index, threads);
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    row.t[i] = row.acc[i];
    row.acc[i] = 0;
  }
  return teach_otherwise(p, row, index, p.inv_t[0], A(1), p.scale[0], threads);
}

}  // namespace FASTKD_TARGET
}  // namespace fastkd::multi_teacher
