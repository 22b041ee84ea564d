// Rows of elements by the threads that share them: nothing is normalised over a row, so that each vector of classes is read,
// its gradient written and its losses summed before the next one, however long the row.
#pragma once

#include "core/cuda/block.cuh"
#include "core/cuda/vec.cuh"
#include "multi_label/math.h"

namespace fastkd::multi_label {
inline namespace FASTKD_TARGET {

// One launch, by value, so that it lies in constant memory.
template <class A>
struct Params {
  int64_t rows, classes, ignore_index;
  int teachers;
  Network student, labels, teacher[kMaxLaunchTeachers];
  unsigned vectors;  // a bit per network: its rows allow whole vectors; of the teachers, then the student's, the labels'
  const int64_t* target;
  const A *pos_weight, *weight;
  int64_t weight_stride_teacher, weight_stride_row;
  A host_weight[kMaxLaunchTeachers], inv_t[kMaxLaunchTeachers], scale_loss[kMaxLaunchTeachers], scale_grad[kMaxLaunchTeachers];
  A temperature, kd_weight, ce_weight, class_factor;
  bool probs, uniform, cross_entropy, terms, need_grad;
  A* row_loss;
  void* grad;
  A* saved;
  StoredFactor<A> factor;

  __device__ __forceinline__ bool in_vectors(int bit) const { return vectors >> bit & 1u; }
  __device__ __forceinline__ A weight_of(int k, int64_t row) const {
    return weight ? weight[k * weight_stride_teacher + row * weight_stride_row] : host_weight[k];
  }
  // The first teacher from k on that is read.
  __device__ __forceinline__ int next_read(int k, int64_t row) const {
    while (k < teachers && weight_of(k, row) == 0) ++k;
    return k;
  }
};
constexpr int kStudentBit = kMaxLaunchTeachers, kLabelsBit = kMaxLaunchTeachers + 1;

// A thread's vector of N classes of a row.
template <class A, int N, int Threads>
struct Elements {
  const Params<A>& p;
  int64_t row, first;
  int thread;
  A s[N], e[N], c[N], kd[N], ce[N], grad[N], labels[N];

  __device__ __forceinline__ void load(const Network& network, int bit, A pad, A (&to)[N]) const {
    load_items<N, N>(any_row(network, row), first, p.classes, Threads, thread, p.in_vectors(bit), pad, to);
  }

  __device__ __forceinline__ void student_at(A inv_t) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      e[i] = odds_of(s[i], inv_t);
      c[i] = likelier(e[i]);
    }
  }

  __device__ __forceinline__ void teach(const A (&t)[N], A inv_t, A value, A factor) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const A p_e = odds_of(t[i], inv_t);
      const auto element = element_of(s[i], e[i], c[i], t[i], p_e, likelier(p_e), inv_t);
      kd[i] += value * element.kl;
      grad[i] += factor * element.push;
    }
  }

  // Teacher k's, at weight w, by its temperature's scales.
  __device__ __forceinline__ void teach(const A (&t)[N], int k, A w) {
    teach(t, p.inv_t[k], w * p.scale_loss[k], p.kd_weight * p.class_factor * w * p.scale_grad[k]);
  }

  __device__ __forceinline__ void label() {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const int64_t at = first + int64_t(thread) * N + i;
      const A pos_weight = p.pos_weight && at < p.classes ? p.pos_weight[at] : A(1);
      const auto part = label_loss(s[i], e[i], c[i], labels[i], pos_weight);
      ce[i] = part.ce;
      grad[i] += p.ce_weight * p.class_factor * part.push;
    }
  }
};

// Each teacher, the next one's vector in flight meanwhile.
template <class A, int N, int Threads>
__device__ __forceinline__ void teach_losses(Elements<A, N, Threads>& x) {
  const Params<A>& p = x.p;
  A now[N] = {}, next[N] = {}, at = p.inv_t[0];
  int k = p.next_read(0, x.row);
  if (k < p.teachers) x.load(p.teacher[k], k, A(0), now);
#pragma unroll 1
  while (k < p.teachers) {
    const int then = p.next_read(k + 1, x.row);
    if (then < p.teachers) x.load(p.teacher[then], then, A(0), next);
    if (p.inv_t[k] != at) x.student_at(at = p.inv_t[k]);
    x.teach(now, k, p.weight_of(k, x.row));
#pragma unroll
    for (int i = 0; i < N; ++i) now[i] = next[i];
    k = then;
  }
  if (p.cross_entropy && at != 1) x.student_at(A(1));
}

// A mixture of teachers' probabilities: those of both outcomes, relative to the weights so far, and the first one's logits.
template <class A, int N>
struct Mixture {
  A p[N], rest[N], first[N], total = 0;

  __device__ __forceinline__ void add(const A (&t)[N], A w, A inv_t) {
    const A share = w / (total + w);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const A e = odds_of(t[i], inv_t), c = likelier(e), one = probability(t[i], e, c), zero = probability(-t[i], e, c);
      if (total == 0) first[i] = t[i];
      p[i] = total == 0 ? one : p[i] + share * (one - p[i]);
      rest[i] = total == 0 ? zero : rest[i] + share * (zero - rest[i]);
    }
    total += w;
  }

  // Its logits; the first teacher's where all are that one.
  __device__ __forceinline__ void logits(A temperature, A inv_t, A (&t)[N]) const {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const A e = odds_of(first[i], inv_t), c = likelier(e);
      const bool same = p[i] == probability(first[i], e, c) && rest[i] == probability(-first[i], e, c);
      t[i] = same ? first[i] : logit_of(p[i], rest[i], temperature);
    }
  }
};

// The weighted sum of logits, of equal weights the running mean; infinite where one of them is.
template <class A, int N>
__device__ __forceinline__ void add_logits(A (&mean)[N], const A (&t)[N], A w, int number, bool uniform) {
  const A share = uniform ? A(1) / A(number) : w, old = uniform ? A(1) : A(0), one = uniform ? A(1) : w;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const A next = mean[i] + share * (t[i] - old * mean[i]);
    const A sum = magnitude(mean[i]) == A(kInf) ? mean[i] + share * t[i] : next;
    mean[i] = number == 1 ? one * t[i] : sum;
  }
}

// The divergence from one target that the teachers make, and the constant of a mixture whose weights do not sum to 1.
template <class A, int N, int Threads>
__device__ __forceinline__ void teach_mixed(Elements<A, N, Threads>& x) {
  const Params<A>& p = x.p;
  Mixture<A, N> mixture;
  A t[N], mean[N];
#pragma unroll
  for (int i = 0; i < N; ++i) mean[i] = mixture.p[i] = mixture.rest[i] = mixture.first[i] = 0;
  int number = 0;
#pragma unroll 1
  for (int k = p.next_read(0, x.row); k < p.teachers; k = p.next_read(k + 1, x.row)) {
    x.load(p.teacher[k], k, A(0), t);
    const A w = p.weight_of(k, x.row);
    ++number;
    if (p.probs)
      mixture.add(t, p.uniform ? A(1) : w, p.inv_t[0]);
    else
      add_logits(mean, t, w, number, p.uniform);
  }
  if (number > 0) {
    if (p.probs) mixture.logits(p.temperature, p.inv_t[0], mean);
    const A mass = p.probs && !p.uniform ? mixture.total : A(1), constant = mass * natural_log(mass) * p.scale_loss[0];
    x.teach(mean, 0, mass);
#pragma unroll
    for (int i = 0; i < N; ++i) x.kd[i] += mass == 1 ? A(0) : constant;
  }
  if (p.cross_entropy && p.inv_t[0] != 1) x.student_at(A(1));
}

// What a row's float16 gradients are multiplied by.
template <class A>
__device__ __forceinline__ A half_factor(const Params<A>& p, int64_t row, bool mixed) {
  A weights = 0;
  for (int k = 0; k < p.teachers; ++k) weights += magnitude(p.weight_of(k, row)) * p.scale_grad[k];
  if (mixed && !p.probs) weights = p.scale_grad[0];
  const A largest = p.pos_weight ? p.pos_weight[p.classes] : A(1);
  return A(half_scale(float((magnitude(p.kd_weight) * weights + magnitude(p.ce_weight) * largest) * p.class_factor)));
}

// One vector's losses to `sums`, KD and CE, and its gradient to memory.
template <class S, bool Mixed, class A, int N, int Threads>
__device__ __forceinline__ void run_vector(Elements<A, N, Threads>& x, A factor, bool ignored, Numbers<A, 2>& sums) {
  const Params<A>& p = x.p;
  const bool some = p.labels.data != nullptr;
#pragma unroll
  for (int i = 0; i < N; ++i) x.kd[i] = x.ce[i] = x.grad[i] = 0;
  if (!ignored) {
    x.load(p.student, kStudentBit, A(0), x.s);
    if (some) x.load(p.labels, kLabelsBit, A(-1), x.labels);
    x.student_at(p.inv_t[0]);
    if constexpr (Mixed)
      teach_mixed(x);
    else
      teach_losses(x);
    if (p.cross_entropy) x.label();
  }
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const bool inside = x.first + int64_t(x.thread) * N + i < p.classes;
    const A y = some && !ignored ? x.labels[i] : A(0);
    const bool counts = inside && !(y < 0), wrong = !(y == y);
    sums.v[0] += !counts ? A(0) : wrong ? y : x.kd[i];
    sums.v[1] += !counts ? A(0) : wrong ? y : x.ce[i];
    x.grad[i] = !counts ? A(0) : wrong ? y : x.grad[i] * factor;
  }
  if (p.need_grad)
    store_items<N, N>(static_cast<S*>(p.grad) + x.row * p.classes, x.first, p.classes, Threads, x.thread,
                      p.in_vectors(kStudentBit), x.grad);
}

template <class A>
__device__ __forceinline__ void store_losses(const Params<A>& p, int64_t row, const Numbers<A, 2>& sums) {
  const A kd = p.class_factor * sums.v[0], ce = p.class_factor * sums.v[1];
  A* to = p.row_loss + row;
  *to = (p.ce_weight != 0 ? p.ce_weight * ce : A(0)) + p.kd_weight * kd;
  if (!p.terms) return;
  to[p.rows] = kd;
  to[2 * p.rows] = ce;
}

// One block a multiprocessor at least: left to its own idea of how many, ptxas spills a few bytes.
template <class S, class A, class P, bool Mixed>
__global__ void __launch_bounds__(P::kBlock, 1) elements_kernel(const __grid_constant__ Params<A> p) {
  constexpr int kThreads = P::kThreads, kWarps = kThreads < 32 ? 1 : kThreads / 32;
  SIMT_SHARED(A, buffer, 2 * kWarps * 4);
  const int64_t row = int64_t(blockIdx.x) * P::kRows + threadIdx.x / kThreads;
  if (row >= p.rows) return;  // whole warps, or threads of rows of their own
  const bool ignored = p.target && p.target[row] == p.ignore_index;
  const A factor = is_half<S> ? half_factor(p, row, Mixed) : p.factor.value();
  Elements<A, P::kItems, kThreads> x{p, row, 0, int(threadIdx.x) % kThreads, {}, {}, {}, {}, {}, {}, {}};
  Numbers<A, 2> sums{{0, 0}};
#pragma unroll 1
  for (; x.first < p.classes; x.first += P::kTile) run_vector<S, Mixed>(x, factor, ignored, sums);
  if constexpr (kThreads >= 32) sums = RowThreads<A, kThreads>{x.thread, 0, buffer}.sum(sums);
  if (x.thread != 0) return;
  store_losses(p, row, sums);
  if (is_half<S> && p.need_grad) p.saved[row] = 1 / factor;
}

}  // namespace FASTKD_TARGET
}  // namespace fastkd::multi_label
