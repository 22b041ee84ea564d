// Rows that do not fit on chip. Forward: one pass with running sums per thread (two for combine="probs"), which saves the
// row's maxima and sums. Backward: a second pass, element by element, from these states.
#pragma once

#include "core/cuda/block.cuh"
#include "multi_teacher/stream_loads.cuh"

namespace fastkd::multi_teacher {
inline namespace FASTKD_TARGET {

// Saved per row: max_s, z at T = 1, of soft labels, smoothed, the sum; then for each teacher: max_t, z_t, z_s at its
// temperature. combine="logits" has one teacher, the mixture.
constexpr int kSavedTeacher = 3;
template <class A>
FASTKD_HD int saved_head(const Params<A>& p) {
  return p.soft.data ? 3 : 2;
}

// This thread's running sums of all teachers, in dynamic shared memory: registers cannot be indexed by a teacher.
template <class A>
struct TeacherStates {
  static constexpr int kNumbers = 4;  // max, z, a, z_s
  A* memory;
  int thread;

  static int64_t bytes(int teachers) { return int64_t(kNumbers) * teachers * kStreamThreads<A> * int64_t(sizeof(A)); }
  __device__ A& at(int k, int number) const { return memory[(k * kNumbers + number) * kStreamThreads<A> + thread]; }
  __device__ RunningTeacher<A> get(int k) const { return {at(k, 0), at(k, 1), at(k, 2)}; }
  __device__ void set(int k, const RunningTeacher<A>& s) const {
    at(k, 0) = s.max;
    at(k, 1) = s.z;
    at(k, 2) = s.a;
  }
};

// The student's running sums, relative to the base of its maximum so far; `mass` and `along` are of soft labels.
template <class A>
struct RunningStudent {
  A max = -A(kInf), z = 0, z_one = 0, sum = 0, count = 0, mass = 0, along = 0;

  // The growth of the base.
  __device__ A rebase(A new_max, A inv_t) {
    const A growth = base_of(new_max) - base_of(max);
    const A down = growth > 0 ? -growth : A(0);  // from the base 0 of a masked part the sums are 0
    z = z == 0 ? A(0) : rounded_product(z, exp_negative(down * inv_t));
    z_one = z_one == 0 ? A(0) : z_one * exp_negative(down);
    sum -= count == 0 ? A(0) : count * growth;
    along -= mass == 0 ? A(0) : mass * growth;
    max = new_max;
    return growth;
  }
};

// One tile: x becomes s relative to the student's base; returns the growth of that base.
template <int Width, class A>
__device__ __forceinline__ A push_student(const Params<A>& p, int64_t row, int64_t first, RunningStudent<A>& student,
                                          A (&x)[kStreamItems]) {
  const A growth = student.rebase(max_item(student.max, x), p.inv_t[0]);
  const A base = base_of(student.max);
#pragma unroll
  for (int i = 0; i < kStreamItems; ++i) {
    const int64_t c = item_class<Width>(first, i, kStreamThreads<A>, threadIdx.x);
    x[i] -= base;
    student.z += exp_negative(x[i] * p.inv_t[0]);
    if (p.cross_entropy) student.z_one += exp_negative(x[i]);
    if (p.smoothing > 0 && c < p.classes) {
      student.sum += x[i];
      student.count += 1;
    }
  }
  if (!p.cross_entropy || !p.soft.data) return growth;
  A y[kStreamItems];
  load_soft<Width>(p, row, first, y);
#pragma unroll
  for (int i = 0; i < kStreamItems; ++i) {
    student.mass += y[i];
    student.along += soft_part(y[i], x[i]);
  }
  return growth;
}

template <int Width, class A>
__device__ __forceinline__ void push_teacher(const Params<A>& p, int k, unsigned reads, int64_t row, int64_t first, A growth,
                                             const A (&x_s)[kStreamItems], const TeacherStates<A>& states) {
  A t[kStreamItems];
  load_teacher<Width>(p, k, reads, row, first, t);
  const A inv_t = p.inv_t[k];
  RunningTeacher<A> state = states.get(k);
  state.rebase(max_item(state.max, t), growth, inv_t);
  const A base = base_of(state.max);
#pragma unroll
  for (int i = 0; i < kStreamItems; ++i) state.push(t[i] - base, x_s[i], inv_t);
  states.set(k, state);
  if (!p.several_temperatures) return;
  A z = states.at(k, 3);
  z = z == 0 ? A(0) : rounded_product(z, exp_negative(growth > 0 ? -growth * inv_t : A(0)));
#pragma unroll
  for (int i = 0; i < kStreamItems; ++i) z += exp_negative(x_s[i] * inv_t);
  states.at(k, 3) = z;
}

// The row's {max, z, a} of a teacher from those of all threads, whose student base grew by `growth` to the common one.
// To the common maximum first and then sums, like the student's: so equal networks have equal sums.
template <class A, class Threads>
__device__ __forceinline__ RunningTeacher<A> gather_teacher(RunningTeacher<A> state, A growth, A inv_t, Threads& threads) {
  state.rebase(threads.max(state.max), growth, inv_t);
  const Numbers<A, 2> sums = threads.sum(Numbers<A, 2>{{state.z, state.a}});
  return {state.max, sums.v[0], sums.v[1]};
}

// Adds teacher k's part of a mixture of probabilities, from its logits.
template <class A>
__device__ __forceinline__ void mix_probabilities(const Params<A>& p, int k, int64_t row, A max, A z,
                                                  const A (&t)[kStreamItems], A (&mixture)[kStreamItems]) {
  const A factor = p.weight_of(k, row) / z, base = base_of(max);
#pragma unroll
  for (int i = 0; i < kStreamItems; ++i) mixture[i] += factor * exp_negative((t[i] - base) * p.inv_t[0]);
}

// combine="probs": the divergence from the mixture, in the second read. `final` holds max_t and z_t of each teacher.
template <class S, class A, class Threads>
__device__ __forceinline__ A stream_mixture(const Params<A>& p, int64_t row, unsigned reads, A max_student, A z_student,
                                            const A* final, Threads& threads) {
  constexpr int kWidth = kVector<S, S>;
  const A base = base_of(max_student), inv_z = 1 / z_student, inv_t = p.inv_t[0];
  const A total = p.total_of(row), inv_total = 1 / total;
  Numbers<A, 1> gap{{0}};
  for (int64_t first = 0; first < p.classes; first += kStreamTile<A>) {
    A s[kStreamItems], t[kStreamItems], mixture[kStreamItems];
    load_student<S>(p, row, first, s);
#pragma unroll
    for (int i = 0; i < kStreamItems; ++i) mixture[i] = 0;
    for (int k = next_teacher(reads, -1); k != kNoTeacher; k = next_teacher(reads, k)) {
      load_network<kWidth>(p, k + 1, row, first, t);
      mix_probabilities(p, k, row, final[2 * k], final[2 * k + 1], t, mixture);
    }
#pragma unroll
    for (int i = 0; i < kStreamItems; ++i) {
      const A x = (s[i] - base) * inv_t;
      gap.v[0] += mixture_gap(mixture[i] * inv_total, x, exp_negative(x), z_student, inv_z);
    }
  }
  return p.scale[0].loss * mixture_divergence(threads.sum(gap).v[0], total);
}

// The states of a row's teachers, all threads' together, to `saved` and `final`; the sum of their weighted divergences.
template <class A, class Threads>
__device__ __forceinline__ A gather_teachers(const Params<A>& p, int64_t row, unsigned teachers, A growth, A z_first,
                                             const TeacherStates<A>& states, A* saved, A* final, Threads& threads) {
  A loss = 0;
  for (int k = next_teacher(teachers, -1); k != kNoTeacher; k = next_teacher(teachers, k)) {
    const RunningTeacher<A> state = gather_teacher(states.get(k), growth, p.inv_t[k], threads);
    A z_student = z_first;
    if (p.several_temperatures) {
      const A z = states.at(k, 3), factor = exp_negative(growth > 0 ? -growth * p.inv_t[k] : A(0));
      z_student = threads.sum(Numbers<A, 1>{{z == 0 ? A(0) : rounded_product(z, factor)}}).v[0];
    }
    const A weight = p.combine == Combine::logits ? A(1) : p.weight_of(k, row);
    loss += weight * p.scale[k].loss * divergence(state.a, state.z, z_student);
    if (threadIdx.x != 0) continue;
    final[2 * k] = state.max;
    final[2 * k + 1] = state.z;
    if (!p.need_grad) continue;
    saved[kSavedTeacher * k] = state.max;
    saved[kSavedTeacher * k + 1] = state.z;
    saved[kSavedTeacher * k + 2] = z_student;
  }
  return loss;
}

// The cross-entropy, from the row's sums {z, z_one, sum} and {mass, along}.
template <class S, class A>
__device__ __forceinline__ A stream_cross_entropy(const Params<A>& p, int64_t row, A max_student, const Numbers<A, 3>& sums,
                                                  const Numbers<A, 2>& labels) {
  if (p.soft.data) return cross_entropy_of_soft(sums.v[1], labels.v[0], labels.v[1], sums.v[2], p.smoothing, p.classes);
  A label[1] = {A(load_as(row_in_memory<S>(p.network[0], row)[p.target[row]]))};
  cap_items(p, 0, label);
  const A x_label = label[0] - base_of(max_student);
  return cross_entropy(sums.v[1], x_label, sums.v[2], p.smoothing, p.classes);
}

template <class S, class A>
__global__ void __launch_bounds__(kStreamThreads<A>, sizeof(A) == 8 ? 3 : 2)
    stream_forward_kernel(const __grid_constant__ Params<A> p) {
  using Threads = RowThreads<A, kStreamThreads<A>>;
  constexpr int kWidth = kVector<S, S>;
  SIMT_DYNAMIC_SHARED(A, memory);
  SIMT_SHARED(A, buffer, 2 * Threads::kWarps * Threads::kMost);
  SIMT_SHARED(A, final, 2 * kMaxLaunchTeachers);
  Threads threads{int(threadIdx.x), 0, buffer};
  const int64_t row = blockIdx.x;
  const Label kind = label_kind(p.target, row, p.ignore_index, p.classes);
  A* saved = p.saved + row * p.saved_columns;
  if (p.need_grad && threadIdx.x < unsigned(p.saved_columns)) saved[threadIdx.x] = 0;  // also what the backward reads not
  if (kind == Label::ignored || kind == Label::outside) {
    const A nothing = kind == Label::ignored ? A(0) : A(__builtin_nanf(""));
    if (threadIdx.x == 0) p.store_losses(row, nothing, nothing);
    return;
  }
  const TeacherStates<A> states{memory, int(threadIdx.x)};
  const unsigned reads = p.reads_of(row), teachers = p.combine == Combine::logits ? unsigned(reads != 0) : reads;
  for (int k = next_teacher(teachers, -1); k != kNoTeacher; k = next_teacher(teachers, k)) {
    states.set(k, {-A(kInf), A(0), A(0)});
    states.at(k, 3) = 0;
  }
  RunningStudent<A> student;
  for (int64_t first = 0; first < p.classes; first += kStreamTile<A>) {
    A x[kStreamItems];
    load_student<S>(p, row, first, x);
    const A growth = push_student<kWidth>(p, row, first, student, x);
    for (int k = next_teacher(teachers, -1); k != kNoTeacher; k = next_teacher(teachers, k))
      push_teacher<kWidth>(p, k, reads, row, first, growth, x, states);
  }

  const A growth = student.rebase(threads.max(student.max), p.inv_t[0]);
  const Numbers<A, 3> sums = threads.sum(Numbers<A, 3>{{student.z, student.z_one, student.sum}});
  Numbers<A, 2> labels{{1, 0}};
  if (p.soft.data) labels = threads.sum(Numbers<A, 2>{{student.mass, student.along}});
  const int head = saved_head(p);
  A kd = gather_teachers(p, row, teachers, growth, sums.v[0], states, saved + head, final, threads);
  if (p.combine == Combine::probs && reads != 0) {
    __syncthreads();  // final
    kd = stream_mixture<S>(p, row, reads, student.max, sums.v[0], final, threads);
  }
  if (threadIdx.x != 0) return;
  if (p.need_grad) {
    saved[0] = student.max;
    saved[1] = sums.v[1];
    if (head > 2) saved[2] = smoothed_mass(labels.v[0], p.smoothing);
  }
  p.store_losses(row, kd, p.cross_entropy ? stream_cross_entropy<S>(p, row, student.max, sums, labels) : A(0));
}

// Adds what the labels give: x is s relative to its maximum.
template <int Width, class A>
__device__ __forceinline__ void add_label_gradient(const Params<A>& p, int64_t row, int64_t first, const A* saved,
                                                   const A (&x)[kStreamItems], A (&grad)[kStreamItems]) {
  const bool soft = p.soft.data != nullptr;
  const A factor = p.ce_weight * (soft ? saved[2] : A(1)) / saved[1], uniform = p.ce_weight * p.smoothing / A(p.classes);
  const A sharp = p.ce_weight * (1 - p.smoothing);
  const int64_t label = soft ? -1 : p.target[row];
  A y[kStreamItems];
  if (soft) load_soft<Width>(p, row, first, y);
#pragma unroll
  for (int i = 0; i < kStreamItems; ++i) {
    const bool hit = item_class<Width>(first, i, kStreamThreads<A>, threadIdx.x) == label;
    grad[i] += factor * exp_negative(x[i]) - uniform - sharp * (soft ? y[i] : hit ? A(1) : A(0));
  }
}

// Adds what the teachers give: x is s relative to its maximum, grad 0.
template <int Width, class A>
__device__ __forceinline__ void add_teachers_gradient(const Params<A>& p, int64_t row, int64_t first, const A* saved,
                                                      const A (&x)[kStreamItems], A (&grad)[kStreamItems]) {
  const unsigned reads = p.reads_of(row), teachers = p.combine == Combine::logits ? unsigned(reads != 0) : reads;
  A z_student = 1, t[kStreamItems];
  for (int k = next_teacher(teachers, -1); k != kNoTeacher; k = next_teacher(teachers, k)) {
    const A *state = saved + saved_head(p) + kSavedTeacher * k, z_t = state[1], inv_t = p.inv_t[k];
    z_student = state[2];
    load_teacher<Width>(p, k, reads, row, first, t);
    if (p.combine == Combine::probs) {
      mix_probabilities(p, k, row, state[0], z_t, t, grad);
      continue;
    }
    const A weight = p.combine == Combine::logits ? A(1) : p.weight_of(k, row), base = base_of(state[0]);
    const A factor = weight * p.scale[k].grad / z_student, ratio = z_student / z_t;
#pragma unroll
    for (int i = 0; i < kStreamItems; ++i)
      grad[i] += factor * (exp_negative(x[i] * inv_t) - ratio * exp_negative((t[i] - base) * inv_t));
  }
  if (p.combine != Combine::probs || reads == 0) return;
  const A factor = p.total_of(row) / z_student;
#pragma unroll
  for (int i = 0; i < kStreamItems; ++i) grad[i] = p.scale[0].grad * (factor * exp_negative(x[i] * p.inv_t[0]) - grad[i]);
}

// A tile's gradient, times what comes from above.
template <class S, class A>
__device__ __forceinline__ void store_gradient(const Params<A>& p, int64_t row, int64_t first, A upstream,
                                               A (&grad)[kStreamItems]) {
#pragma unroll
  for (int i = 0; i < kStreamItems; ++i) grad[i] *= upstream;
  store_items<kStreamItems, kVector<S, S>>(p.template grad_row<S>(row), first, p.classes, kStreamThreads<A>, int(threadIdx.x),
                                           p.grad_vectors, grad);
}

// The gradient of one tile of one row; blocks are rows times tiles.
template <class S, class A>
__global__ void __launch_bounds__(kStreamThreads<A>, sizeof(A) == 8 ? 4 : 3)
    stream_backward_kernel(const __grid_constant__ Params<A> p, const A* grad_loss, bool per_row, const A* aux, int64_t tiles) {
  constexpr int kWidth = kVector<S, S>;
  const int64_t row = blockIdx.x / tiles, first = int64_t(blockIdx.x % tiles) * kStreamTile<A>;
  const Label kind = label_kind(p.target, row, p.ignore_index, p.classes);
  A grad[kStreamItems];
#pragma unroll
  for (int i = 0; i < kStreamItems; ++i) grad[i] = kind == Label::outside ? A(__builtin_nanf("")) : A(0);
  if (kind == Label::none || kind == Label::class_index) {
    const A* saved = p.saved + row * p.saved_columns;
    const A base = base_of(saved[0]);
    A x[kStreamItems];
    load_student<S>(p, row, first, x);
#pragma unroll
    for (int i = 0; i < kStreamItems; ++i) x[i] -= base;
    add_teachers_gradient<kWidth>(p, row, first, saved, x, grad);
    if (p.ce_weight != 0) add_label_gradient<kWidth>(p, row, first, saved, x, grad);
    uncap_gradient<S>(p, row, first, grad);
  }
  store_gradient<S>(p, row, first, grad_loss[per_row ? row : 0] * aux[0], grad);
}

}  // namespace FASTKD_TARGET
}  // namespace fastkd::multi_teacher
