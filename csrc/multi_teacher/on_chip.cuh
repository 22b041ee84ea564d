// A row in the registers of a warp or a block: each tensor is read once, the gradient is written in the forward pass.
#pragma once

#include "core/block.cuh"
#include "group_stats/row.cuh"
#include "multi_teacher/launch.cuh"

namespace fastkd::multi_teacher {
inline namespace FASTKD_TARGET {

// A row's data in this thread: classes past the end are -inf, like masked ones.
template <class A, int kItems>
struct RowState {
  A x_s[kItems];    // (s - max), at T = 1
  A e_s[kItems];    // exp(x_s / T)
  A t[kItems];      // a teacher's logits, then relative to their maximum
  A acc[kItems];    // gradient (losses, logits) or mixture (probs, logits)
  A z_s;
};

// e_s at inv_t; z_s.
template <class A, int kItems, class Threads>
__device__ __forceinline__ void student_exponentials(RowState<A, kItems>& row, A inv_t, Threads& threads) {
  Numbers<A, 1> z{{0}};
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    row.e_s[i] = exp_negative(row.x_s[i] * inv_t);
    z.v[0] += row.e_s[i];
  }
  row.z_s = threads.sum(z).v[0];
}

// t := exp((t - max) / T), after which {z, a} of the teacher (math.h).
template <class A, int kItems, class Threads>
__device__ __forceinline__ Numbers<A, 2> teacher_sums(RowState<A, kItems>& row, A inv_t, Threads& threads) {
  const A top = threads.max(max_item(-A(kInf), row.t));
  Numbers<A, 2> sums{{0, 0}};
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const A x = (row.t[i] - top) * inv_t;
    row.t[i] = exp_negative(x);
    sums.v[0] += row.t[i];
    sums.v[1] += weighted_gap(row.t[i], x, row.x_s[i] * inv_t);
  }
  return threads.sum(sums);
}

// One teacher in row.t: its divergence; its weighted gradient is added to row.acc.
template <class A, int kItems, class Threads>
__device__ __forceinline__ A teach(RowState<A, kItems>& row, A weight, A inv_t, const Scale<A>& scale, Threads& threads) {
  const Numbers<A, 2> sums = teacher_sums(row, inv_t, threads);
  const A z = sums.v[0], factor = weight * scale.grad / row.z_s, ratio = row.z_s / z;
#pragma unroll
  for (int i = 0; i < kItems; ++i) row.acc[i] += factor * (row.e_s[i] - ratio * row.t[i]);
  return divergence(sums.v[1], z, row.z_s);
}

// combine="probs", after the last teacher: row.acc holds the mixture and becomes the gradient.
template <class A, int kItems, class Threads>
__device__ __forceinline__ A mixture_divergence(RowState<A, kItems>& row, A total, A inv_t, const Scale<A>& scale, Threads& threads) {
  const A log_z = natural_log(row.z_s), factor = scale.grad * total / row.z_s, ratio = row.z_s / total;
  Numbers<A, 1> loss{{0}};
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const A p = row.acc[i];
    loss.v[0] += mixture_gap(p, row.x_s[i] * inv_t - log_z);
    row.acc[i] = factor * (row.e_s[i] - ratio * p);
  }
  return scale.loss * threads.sum(loss).v[0];
}

// What the statistics need beside the row, where they are wanted: counters of the row's threads.
template <bool Wanted, int ThreadsPerRow>
struct Statistics {
  static constexpr bool kWanted = Wanted;
  RowThreads<int, ThreadsPerRow> counters;

  // Of a network, the student or teacher k at 0 or k + 1, from its row `from`, which is in `logits`.
  template <int Width, class T, class A, int kItems, class Threads>
  __device__ __forceinline__ void keep(const Params<A>& p, int network, int64_t index, const T* from,
                                       const A (&logits)[kItems], Threads& threads) {
    if constexpr (Wanted) {
      const auto label = group_stats::label_of<T, A>(p.target, index, p.ignore_index, p.classes, from);
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

// The distillation term; its gradient in row.acc. e_s stands at the first temperature.
template <class S, class T, class A, int kItems, class Threads, class Stats>
__device__ __forceinline__ A distill(const Params<A>& p, RowState<A, kItems>& row, int64_t index, Threads& threads,
                                     Stats& stats) {
  constexpr int kWidth = kVector<S, T>, kThreads = Threads::kThreads;
  const A masked = -A(kInf);
  A loss = 0, total = 0;
  A next[kItems];
  const auto load = [&](int k) {
    load_items<kItems, kWidth>(p.template teacher_row<T>(k, index), 0, p.classes, kThreads, threads.thread,
                               p.teacher_in_vectors(k), masked, next);
  };
  load(0);
#pragma unroll
  for (int i = 0; i < kItems; ++i) row.acc[i] = 0;
#pragma unroll 1
  for (int k = 0; k < p.teachers; ++k) {
    if (Stats::kWanted && k > 0) load(k);
#pragma unroll
    for (int i = 0; i < kItems; ++i) row.t[i] = next[i];
    stats.template keep<kWidth>(p, k + 1, index, p.template teacher_row<T>(k, index), row.t, threads);
    // In flight during the reductions of this teacher; with statistics there are no registers for that.
    if (!Stats::kWanted && k + 1 < p.teachers) load(k + 1);
    const A weight = p.weight_of(k, index);
    total += weight;
    if (p.combine == Combine::losses) {
      if (k > 0 && p.several_temperatures) student_exponentials(row, p.inv_t[k], threads);
      const A kl = teach(row, weight, p.inv_t[k], p.scale[k], threads);
      stats.keep_divergence(p, k, index, kl);
      loss += weighted(weight, p.scale[k].loss, kl);
    } else if (p.combine == Combine::probs) {
      const Numbers<A, 2> sums = teacher_sums(row, p.inv_t[0], threads);
      const A factor = weight / sums.v[0];
      stats.keep_divergence(p, k, index, divergence(sums.v[1], sums.v[0], row.z_s));
#pragma unroll
      for (int i = 0; i < kItems; ++i) row.acc[i] += factor * row.t[i];
    } else {
#pragma unroll
      for (int i = 0; i < kItems; ++i)
        row.acc[i] += row.t[i] == masked ? (weight == 0 ? A(0) : masked) : weight * row.t[i];
      if constexpr (Stats::kWanted) {
        const Numbers<A, 2> sums = teacher_sums(row, p.inv_t[0], threads);
        stats.keep_divergence(p, k, index, divergence(sums.v[1], sums.v[0], row.z_s));
      }
    }
  }
  if (p.combine == Combine::probs) return mixture_divergence(row, total, p.inv_t[0], p.scale[0], threads);
  if (p.combine == Combine::losses) return loss;
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    row.t[i] = item_class<kWidth>(int64_t(0), i, kThreads, threads.thread) < p.classes ? row.acc[i] : masked;
    row.acc[i] = 0;
  }
  return p.scale[0].loss * teach(row, A(1), p.inv_t[0], p.scale[0], threads);
}

// A row without a loss has statistics all the same; its divergences are 0, or NaN for a label out of range.
template <class S, class T, class A, int kItems, class Threads, class Stats>
__device__ __forceinline__ void keep_stats_alone(const Params<A>& p, RowState<A, kItems>& row, int64_t index, A divergences,
                                                 Threads& threads, Stats& stats) {
  constexpr int kWidth = kVector<S, T>, kThreads = Threads::kThreads;
  const S* student = p.template student_row<S>(index);
  load_items<kItems, kWidth>(student, 0, p.classes, kThreads, threads.thread, p.student_vectors, -A(kInf), row.t);
  stats.template keep<kWidth>(p, 0, index, student, row.t, threads);
#pragma unroll 1
  for (int k = 0; k < p.teachers; ++k) {
    const T* teacher = p.template teacher_row<T>(k, index);
    load_items<kItems, kWidth>(teacher, 0, p.classes, kThreads, threads.thread, p.teacher_in_vectors(k), -A(kInf), row.t);
    stats.template keep<kWidth>(p, k + 1, index, teacher, row.t, threads);
    stats.keep_divergence(p, k, index, divergences);
  }
}

// The row's gradient leaves in the student's type, for float16 scaled (math.h, half_scale).
template <class S, int Width, class A, int kItems, class Threads>
__device__ __forceinline__ void store_gradient(const Params<A>& p, RowState<A, kItems>& row, int64_t index, int64_t label, A z_one,
                                               Threads& threads) {
  A scale = 1;
  if (p.half_student) {
    A bound = 0;
    for (int k = 0; k < p.teachers; ++k) bound += magnitude(p.weight_of(k, index)) * p.scale[k].grad;
    scale = A(half_scale(float(gradient_bound(p.combine, bound, p.scale[0].grad, p.ce_weight))));
    if (threads.thread == 0) p.saved[index] = 1 / scale;
  }
  const bool hard = p.ce_weight != 0;
  const A factor = hard ? p.ce_weight / z_one : A(0), uniform = p.ce_weight * p.smoothing / A(p.classes);
  const int integer_t = p.several_temperatures ? 0 : p.integer_t;
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    if (hard) {
      row.acc[i] += factor * exponential_at_one(integer_t, row.x_s[i], row.e_s[i]) - uniform;
      const int64_t c = item_class<Width>(int64_t(0), i, Threads::kThreads, threads.thread);
      if (c == label) row.acc[i] -= p.ce_weight * (1 - p.smoothing);
    }
    row.acc[i] *= scale;
  }
  store_items<kItems, Width>(p.template grad_row<S>(index), 0, p.classes, Threads::kThreads, threads.thread,
                             p.grad_vectors, row.acc);
}

// Cross-entropy's sums {sum exp(s - max), sum (s - max)}.
template <int Width, class A, int kItems, class Threads>
__device__ __forceinline__ Numbers<A, 2> label_sums(const Params<A>& p, const RowState<A, kItems>& row, Threads& threads) {
  Numbers<A, 2> sums{{0, 0}};
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const bool inside = item_class<Width>(int64_t(0), i, Threads::kThreads, threads.thread) < p.classes;
    sums.v[0] += exponential_at_one(p.integer_t, row.x_s[i], row.e_s[i]);
    sums.v[1] += inside && p.smoothing > 0 ? row.x_s[i] : A(0);
  }
  return threads.sum(sums);
}

template <class S, class T, class A, class Policy, bool WithStats>
__global__ void __launch_bounds__(Policy::kBlock) on_chip_kernel(const __grid_constant__ Params<A> p) {
  using Threads = RowThreads<A, Policy::kThreads>;
  constexpr int kWidth = kVector<S, T>, kItems = Policy::kItems;
  SIMT_SHARED(A, buffer, 2 * Threads::kWarps * Threads::kMost);
  SIMT_SHARED(int, counters_buffer, WithStats ? 2 * Threads::kWarps * Threads::kMost : 1);
  Threads threads{int(threadIdx.x) % Policy::kThreads, 0, buffer};
  Statistics<WithStats, Policy::kThreads> stats{{threads.thread, 0, counters_buffer}};
  const int64_t index = int64_t(blockIdx.x) * Policy::kRows + threadIdx.x / Policy::kThreads;
  if (index >= p.rows) return;  // whole warps: a row of less than a block needs no barrier
  RowState<A, kItems> row;
  const Label kind = label_kind(p.target, index, p.ignore_index, p.classes);
  if (kind == Label::ignored || kind == Label::outside) {
    const A nothing = kind == Label::ignored ? A(0) : A(__builtin_nanf(""));
    if constexpr (WithStats) keep_stats_alone<S, T>(p, row, index, nothing, threads, stats);
    if (threads.thread == 0) p.row_loss[index] = nothing;
    if (!p.need_grad) return;
    if (threads.thread == 0 && p.half_student) p.saved[index] = 1;
#pragma unroll
    for (int i = 0; i < kItems; ++i) row.acc[i] = nothing;
    store_items<kItems, kWidth>(p.template grad_row<S>(index), 0, p.classes, Policy::kThreads, threads.thread,
                                p.grad_vectors, row.acc);
    return;
  }
  const S* student = p.template student_row<S>(index);
  load_items<kItems, kWidth>(student, 0, p.classes, Policy::kThreads, threads.thread, p.student_vectors, -A(kInf), row.x_s);
  stats.template keep<kWidth>(p, 0, index, student, row.x_s, threads);
  const A max_student = threads.max(max_item(-A(kInf), row.x_s));
#pragma unroll
  for (int i = 0; i < kItems; ++i) row.x_s[i] -= max_student;
  student_exponentials(row, p.inv_t[0], threads);

  A loss = 0, z_one = 1;
  int64_t label = -1;
  if (p.ce_weight != 0) {
    label = p.target[index];
    const Numbers<A, 2> sums = label_sums<kWidth>(p, row, threads);
    z_one = sums.v[0];
    const A x_label = A(load_as(student[label])) - max_student;
    loss = p.ce_weight * cross_entropy(z_one, x_label, sums.v[1], p.smoothing, p.classes);
  }
  loss += distill<S, T>(p, row, index, threads, stats);
  if (p.need_grad) store_gradient<S, kWidth>(p, row, index, label, z_one, threads);
  if (threads.thread == 0) p.row_loss[index] = loss;
}

}  // namespace FASTKD_TARGET
}  // namespace fastkd::multi_teacher
