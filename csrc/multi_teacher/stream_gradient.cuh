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

template <class S, AtOne One, int K>
__device__ __forceinline__ uint4 gradient_vector(const GradientOf<K>& g, const Exponents& c, unsigned vector,
                                                 const Vectors<K>& now) {
  constexpr int kItems = kRawItems<S>;
  float e_s[kItems], t[kItems], grad[kItems];
  unpack<S>(now.student, e_s);
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const float x = e_s[i] - g.base;
    e_s[i] = exp2_approximate(x * c.scale);
    grad[i] = g.label_factor * at_one<One>(c, x, e_s[i]);
  }
#pragma unroll
  for (int k = 0; k < K; ++k) {
    unpack<S>(now.teacher[k], t);
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const float e_t = exp2_approximate((t[i] - g.base_t[k]) * c.scale);
      grad[i] += g.factor[k] * (e_s[i] - g.ratio[k] * e_t);
    }
  }
  const int64_t label = g.label - int64_t(vector) * kItems;
  if (label >= 0 && label < kItems) {
#pragma unroll
    for (int i = 0; i < kItems; ++i) grad[i] -= i == int(label) ? g.sharp : 0.f;
  }
  return pack<S>(grad);
}

// The gradient of one of `parts` parts of a row; blocks are rows times parts.
template <class S, int K, AtOne One>
__global__ void __launch_bounds__(kVectorThreads, K == 4 ? 3 : 4)
    stream_gradient_kernel(const __grid_constant__ Params<float> p, const float* grad_loss, bool per_row, const float* aux,
                           unsigned parts) {
  const Range range = part_of_row(unsigned(p.classes / kRawItems<S>), blockIdx.x % parts, parts);
  const int64_t row = blockIdx.x / parts;
  S* const grad = p.template grad_row<S>(row);
  const Label kind = label_kind(p.target, row, p.ignore_index, p.classes);
  if (kind == Label::ignored || kind == Label::outside) {
    float nothing[kRawItems<S>];
#pragma unroll
    for (int i = 0; i < kRawItems<S>; ++i) nothing[i] = kind == Label::ignored ? 0.f : __builtin_nanf("");
#pragma unroll 1
    for (unsigned v = range.begin + threadIdx.x; v < range.end; v += kVectorThreads) store_raw(grad, v, pack<S>(nothing));
    return;
  }
  const Exponents c = exponents_of(p);
  const RowOf<K> at = row_of_vectors<K>(p, row);
  const GradientOf<K> of = gradient_of(p, row, at, grad_loss[per_row ? row : 0] * aux[0]);
  over_vectors(at, range.begin, range.end, [&](unsigned vector, const Vectors<K>& now) {
    store_raw(grad, vector, gradient_vector<S, One>(of, c, vector, now));
  });
}

}  // namespace FASTKD_TARGET
}  // namespace fastkd::multi_teacher
