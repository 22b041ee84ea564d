// A row in the registers of a warp or a block: each tensor is read once, the gradient is written in the forward pass.
#pragma once

#include "group_stats/row.cuh"
#include "multi_teacher/on_chip_divergence.cuh"

namespace fastkd::multi_teacher {
inline namespace FASTKD_TARGET {

// t := exp((t - max) / T), after which {z, a} of the teacher (math.h).
template <class A, int kItems, class Threads>
__device__ __forceinline__ Numbers<A, 2> teacher_sums(RowState<A, kItems>& row, A inv_t, Threads& threads) {
  const A top = threads.max(max_item(-A(kInf), row.t));
  Numbers<A, 2> sums{{0, 0}};
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const A above = row.t[i] - top, x = above * inv_t;
    row.t[i] = exp_negative(x);
    sums.v[0] += row.t[i];
    sums.v[1] += masked_gap(row.t[i], x, (above - row.x_s[i]) * inv_t);  // fused, a difference of products is not 0
  }
  return threads.sum(sums);
}

// The gradient of a teacher of sum z, whose exponentials are in row.t.
template <class A, int kItems>
__device__ __forceinline__ void add_gradient(RowState<A, kItems>& row, A weight, A z) {
  const A factor = weight / row.z_s, ratio = row.z_s / z;
#pragma unroll
  for (int i = 0; i < kItems; ++i) row.acc[i] += factor * (row.e_s[i] - ratio * row.t[i]);
}

// combine="probs", after the last teacher: row.acc holds the weighted sum and becomes the gradient.
template <class A, int kItems, class Threads>
__device__ __forceinline__ A from_mixture(const Params<A>& p, RowState<A, kItems>& row, int64_t index, Threads& threads) {
  const A total = p.total_of(index), inv_total = 1 / total, inv_z = 1 / row.z_s, factor = p.scale[0].grad * total * inv_z;
  Numbers<A, 1> gap{{0}};
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const A mixed = row.acc[i] * inv_total;
    gap.v[0] += mixture_gap(mixed, row.x_s[i] * p.inv_t[0], row.e_s[i], row.z_s, inv_z);
    row.acc[i] = factor * (row.e_s[i] - row.z_s * mixed);
  }
  return p.scale[0].loss * mixture_divergence(threads.sum(gap).v[0], total);
}

// What the statistics need beside the row, where they are wanted: counters of the row's threads.
template <bool Wanted, int ThreadsPerRow>
struct Statistics {
  static constexpr bool kWanted = Wanted;
  RowThreads<int, ThreadsPerRow> counters;

  // Of a network, the student or teacher k at 0 or k + 1, from its row `from`, which is in `logits`.
  template <int Width, class A, int kItems, class Threads>
  __device__ __forceinline__ void keep(const Params<A>& p, int network, int64_t index, const AnyRow& from,
                                       const A (&logits)[kItems], Threads& threads) {
    if constexpr (Wanted) {
      group_stats::Label<A> label;
      const int64_t* target = p.labels ? p.target : nullptr;
      visit(from,
            [&]<class T>(const T* row) { label = group_stats::label_of<T, A>(target, index, p.ignore_index, p.classes, row); });
      group_stats::RowPart<A, Width, ThreadsPerRow> part{label, threads.thread};
      part.push(logits, 0);
      const group_stats::RowStats<A> stats = part.reduce(threads, counters, p.classes);
      if (threads.thread == 0) group_stats::store(p.stats, network * p.rows + index, stats);
    }
  }

  template <class A>
  __device__ __forceinline__ void keep_divergence(const Params<A>& p, int k, int64_t index, A kl) const {
    if constexpr (Wanted) {
      if (counters.thread == 0) p.kl[k * p.rows + index] = kl;
    }
  }
};

// Teacher k, in row.t: its part of the distillation term, and of row.acc. `step` is 1 over the teachers so far.
// e_s stands at the temperature of the teacher before. A teacher that does not count is here for its statistics.
template <class A, int kItems, class Threads, class Stats>
__device__ __forceinline__ A learn(const Params<A>& p, RowState<A, kItems>& row, int k, int64_t index, bool counts, A step,
                                   Threads& threads, Stats& stats) {
  const A weight = p.weight_of(k, index);
  if (p.combine == Combine::logits && counts) {
#pragma unroll
    for (int i = 0; i < kItems; ++i) row.acc[i] = mix_logit(row.acc[i], row.t[i], p.uniform, p.uniform ? step : weight);
  }
  if (p.combine == Combine::logits && !Stats::kWanted) return 0;
  if (p.several_temperatures) student_exponentials(row, p.inv_t[k], threads);
  const Numbers<A, 2> sums = teacher_sums(row, p.inv_t[k], threads);
  const A kl = divergence(sums.v[1], sums.v[0], row.z_s);
  stats.keep_divergence(p, k, index, kl);
  if (!counts || p.combine == Combine::logits) return 0;
  if (p.combine == Combine::losses) {
    add_gradient(row, weight * p.scale[k].grad, sums.v[0]);
    return weight * p.scale[k].loss * kl;
  }
  const A factor = weight / sums.v[0];
#pragma unroll
  for (int i = 0; i < kItems; ++i) row.acc[i] += factor * row.t[i];
  return 0;
}

// learn() of every teacher in `reads`, the next one's row in flight during the reductions of one.
template <int Width, class A, int kItems, class Threads, class Stats>
__device__ __forceinline__ A learn_one_ahead(const Params<A>& p, RowState<A, kItems>& row, int64_t index, unsigned reads,
                                             Threads& threads, Stats& stats) {
  A loss = 0, next[kItems];
  int count = 0;
#pragma unroll 1
  for (int k = -1; k != kNoTeacher;) {
    const int following = next_teacher(reads, k);
    if (k >= 0) {
#pragma unroll
      for (int i = 0; i < kItems; ++i) row.t[i] = next[i];
    }
    if (following != kNoTeacher) load_row<Width>(p, following + 1, any_row(p.network[following + 1], index), threads, next);
    if (k >= 0) loss += learn(p, row, k, index, true, 1 / A(++count), threads, stats);
    k = following;
  }
  return loss;
}

// The same where there are no registers for a next row; with statistics, of those of all teachers.
template <int Width, class A, int kItems, class Threads, class Stats>
__device__ __forceinline__ A learn_in_turn(const Params<A>& p, RowState<A, kItems>& row, int64_t index, unsigned reads,
                                           Threads& threads, Stats& stats) {
  A loss = 0;
  int count = 0;
#pragma unroll 1
  for (int k = 0; k < p.teachers; ++k) {
    const bool counts = reads >> k & 1u;
    if (!Stats::kWanted && !counts) continue;
    const AnyRow from = any_row(p.network[k + 1], index);
    load_row<Width>(p, k + 1, from, threads, row.t);
    stats.template keep<Width>(p, k + 1, index, from, row.t, threads);
    count += counts;
    loss += learn(p, row, k, index, counts, 1 / A(count), threads, stats);
  }
  return loss;
}

// The distillation term; its gradient in row.acc.
template <int Width, class A, int kItems, class Threads, class Stats>
__device__ __forceinline__ A distill(const Params<A>& p, RowState<A, kItems>& row, int64_t index, Threads& threads,
                                     Stats& stats) {
  const unsigned reads = p.reads_of(index);
#pragma unroll
  for (int i = 0; i < kItems; ++i) row.acc[i] = 0;
  A loss;
  if constexpr (Stats::kWanted || kItems > 8)
    loss = learn_in_turn<Width>(p, row, index, reads, threads, stats);
  else
    loss = learn_one_ahead<Width>(p, row, index, reads, threads, stats);
  if (p.combine == Combine::losses || reads == 0) return loss;
  if (p.combine == Combine::probs) return from_mixture(p, row, index, threads);
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    row.t[i] = row.acc[i];
    row.acc[i] = 0;
  }
  const Numbers<A, 2> sums = teacher_sums(row, p.inv_t[0], threads);
  add_gradient(row, p.scale[0].grad, sums.v[0]);
  return p.scale[0].loss * divergence(sums.v[1], sums.v[0], row.z_s);
}

// A row without a loss has statistics all the same; its divergences are 0, or NaN for a label out of range.
template <int Width, class A, int kItems, class Threads, class Stats>
__device__ __forceinline__ void keep_stats_alone(const Params<A>& p, RowState<A, kItems>& row, int64_t index, A divergences,
                                                 Threads& threads, Stats& stats) {
#pragma unroll 1
  for (int slot = 0; slot <= p.teachers; ++slot) {
    const AnyRow from = any_row(p.network[slot], index);
    load_row<Width>(p, slot, from, threads, row.t);
    stats.template keep<Width>(p, slot, index, from, row.t, threads);
    if (slot > 0) stats.keep_divergence(p, slot - 1, index, divergences);
  }
}

// The labels' side of a row.
template <class A>
struct LabelTerm {
  A loss = 0, mass = 1, z = 1;  // the cross-entropy, the sum of the labels' probabilities, of exp(s - max)
  int64_t label = -1;
};

// The cross-entropy. row.e_s becomes exp(x_s), and row.t holds soft labels.
template <int Width, class S, class A, int kItems, class Threads>
__device__ __forceinline__ LabelTerm<A> label_term(const Params<A>& p, RowState<A, kItems>& row, int64_t index,
                                                   const S* student, A max_student, Threads& threads) {
  LabelTerm<A> term;
  const bool soft = p.soft.data != nullptr;
  const int integer_t = p.several_temperatures ? 0 : p.integer_t;  // e_s stands at the last temperature
  if (soft)
    load_items<kItems, Width>(any_row(p.soft, index), 0, p.classes, Threads::kThreads, threads.thread, p.soft_vectors, A(0),
                              row.t);
  Numbers<A, 2> sums{{0, 0}};
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const bool inside = item_class<Width>(int64_t(0), i, Threads::kThreads, threads.thread) < p.classes;
    row.e_s[i] = exponential_at_one(integer_t, row.x_s[i], row.e_s[i]);
    sums.v[0] += row.e_s[i];
    sums.v[1] += inside && p.smoothing > 0 ? row.x_s[i] : A(0);
  }
  sums = threads.sum(sums);
  term.z = sums.v[0];
  if (soft) {
    Numbers<A, 2> labels{{0, 0}};
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      labels.v[0] += row.t[i];
      labels.v[1] += soft_part(row.t[i], row.x_s[i]);
    }
    labels = threads.sum(labels);
    term.mass = labels.v[0];
    term.loss = cross_entropy_of_soft(term.z, term.mass, labels.v[1], sums.v[1], p.smoothing, p.classes);
    return term;
  }
  term.label = p.target[index];
  const A x_label = A(load_as(student[term.label])) - max_student;
  term.loss = cross_entropy(term.z, x_label, sums.v[1], p.smoothing, p.classes);
  return term;
}

// No element of the forward divergences' gradient is above it.
template <class A>
__device__ __forceinline__ A forward_bound(const Params<A>& p, int64_t index) {
  A bound = 0;
#pragma unroll 1
  for (int k = 0; k < p.teachers; ++k) bound += magnitude(p.weight_of(k, index) * p.scale[k].grad);
  return p.combine == Combine::logits ? magnitude(p.scale[0].grad) : bound;
}

// The row's gradient leaves in the student's type, in float16 times a power of two (core/softmax_math.h, half_scale).
template <class S, int Width, bool Other, class A, int kItems, class Threads>
__device__ __forceinline__ void store_gradient(const Params<A>& p, RowState<A, kItems>& row, int64_t index,
                                               const LabelTerm<A>& term, Threads& threads) {
  const A mass = smoothed_mass(term.mass, p.smoothing);
  A scale = p.factor.value();
  if (p.half_student) {
    const A bound = Other ? row.bound : forward_bound(p, index);
    scale = A(half_scale(float(bound + magnitude(p.ce_weight * mass))));
    if (threads.thread == 0) p.saved[index] = 1 / scale;
  }
  const A factor = p.ce_weight * mass / term.z, uniform = p.ce_weight * p.smoothing / A(p.classes);
  const A sharp = p.ce_weight * (1 - p.smoothing);
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    if (p.ce_weight != 0) {
      const int64_t c = item_class<Width>(int64_t(0), i, Threads::kThreads, threads.thread);
      const A y = p.soft.data ? row.t[i] : c == term.label ? A(1) : A(0);
      row.acc[i] += factor * row.e_s[i] - uniform - sharp * y;
    }
    row.acc[i] *= scale;
  }
  store_items<kItems, Width>(p.template grad_row<S>(index), 0, p.classes, Threads::kThreads, threads.thread, p.grad_vectors,
                             row.acc);
}

// A row that has no loss: 0, or NaN for a label out of range, also in the gradient.
template <class S, int Width, class A, int kItems, class Threads>
__device__ __forceinline__ void store_nothing(const Params<A>& p, RowState<A, kItems>& row, int64_t index, A nothing,
                                              Threads& threads) {
  if (threads.thread == 0) p.store_losses(index, nothing, nothing);
  if (!p.need_grad) return;
  if (threads.thread == 0 && p.half_student) p.saved[index] = 1;
#pragma unroll
  for (int i = 0; i < kItems; ++i) row.acc[i] = nothing;
  store_items<kItems, Width>(p.template grad_row<S>(index), 0, p.classes, Threads::kThreads, threads.thread, p.grad_vectors,
                             row.acc);
}

// A row of this thread's. `Other`: of another divergence than forward, without statistics.
template <class S, class A, class Policy, bool WithStats, bool Other>
__device__ __forceinline__ void on_chip_row(const Params<A>& p, A* buffer, int* counters_buffer) {
  using Threads = RowThreads<A, Policy::kThreads>;
  constexpr int kWidth = kVector<S, S>, kItems = Policy::kItems;
  Threads threads{int(threadIdx.x) % Policy::kThreads, 0, buffer};
  Statistics<WithStats, Policy::kThreads> stats{{threads.thread, 0, counters_buffer}};
  const int64_t index = int64_t(blockIdx.x) * Policy::kRows + threadIdx.x / Policy::kThreads;
  if (index >= p.rows) return;  // whole warps: a row of less than a block needs no barrier
  RowState<A, kItems> row;
  const Label kind = label_kind(p.target, index, p.ignore_index, p.classes);
  if (kind == Label::ignored || kind == Label::outside) {
    const A nothing = kind == Label::ignored ? A(0) : A(__builtin_nanf(""));
    if constexpr (WithStats) keep_stats_alone<kWidth>(p, row, index, nothing, threads, stats);
    return store_nothing<S, kWidth>(p, row, index, nothing, threads);
  }
  const S* student = row_in_memory<S>(p.network[0], index);
  load_items<kItems, kWidth>(student, 0, p.classes, Policy::kThreads, threads.thread, p.in_vectors(0), -A(kInf), row.x_s);
  stats.template keep<kWidth>(p, 0, index, {student, p.network[0].type}, row.x_s, threads);
  const A max_student = threads.max(max_item(-A(kInf), row.x_s));
#pragma unroll
  for (int i = 0; i < kItems; ++i) row.x_s[i] -= max_student;
  student_exponentials(row, p.inv_t[0], threads);

  A kd;
  if constexpr (Other) {
    kd = distill_otherwise<kWidth>(p, row, index, threads);
    restore_exponentials(p, row);
  } else {
    kd = distill<kWidth>(p, row, index, threads, stats);
  }
  LabelTerm<A> term;
  if (p.cross_entropy) term = label_term<kWidth>(p, row, index, student, max_student, threads);
  if (p.need_grad) store_gradient<S, kWidth, Other>(p, row, index, term, threads);
  if (threads.thread == 0) p.store_losses(index, kd, term.loss);
}

// A least number of blocks: without one ptxas aims at 96 registers and spills some.
template <class S, class A, class Policy, bool WithStats>
__global__ void __launch_bounds__(Policy::kBlock, WithStats ? 1 : 0) on_chip_kernel(const __grid_constant__ Params<A> p) {
  using Threads = RowThreads<A, Policy::kThreads>;
  SIMT_SHARED(A, buffer, 2 * Threads::kWarps * Threads::kMost);
  SIMT_SHARED(int, counters_buffer, WithStats ? 2 * Threads::kWarps * Threads::kMost : 1);
  on_chip_row<S, A, Policy, WithStats, false>(p, buffer, counters_buffer);
}

template <class S, class A, class Policy>
__global__ void __launch_bounds__(Policy::kBlock, 1) divergence_kernel(const __grid_constant__ Params<A> p) {
  using Threads = RowThreads<A, Policy::kThreads>;
  SIMT_SHARED(A, buffer, 2 * Threads::kWarps * Threads::kMost);
  on_chip_row<S, A, Policy, false, true>(p, buffer, nullptr);
}

}  // namespace FASTKD_TARGET
}  // namespace fastkd::multi_teacher
