// Backward of long rows in whole vectors (stream_vectors.cuh): element by element from the states of the forward pass.
#pragma once

#include "multi_teacher/stream_vectors.cuh"

namespace fastkd::multi_teacher {
inline namespace FASTKD_TARGET {

// What a row's elements need: of teacher k, gradient += factor (e_s - ratio e_t); of the labels, factor exp(s - max) - sharp.
template <int K>
struct GradientOf {
  float base, base_t[K], factor[K], ratio[K], label_factor, sharp;
  int64_t label;
};

template <int K>
__device__ __forceinline__ GradientOf<K> gradient_of(const Params<float>& p, int64_t row, const RowOf<K>& at, float upstream) {
  const float* saved = p.saved + row * p.saved_columns;
  GradientOf<K> g;
  g.base = base_of(saved[0]);
#pragma unroll
  for (int k = 0; k < K; ++k) {
    const bool counts = at.slot[k] != kNoTeacher;
    const int slot = counts ? at.slot[k] : 0;
    const float *state = saved + 2 + 3 * slot, z_student = state[2];
    g.base_t[k] = counts ? base_of(state[0]) : g.base;
    g.factor[k] = counts ? p.weight_of(slot, row) * p.scale[slot].grad / z_student * upstream : 0.f;
    g.ratio[k] = counts ? z_student / state[1] : 0.f;
  }
  const bool labelled = p.ce_weight != 0;
  g.label_factor = labelled ? p.ce_weight / saved[1] * upstream : 0.f;
  g.sharp = labelled ? p.ce_weight * upstream : 0.f;
  g.label = labelled ? p.target[row] : -1;
  return g;
}

// The student's exponentials, and what the labels give to all classes alike.
template <class S, AtOne One>
__device__ __forceinline__ void student_gradient(const uint4& student, float base, float label_factor, const Exponents& c,
                                                 float (&e_s)[kRawItems<S>], float (&grad)[kRawItems<S>]) {
  unpack<S>(student, e_s);
#pragma unroll
  for (int i = 0; i < kRawItems<S>; ++i) {
    const float x = e_s[i] - base;
    e_s[i] = exp2_approximate(x * c.scale);
    grad[i] = label_factor * at_one<One>(c, x, e_s[i]);
  }
}

template <class S>
__device__ __forceinline__ void teacher_gradient(const uint4& teacher, float base, float factor, float ratio,
                                                 const Exponents& c, const float (&e_s)[kRawItems<S>],
                                                 float (&grad)[kRawItems<S>]) {
  float t[kRawItems<S>];
  unpack<S>(teacher, t);
#pragma unroll
  for (int i = 0; i < kRawItems<S>; ++i) grad[i] += factor * (e_s[i] - ratio * exp2_approximate((t[i] - base) * c.scale));
}

template <int N>
__device__ __forceinline__ void label_gradient(int64_t label, unsigned vector, float sharp, float (&grad)[N]) {
  const int64_t at = label - int64_t(vector) * N;
  if (at < 0 || at >= N) return;
#pragma unroll
  for (int i = 0; i < N; ++i) grad[i] -= i == int(at) ? sharp : 0.f;
}

template <class S, AtOne One, int K>
__device__ __forceinline__ uint4 gradient_vector(const GradientOf<K>& g, const Exponents& c, unsigned vector,
                                                 const Vectors<K>& now) {
  float e_s[kRawItems<S>], grad[kRawItems<S>];
  student_gradient<S, One>(now.student, g.base, g.label_factor, c, e_s, grad);
#pragma unroll
  for (int k = 0; k < K; ++k) teacher_gradient<S>(now.teacher[k], g.base_t[k], g.factor[k], g.ratio[k], c, e_s, grad);
  label_gradient(g.label, vector, g.sharp, grad);
  return pack<S>(grad);
}

// A row without a loss: 0, or NaN for a label out of range. Whether it was one.
template <class S>
__device__ __forceinline__ bool left_out_gradient(const Params<float>& p, int64_t row, const Range& range) {
  const Label kind = label_kind(p.target, row, p.ignore_index, p.classes);
  if (kind != Label::ignored && kind != Label::outside) return false;
  const float nothing = kind == Label::ignored ? 0.f : __builtin_nanf("");
  fill_vectors<kVectorThreads>(p.template grad_row<S>(row), range.begin, range.end, nothing);
  return true;
}

// The gradient of one of `parts` parts of a row; blocks are rows times parts.
template <class S, int K, AtOne One>
__global__ void __launch_bounds__(kVectorThreads, K == 4 ? 3 : 4)
    stream_gradient_kernel(const __grid_constant__ Params<float> p, const float* grad_loss, bool per_row, const float* aux,
                           unsigned parts) {
  const Range range = part_of_row(unsigned(p.classes / kRawItems<S>), blockIdx.x % parts, parts);
  const int64_t row = blockIdx.x / parts;
  if (left_out_gradient<S>(p, row, range)) return;
  S* const grad = p.template grad_row<S>(row);
  const Exponents c = exponents_of(p);
  const RowOf<K> at = row_of_vectors<K>(p, row);
  const GradientOf<K> of = gradient_of(p, row, at, grad_loss[per_row ? row : 0] * aux[0]);
  over_vectors(at, range.begin, range.end, [&](unsigned vector, const Vectors<K>& now) {
    store_raw(grad, vector, gradient_vector<S, One>(of, c, vector, now));
  });
}

// A teacher of many, in shared memory.
struct TeacherOfRow {
  const void* row;
  GradientOf<1> of;
};

// The same of more than four teachers: one after another, the next one's vector in flight.
template <class S, AtOne One>
__global__ void __launch_bounds__(kVectorThreads, 4)
    stream_gradients_kernel(const __grid_constant__ Params<float> p, const float* grad_loss, bool per_row, const float* aux,
                            unsigned parts) {
  SIMT_SHARED(TeacherOfRow, teacher, kMaxLaunchTeachers);
  const Range range = part_of_row(unsigned(p.classes / kRawItems<S>), blockIdx.x % parts, parts);
  const int64_t row = blockIdx.x / parts;
  if (left_out_gradient<S>(p, row, range)) return;
  const Exponents c = exponents_of(p);
  const int count = max(1, __popc(p.reads_of(row)));  // the student in the place of none
  const float upstream = grad_loss[per_row ? row : 0] * aux[0];
  if (int(threadIdx.x) < count) {
    const RowOf<1> at = row_of_vectors<1>(p, row, threadIdx.x);
    teacher[threadIdx.x].row = at.teacher[0];
    teacher[threadIdx.x].of = gradient_of(p, row, at, upstream);
  }
  __syncthreads();
  const void* const student = any_row(p.network[0], row).data;
  const GradientOf<1> first = teacher[0].of;
#pragma unroll 1
  for (unsigned vector = range.begin + threadIdx.x; vector < range.end; vector += kVectorThreads) {
    float e_s[kRawItems<S>], grad[kRawItems<S>];
    uint4 next = load_raw(teacher[0].row, vector);
    student_gradient<S, One>(load_raw(student, vector), first.base, first.label_factor, c, e_s, grad);
#pragma unroll 1
    for (int k = 0; k < count; ++k) {
      const uint4 now = next;
      if (k + 1 < count) next = load_raw(teacher[k + 1].row, vector);
      const GradientOf<1>& of = teacher[k].of;
      teacher_gradient<S>(now, of.base_t[0], of.factor[0], of.ratio[0], c, e_s, grad);
    }
    label_gradient(first.label, vector, first.sharp, grad);
    store_raw(p.template grad_row<S>(row), vector, pack<S>(grad));
  }
}

}  // namespace FASTKD_TARGET
}  // namespace fastkd::multi_teacher
