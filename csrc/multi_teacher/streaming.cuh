// Rows that do not fit on chip. Forward: one pass with running sums per thread (two for combine="probs"), which saves the
// row's maxima and sums. Backward: a second pass, element by element, from these states.
#pragma once

#include "core/block.cuh"
#include "multi_teacher/launch.cuh"

namespace fastkd::multi_teacher {
inline namespace FASTKD_TARGET {

constexpr int kStreamThreads = 256, kStreamItems = 8;
constexpr int64_t kStreamTile = int64_t(kStreamThreads) * kStreamItems;

// Saved per row: max_s, z at T = 1, then for each teacher: max_t, z_t, z_s at its temperature. combine="logits" has one
// teacher, the weighted sum.
constexpr int kSavedHead = 2, kSavedTeacher = 3;

// This thread's running sums of all teachers, in dynamic shared memory: registers cannot be indexed by a teacher.
template <class A>
struct TeacherStates {
  static constexpr int kNumbers = 4;  // max, z, a, z_s
  A* memory;
  int thread;

  static int64_t bytes(int teachers) { return int64_t(kNumbers) * teachers * kStreamThreads * int64_t(sizeof(A)); }
  __device__ A& at(int k, int number) const { return memory[(k * kNumbers + number) * kStreamThreads + thread]; }
  __device__ RunningTeacher<A> get(int k) const { return {at(k, 0), at(k, 1), at(k, 2)}; }
  __device__ void set(int k, const RunningTeacher<A>& s) const {
    at(k, 0) = s.max;
    at(k, 1) = s.z;
    at(k, 2) = s.a;
  }
};

// The student's running sums, relative to the base of its maximum so far.
template <class A>
struct RunningStudent {
  A max = -A(kInf), z = 0, z_one = 0, sum = 0, count = 0;

  // The growth of the base.
  __device__ A rebase(A new_max, A inv_t) {
    const A growth = base_of(new_max) - base_of(max);
    const A down = growth > 0 ? -growth : A(0);  // from the base 0 of a masked part the sums are 0
    z = z == 0 ? A(0) : z * exp_negative(down * inv_t);
    z_one = z_one == 0 ? A(0) : z_one * exp_negative(down);
    sum -= count == 0 ? A(0) : count * growth;
    max = new_max;
    return growth;
  }
};

// The weighted sum of the teachers' logits in this tile; -inf where a teacher that counts is masked and past the end.
template <class S, class T, class A>
__device__ __forceinline__ void load_mean_logits(const Params<A>& p, int64_t row, int64_t first, A (&u)[kStreamItems]) {
  A t[kStreamItems];
#pragma unroll
  for (int i = 0; i < kStreamItems; ++i) u[i] = 0;
  for (int k = 0; k < p.teachers; ++k) {
    const A weight = p.weight_of(k, row);
    load_items<kStreamItems, kVector<S, T>>(p.template teacher_row<T>(k, row), first, p.classes, kStreamThreads,
                                            int(threadIdx.x), p.teacher_in_vectors(k), -A(kInf), t);
#pragma unroll
    for (int i = 0; i < kStreamItems; ++i) u[i] += t[i] == -A(kInf) ? (weight == 0 ? A(0) : -A(kInf)) : weight * t[i];
  }
#pragma unroll
  for (int i = 0; i < kStreamItems; ++i) {
    if (item_class<kVector<S, T>>(first, i, kStreamThreads, threadIdx.x) >= p.classes) u[i] = -A(kInf);
  }
}

template <class S, class T, class A>
__device__ __forceinline__ void load_teacher(const Params<A>& p, int k, int64_t row, int64_t first, A (&t)[kStreamItems]) {
  if (p.combine == Combine::logits)
    load_mean_logits<S, T>(p, row, first, t);
  else
    load_items<kStreamItems, kVector<S, T>>(p.template teacher_row<T>(k, row), first, p.classes, kStreamThreads,
                                            int(threadIdx.x), p.teacher_in_vectors(k), -A(kInf), t);
}

template <class S, class T, class A>
__device__ __forceinline__ void load_student(const Params<A>& p, int64_t row, int64_t first, A (&s)[kStreamItems]) {
  load_items<kStreamItems, kVector<S, T>>(p.template student_row<S>(row), first, p.classes, kStreamThreads,
                                          int(threadIdx.x), p.student_vectors, -A(kInf), s);
}

// One tile: x becomes s relative to the student's base; returns the growth of that base.
template <int Width, class A>
__device__ __forceinline__ A push_student(const Params<A>& p, int64_t first, RunningStudent<A>& student, A (&x)[kStreamItems]) {
  const A growth = student.rebase(max_item(student.max, x), p.inv_t[0]);
  const A base = base_of(student.max);
#pragma unroll
  for (int i = 0; i < kStreamItems; ++i) {
    const int64_t c = item_class<Width>(first, i, kStreamThreads, threadIdx.x);
    x[i] -= base;
    student.z += exp_negative(x[i] * p.inv_t[0]);
    if (p.ce_weight != 0) student.z_one += exp_negative(x[i]);
    if (p.smoothing > 0 && c < p.classes) {
      student.sum += x[i];
      student.count += 1;
    }
  }
  return growth;
}

template <class S, class T, class A>
__device__ __forceinline__ void push_teacher(const Params<A>& p, int k, int64_t row, int64_t first, A growth,
                                             const A (&x_s)[kStreamItems], const TeacherStates<A>& states) {
  A t[kStreamItems];
  load_teacher<S, T>(p, k, row, first, t);
  const A inv_t = p.inv_t[k];
  RunningTeacher<A> state = states.get(k);
  state.rebase(max_item(state.max, t), growth, inv_t);
  const A base = base_of(state.max);
#pragma unroll
  for (int i = 0; i < kStreamItems; ++i) state.push((t[i] - base) * inv_t, x_s[i] * inv_t);
  states.set(k, state);
  if (!p.several_temperatures) return;
  A z = states.at(k, 3);
  z = z == 0 ? A(0) : z * exp_negative(growth > 0 ? -growth * inv_t : A(0));
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

// sum p (log p - log q) over the row for combine="probs": the second read. `final` holds max_t and z_t of each teacher.
template <class S, class T, class A, class Threads>
__device__ __forceinline__ A stream_mixture(const Params<A>& p, int64_t row, A max_student, A z_student, const A* final,
                                            Threads& threads) {
  const A base = base_of(max_student), log_z = natural_log(z_student), inv_t = p.inv_t[0];
  Numbers<A, 1> loss{{0}};
  for (int64_t first = 0; first < p.classes; first += kStreamTile) {
    A s[kStreamItems], t[kStreamItems], mixture[kStreamItems];
    load_student<S, T>(p, row, first, s);
#pragma unroll
    for (int i = 0; i < kStreamItems; ++i) mixture[i] = 0;
    for (int k = 0; k < p.teachers; ++k) {
      load_teacher<S, T>(p, k, row, first, t);
      const A factor = p.weight_of(k, row) / final[2 * k + 1], base_t = base_of(final[2 * k]);
#pragma unroll
      for (int i = 0; i < kStreamItems; ++i) mixture[i] += factor * exp_negative((t[i] - base_t) * inv_t);
    }
#pragma unroll
    for (int i = 0; i < kStreamItems; ++i) {
      loss.v[0] += mixture_gap(mixture[i], (s[i] - base) * inv_t - log_z);
    }
  }
  return p.scale[0].loss * threads.sum(loss).v[0];
}

template <class S, class T, class A>
__global__ void __launch_bounds__(kStreamThreads, 2) stream_forward_kernel(const __grid_constant__ Params<A> p) {
  using Threads = RowThreads<A, kStreamThreads>;
  SIMT_DYNAMIC_SHARED(A, memory);
  SIMT_SHARED(A, buffer, 2 * Threads::kWarps * Threads::kMost);
  SIMT_SHARED(A, final, 2 * kMaxLaunchTeachers);
  Threads threads{int(threadIdx.x), 0, buffer};
  const int64_t row = blockIdx.x;
  const Label kind = label_kind(p.target, row, p.ignore_index, p.classes);
  const int columns = kSavedTeacher * p.teachers + kSavedHead;
  A* saved = p.saved + row * columns;
  if (kind == Label::ignored || kind == Label::outside) {
    if (threadIdx.x == 0) p.row_loss[row] = kind == Label::ignored ? A(0) : A(__builtin_nanf(""));
    if (p.need_grad && threadIdx.x < unsigned(columns)) saved[threadIdx.x] = 0;  // not read by the backward
    return;
  }
  const TeacherStates<A> states{memory, int(threadIdx.x)};
  const int teachers = p.combine == Combine::logits ? 1 : p.teachers;
  for (int k = 0; k < teachers; ++k) {
    states.set(k, {-A(kInf), A(0), A(0)});
    states.at(k, 3) = 0;
  }
  RunningStudent<A> student;
  for (int64_t first = 0; first < p.classes; first += kStreamTile) {
    A x[kStreamItems];
    load_student<S, T>(p, row, first, x);
    const A growth = push_student<kVector<S, T>>(p, first, student, x);
    for (int k = 0; k < teachers; ++k) push_teacher<S, T>(p, k, row, first, growth, x, states);
  }

  const A growth = student.rebase(threads.max(student.max), p.inv_t[0]);
  const Numbers<A, 3> sums = threads.sum(Numbers<A, 3>{{student.z, student.z_one, student.sum}});
  const A z_first = sums.v[0], z_one = sums.v[1];
  A loss = 0;
  for (int k = 0; k < teachers; ++k) {
    const RunningTeacher<A> state = gather_teacher(states.get(k), growth, p.inv_t[k], threads);
    A z_student = z_first;
    if (p.several_temperatures) {
      const A z = states.at(k, 3), factor = exp_negative(growth > 0 ? -growth * p.inv_t[k] : A(0));
      z_student = threads.sum(Numbers<A, 1>{{z == 0 ? A(0) : z * factor}}).v[0];
    }
    const A weight = p.combine == Combine::logits ? A(1) : p.weight_of(k, row);
    loss += weighted(weight, p.scale[k].loss, divergence(state.a, state.z, z_student));
    if (threadIdx.x == 0) {
      final[2 * k] = state.max;
      final[2 * k + 1] = state.z;
      if (p.need_grad) {
        saved[kSavedHead + kSavedTeacher * k] = state.max;
        saved[kSavedHead + kSavedTeacher * k + 1] = state.z;
        saved[kSavedHead + kSavedTeacher * k + 2] = z_student;
      }
    }
  }
  if (p.combine == Combine::probs) {
    __syncthreads();  // final
    loss = stream_mixture<S, T>(p, row, student.max, z_first, final, threads);
  }
  if (threadIdx.x != 0) return;
  if (p.ce_weight != 0) {
    const A x_label = A(load_as(p.template student_row<S>(row)[p.target[row]])) - base_of(student.max);
    loss += p.ce_weight * cross_entropy(z_one, x_label, sums.v[2], p.smoothing, p.classes);
  }
  if (p.need_grad) {
    saved[0] = student.max;
    saved[1] = z_one;
    for (int c = kSavedHead + kSavedTeacher * teachers; c < columns; ++c) saved[c] = 0;  // combine="logits" has one state
  }
  p.row_loss[row] = loss;
}

// The gradient of one tile of one row; blocks are rows times tiles.
template <class S, class T, class A>
__global__ void __launch_bounds__(kStreamThreads)
    stream_backward_kernel(const __grid_constant__ Params<A> p, const A* grad_loss, bool per_row, const A* aux, int64_t tiles) {
  constexpr int kWidth = kVector<S, T>;
  const int64_t row = blockIdx.x / tiles, first = int64_t(blockIdx.x % tiles) * kStreamTile;
  const Label kind = label_kind(p.target, row, p.ignore_index, p.classes);
  A grad[kStreamItems];
#pragma unroll
  for (int i = 0; i < kStreamItems; ++i) grad[i] = kind == Label::outside ? A(__builtin_nanf("")) : A(0);
  if (kind == Label::none || kind == Label::class_index) {
    const A* saved = p.saved + row * (kSavedTeacher * p.teachers + kSavedHead);
    const int teachers = p.combine == Combine::logits ? 1 : p.teachers;
    A x[kStreamItems], t[kStreamItems];
    load_student<S, T>(p, row, first, x);
    const A base = base_of(saved[0]);
    A total = 0;
#pragma unroll
    for (int i = 0; i < kStreamItems; ++i) x[i] -= base;
    for (int k = 0; k < teachers; ++k) {
      const A* state = saved + kSavedHead + kSavedTeacher * k;
      const A base_t = base_of(state[0]), z_t = state[1], z_s = state[2], inv_t = p.inv_t[k];
      const A weight = p.combine == Combine::logits ? A(1) : p.weight_of(k, row);
      total += weight;
      load_teacher<S, T>(p, k, row, first, t);
      if (p.combine == Combine::probs) {
        const A factor = weight / z_t;
#pragma unroll
        for (int i = 0; i < kStreamItems; ++i) grad[i] += factor * exp_negative((t[i] - base_t) * inv_t);
      } else {
        const A factor = weight * p.scale[k].grad / z_s, ratio = z_s / z_t;
#pragma unroll
        for (int i = 0; i < kStreamItems; ++i)
          grad[i] += factor * (exp_negative(x[i] * inv_t) - ratio * exp_negative((t[i] - base_t) * inv_t));
      }
    }
    if (p.combine == Combine::probs) {
      const A z_s = saved[kSavedHead + 2], factor = p.scale[0].grad * total / z_s, ratio = z_s / total;
#pragma unroll
      for (int i = 0; i < kStreamItems; ++i) grad[i] = factor * (exp_negative(x[i] * p.inv_t[0]) - ratio * grad[i]);
    }
    if (p.ce_weight != 0) {
      const A factor = p.ce_weight / saved[1], uniform = p.ce_weight * p.smoothing / A(p.classes);
      const int64_t label = p.target[row];
#pragma unroll
      for (int i = 0; i < kStreamItems; ++i) {
        const int64_t c = item_class<kWidth>(first, i, kStreamThreads, threadIdx.x);
        grad[i] += factor * exp_negative(x[i]) - uniform - (c == label ? p.ce_weight * (1 - p.smoothing) : A(0));
      }
    }
  }
  const A upstream = grad_loss[per_row ? row : 0] * aux[0];
#pragma unroll
  for (int i = 0; i < kStreamItems; ++i) grad[i] *= upstream;
  store_items<kStreamItems, kWidth>(p.template grad_row<S>(row), first, p.classes, kStreamThreads, int(threadIdx.x),
                                    p.grad_vectors, grad);
}

}  // namespace FASTKD_TARGET
}  // namespace fastkd::multi_teacher
