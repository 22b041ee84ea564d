// The divergences besides forward, of rows that do not fit on chip. The forward of streaming.cuh or stream_rows.cuh has left
// maxima and sums in `saved`; a second read sums the divergences up, and a third one makes the gradient.
#pragma once

#include "multi_teacher/streaming.cuh"

namespace fastkd::multi_teacher {
inline namespace FASTKD_TARGET {

// What a row is compared with, a teacher or a mixture: from the row's states, the numbers of class_part() and RowDivergence.
template <class A>
struct StreamedPair {
  A max_student, max_teacher, inv_t, ratio, log_ratio, z, mass;
  A log_z;         // of the student, for a mixture of probabilities
  A loss, factor;  // of value and gradient, which is in units whose sum is z
  A* pull;         // behind the states of all teachers
};

// `k`: the teacher; of a mixture of probabilities the first one, and 0 of logits, whose states are one teacher's. The maxima
// themselves, not base_of(): a row that is masked as a whole becomes NaN.
template <class A>
__device__ __forceinline__ StreamedPair<A> streamed_pair(const Params<A>& p, int64_t row, int k) {
  A *const saved = p.saved + row * p.saved_columns, *const state = saved + saved_head(p) + kSavedTeacher * k;
  const A weight = p.combine == Combine::losses ? p.weight_of(k, row) : A(1);
  StreamedPair<A> of{saved[0], state[0], p.inv_t[k], state[2] / state[1], 0, state[2], 1, 0};
  if (p.combine == Combine::probs) {
    of.mass = p.total_of(row);
    of.ratio = p.divergence == Divergence::pair ? A(1) : of.mass;
    of.log_z = natural_log(of.z);
    of.z = of.inv_t = 1;
    of.max_teacher = 0;
  }
  of.log_ratio = of.ratio == 1 ? A(0) : natural_log(of.ratio);
  of.loss = weight * p.scale[k].loss;
  of.factor = weight * p.scale[k].grad / of.z;
  of.pull = saved + saved_head(p) + kSavedTeacher * p.teachers + k;
  return of;
}

// A tile of teacher k's logits, or of the mixture of those in `reads`, of logits or of logarithms of probabilities; relative to
// the maximum. One loop and one load for all three: they are half of the code. cpu_divergence.h, mix_logs().
template <int Width, class A>
__device__ __forceinline__ void load_compared(const Params<A>& p, const StreamedPair<A>& of, int k, unsigned reads, int64_t row,
                                              int64_t first, A (&t)[kStreamItems]) {
  const A* states = p.saved + row * p.saved_columns + saved_head(p);
  const unsigned set = p.combine == Combine::losses ? 1u << k : reads;
  A one[kStreamItems], total = 0;
  int count = 0;
#pragma unroll
  for (int i = 0; i < kStreamItems; ++i) t[i] = 0;
#pragma unroll 1
  for (int j = next_teacher(set, -1); j != kNoTeacher; j = next_teacher(set, j)) {
    load_network<Width>(p, j + 1, row, first, one);
    const A weight = p.weight_of(j, row), part = p.uniform ? A(1) : weight, step = p.uniform ? 1 / A(++count) : weight;
    total += part;
    if (p.combine == Combine::probs) {
      const A share = part / total, max = states[kSavedTeacher * j], log_z = natural_log(states[kSavedTeacher * j + 1]);
#pragma unroll
      for (int i = 0; i < kStreamItems; ++i) {
        const A next = rounded_product(one[i] - max, p.inv_t[0]) - log_z;
        t[i] = share == 1 ? next : mix_log(t[i], next, share);
      }
    } else {
      const bool mixes = p.combine == Combine::logits;
#pragma unroll
      for (int i = 0; i < kStreamItems; ++i) t[i] = mixes ? mix_logit(t[i], one[i], p.uniform, step) : one[i];
    }
  }
#pragma unroll
  for (int i = 0; i < kStreamItems; ++i) t[i] -= of.max_teacher;
}

// The student's tile, relative to its maximum; for a mixture of probabilities, the logarithms of its own.
template <class S, class A>
__device__ __forceinline__ void load_compared_student(const Params<A>& p, const StreamedPair<A>& of, int64_t row, int64_t first,
                                                      A (&s)[kStreamItems]) {
  load_student<S>(p, row, first, s);
#pragma unroll
  for (int i = 0; i < kStreamItems; ++i) {
    s[i] -= of.max_student;
    if (p.combine == Combine::probs) s[i] = rounded_product(s[i], p.inv_t[0]) - of.log_z;
  }
}

// s becomes the student's q in units whose sum is z, t the `push` of each class. Products of their own rounding: fused into the
// exponential of one network alone, equal ones would differ.
template <Divergence Kind, class A>
__device__ __forceinline__ void push_tile(const StreamedPair<A>& of, const DivergenceNumbers<A>& w, A (&s)[kStreamItems],
                                          A (&t)[kStreamItems], Numbers<A, 2>& sums) {
#pragma unroll
  for (int i = 0; i < kStreamItems; ++i) {
    const A x_t = rounded_product(t[i], of.inv_t), x_s = rounded_product(s[i], of.inv_t), q = exp_negative(x_s);
    const A d = (t[i] - s[i]) * of.inv_t + of.log_ratio;
    const ClassPart<A> part = class_part<Kind>(x_t, of.ratio * exp_negative(x_t), x_s, q, d, w);
    sums.v[0] += part.first;
    sums.v[1] += part.second;
    t[i] = part.push;
    s[i] = q;
  }
}

template <class A>
__device__ __forceinline__ void push_tile(const Params<A>& p, const StreamedPair<A>& of, DivergenceNumbers<A> w,
                                          A (&s)[kStreamItems], A (&t)[kStreamItems], Numbers<A, 2>& sums) {
  if (p.divergence == Divergence::pair) {
    w.a *= of.mass;
    push_tile<Divergence::pair>(of, w, s, t, sums);
  } else if (p.divergence == Divergence::mixture) {
    push_tile<Divergence::mixture>(of, w, s, t, sums);
  } else {
    push_tile<Divergence::tvd>(of, w, s, t, sums);
  }
}

// What a row is compared with in turn: its teachers, or the first one's bit for a mixture.
template <class A>
__device__ __forceinline__ unsigned compared_with(const Params<A>& p, unsigned reads) {
  return p.combine == Combine::losses ? reads : p.combine == Combine::logits ? unsigned(reads != 0) : reads & (~reads + 1);
}

// A row with a loss: its divergences, added to the cross-entropy that the first read has left.
template <class S, class A>
__global__ void __launch_bounds__(kStreamThreads<A>, 3) stream_divergence_kernel(const __grid_constant__ Params<A> p) {
  using Threads = RowThreads<A, kStreamThreads<A>>;
  SIMT_SHARED(A, buffer, 2 * Threads::kWarps * Threads::kMost);
  Threads threads{int(threadIdx.x), 0, buffer};
  const int64_t row = blockIdx.x;
  const Label kind = label_kind(p.target, row, p.ignore_index, p.classes);
  if (kind == Label::ignored || kind == Label::outside) return;
  const DivergenceNumbers<A> numbers = p.numbers_at(row);
  const unsigned reads = p.reads_of(row), pairs = compared_with(p, reads);
  A kd = 0;
#pragma unroll 1
  for (int k = next_teacher(pairs, -1); k != kNoTeacher; k = next_teacher(pairs, k)) {
    const StreamedPair<A> of = streamed_pair(p, row, k);
    Numbers<A, 2> sums{{0, 0}};
#pragma unroll 1
    for (int64_t first = 0; first < p.classes; first += kStreamTile<A>) {
      A s[kStreamItems], t[kStreamItems];
      load_compared_student<S>(p, of, row, first, s);
      load_compared<kVector<S, S>>(p, of, k, reads, row, first, t);
      push_tile(p, of, numbers, s, t, sums);
    }
    sums = threads.sum(sums);
    const auto result = row_divergence(p.divergence, sums.v[0] / of.z, sums.v[1] / of.z, numbers, of.mass);
    kd += of.loss * result.value;
    if (threadIdx.x == 0) *of.pull = result.pull;
  }
  if (threadIdx.x != 0) return;
  p.row_loss[row] += p.kd_weight != 0 ? p.kd_weight * kd : A(0);
  if (p.terms) p.row_loss[p.rows + row] = kd;
}

// The gradient of one tile of one row; blocks are rows times tiles.
template <class S, class A>
__global__ void __launch_bounds__(kStreamThreads<A>, 3)
    stream_divergence_gradient_kernel(const __grid_constant__ Params<A> p, const A* grad_loss, bool per_row, const A* aux,
                                      int64_t tiles) {
  constexpr int kWidth = kVector<S, S>;
  const int64_t row = blockIdx.x / tiles, first = int64_t(blockIdx.x % tiles) * kStreamTile<A>;
  const Label kind = label_kind(p.target, row, p.ignore_index, p.classes);
  A grad[kStreamItems], s[kStreamItems], t[kStreamItems];
#pragma unroll
  for (int i = 0; i < kStreamItems; ++i) grad[i] = kind == Label::outside ? A(__builtin_nanf("")) : A(0);
  if (kind == Label::none || kind == Label::class_index) {
    const DivergenceNumbers<A> numbers = p.numbers_at(row);
    const unsigned reads = p.reads_of(row), pairs = compared_with(p, reads);
#pragma unroll 1
    for (int k = next_teacher(pairs, -1); k != kNoTeacher; k = next_teacher(pairs, k)) {
      const StreamedPair<A> of = streamed_pair(p, row, k);
      Numbers<A, 2> sums{{0, 0}};
      load_compared_student<S>(p, of, row, first, s);
      load_compared<kWidth>(p, of, k, reads, row, first, t);
      push_tile(p, of, numbers, s, t, sums);
      const A pull = *of.pull;
#pragma unroll
      for (int i = 0; i < kStreamItems; ++i) grad[i] += of.factor * (t[i] - s[i] * pull);
    }
    if (p.ce_weight != 0) {
      const A* saved = p.saved + row * p.saved_columns;
      load_student<S>(p, row, first, s);
#pragma unroll
      for (int i = 0; i < kStreamItems; ++i) s[i] -= base_of(saved[0]);
      add_label_gradient<kWidth>(p, row, first, saved, s, grad);
    }
    uncap_gradient<S>(p, row, first, grad);
  }
  store_gradient<S>(p, row, first, grad_loss[per_row ? row : 0] * aux[0], grad);
}

}  // namespace FASTKD_TARGET
}  // namespace fastkd::multi_teacher
