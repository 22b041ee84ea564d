// Forward of a long row in whole vectors (stream_vectors.cuh): one pass whose running sums stay in registers.
#pragma once

#include "core/cuda/block.cuh"
#include "multi_teacher/stream_vectors.cuh"

namespace fastkd::multi_teacher {
inline namespace FASTKD_TARGET {

// A thread's sums relative to its maxima so far. A teacher's: z, a = sum e (x_t - x_s) at T = 1, the largest x_t - x_s.
template <int K>
struct VectorSums {
  float max = -kInf, z = 0, z_one = 0;
  float top[K], z_t[K], a[K], gap[K];

  __device__ VectorSums() {
#pragma unroll
    for (int k = 0; k < K; ++k) {
      top[k] = gap[k] = -kInf;
      z_t[k] = a[k] = 0;
    }
  }
};

// The student's part of a new maximum; returns the growth of its base.
template <AtOne One, int K>
__device__ __forceinline__ float rebase_student(VectorSums<K>& sums, const Exponents& c, float new_max) {
  const float growth = base_of(new_max) - base_of(sums.max);
  if (growth != 0) {
    const float down = -fmaxf(growth, 0.f);  // from the base 0 of a masked part the sums are 0
    const float factor = exp2_approximate(down * c.scale);
    sums.z = rounded_product(sums.z, factor);
    sums.z_one *= at_one<One>(c, down, factor);
  }
  sums.max = new_max;
  return growth;
}

// A teacher's. `a` moves by both bases in one sum, which is exactly 0 where student and teacher are the same.
template <int K>
__device__ __forceinline__ void rebase_teacher(VectorSums<K>& sums, int k, const Exponents& c, float new_max, float growth) {
  const float fall = base_of(sums.top[k]) - base_of(new_max);
  if (fall != 0 || growth != 0) {
    const float factor = exp2_approximate(fminf(fall, 0.f) * c.scale);
    // Of a part masked by the most negative finite number nothing is left, however far the bases moved.
    const float moved = factor * (sums.a[k] + sums.z_t[k] * (fall + growth));
    sums.a[k] = factor == 0 || sums.z_t[k] == 0 ? 0.f : moved;
    sums.z_t[k] = rounded_product(sums.z_t[k], factor);
  }
  sums.top[k] = new_max;
}

// One vector of a teacher; x_s is relative to the student's base.
template <class S, int K>
__device__ __forceinline__ void push_teacher_vector(VectorSums<K>& sums, int k, const Exponents& c, const uint4& bits,
                                                    float growth, const float (&x_s)[kRawItems<S>]) {
  float t[kRawItems<S>];
  unpack<S>(bits, t);
  rebase_teacher(sums, k, c, largest(sums.top[k], t), growth);
  const float base = base_of(sums.top[k]);
#pragma unroll
  for (int i = 0; i < kRawItems<S>; ++i) {
    const float x = t[i] - base, y = x * c.scale, e = exp2_approximate(y), gap = x - x_s[i];
    sums.z_t[k] += e;
    if (!(y < kNothing)) sums.a[k] += e * gap;
    sums.gap[k] = fmaxf(sums.gap[k], gap);
  }
}

template <class S, AtOne One, int K>
__device__ __forceinline__ void push_vectors(VectorSums<K>& sums, const Exponents& c, const Vectors<K>& now) {
  float x[kRawItems<S>];
  unpack<S>(now.student, x);
  const float growth = rebase_student<One>(sums, c, largest(sums.max, x)), base = base_of(sums.max);
#pragma unroll
  for (int i = 0; i < kRawItems<S>; ++i) {
    x[i] -= base;
    const float e = exp2_approximate(x[i] * c.scale);
    sums.z += e;
    if constexpr (One != AtOne::same) sums.z_one += at_one<One>(c, x[i], e);
  }
#pragma unroll
  for (int k = 0; k < K; ++k) push_teacher_vector<S>(sums, k, c, now.teacher[k], growth, x);
}

// All threads' sums together. To the common maxima first and then sums, teachers like the student: so equal networks have
// equal sums.
template <AtOne One, int K, class Threads>
__device__ __forceinline__ void gather_vectors(VectorSums<K>& sums, const Exponents& c, Threads& threads) {
  const float growth = rebase_student<One>(sums, c, threads.max(sums.max));
  Numbers<float, K> top, z, a, gap;
#pragma unroll
  for (int k = 0; k < K; ++k) {
    top.v[k] = sums.top[k];
    gap.v[k] = sums.gap[k];
  }
  top = threads.max(top);
  gap = threads.max(gap);
#pragma unroll
  for (int k = 0; k < K; ++k) {
    rebase_teacher(sums, k, c, top.v[k], growth);
    z.v[k] = sums.z_t[k];
    a.v[k] = sums.a[k];
  }
  const Numbers<float, 2> student = threads.sum(Numbers<float, 2>{{sums.z, sums.z_one}});
  sums.z = student.v[0];
  sums.z_one = One == AtOne::same ? student.v[0] : student.v[1];
  z = threads.sum(z);
  a = threads.sum(a);
#pragma unroll
  for (int k = 0; k < K; ++k) {
    sums.z_t[k] = z.v[k];
    sums.gap[k] = gap.v[k];
    sums.a[k] = gap.v[k] == kInf ? kInf : a.v[k];  // only the student is -inf, also where exp(x_t) is 0
  }
}

// Of one thread: the states of these teachers, in the order of streaming.cuh. Returns their part of KD.
template <int K>
__device__ __forceinline__ float store_teachers(const Params<float>& p, int64_t row, const RowOf<K>& at,
                                                const VectorSums<K>& sums) {
  float kd = 0, *saved = p.saved + row * p.saved_columns;
#pragma unroll
  for (int k = 0; k < K; ++k) {
    if (at.slot[k] == kNoTeacher) continue;
    const int slot = at.slot[k];
    kd += p.weight_of(slot, row) * p.scale[slot].loss * divergence(sums.a[k] * p.inv_t[0], sums.z_t[k], sums.z);
    if (!p.need_grad) continue;
    saved[2 + 3 * slot] = sums.top[k];
    saved[3 + 3 * slot] = sums.z_t[k];
    saved[4 + 3 * slot] = sums.z;
  }
  return kd;
}

// The student's states, and the row's losses.
template <class S>
__device__ __forceinline__ void store_student(const Params<float>& p, int64_t row, const void* student, float max, float z_one,
                                              float kd) {
  float ce = 0, *saved = p.saved + row * p.saved_columns;
  if (p.need_grad) {
    saved[0] = max;
    saved[1] = z_one;
  }
  if (p.cross_entropy) {
    const float label = load_as(static_cast<const S*>(student)[p.target[row]]);
    ce = cross_entropy(z_one, label - base_of(max), 0.f, 0.f, p.classes);
  }
  p.store_losses(row, kd, ce);
}

// A part's sums as they lie in memory between the two kernels of rows that are split.
template <int K>
constexpr int kPartNumbers = 3 + 4 * K;

template <int K>
__device__ __forceinline__ void store_part(const VectorSums<K>& sums, float* to) {
  to[0] = sums.max;
  to[1] = sums.z;
  to[2] = sums.z_one;
#pragma unroll
  for (int k = 0; k < K; ++k) {
    to[3 + 4 * k] = sums.top[k];
    to[4 + 4 * k] = sums.z_t[k];
    to[5 + 4 * k] = sums.a[k];
    to[6 + 4 * k] = sums.gap[k];
  }
}

template <int K>
__device__ __forceinline__ void load_part(VectorSums<K>& sums, const float* from) {
  sums.max = from[0];
  sums.z = from[1];
  sums.z_one = from[2];
#pragma unroll
  for (int k = 0; k < K; ++k) {
    sums.top[k] = from[3 + 4 * k];
    sums.z_t[k] = from[4 + 4 * k];
    sums.a[k] = from[5 + 4 * k];
    sums.gap[k] = from[6 + 4 * k];
  }
}

// Whether a row has no loss, which is then written, by one thread.
__device__ __forceinline__ bool left_out(const Params<float>& p, int64_t row, bool writes) {
  const Label kind = label_kind(p.target, row, p.ignore_index, p.classes);
  if (kind != Label::ignored && kind != Label::outside) return false;
  const float nothing = kind == Label::ignored ? 0.f : __builtin_nanf("");
  if (writes) p.store_losses(row, nothing, nothing);
  return true;
}

// Blocks of a multiprocessor: registers for the states, and at least 32 KiB of loads in flight.
constexpr int vector_blocks(int teachers) { return teachers == 1 ? 4 : teachers == 2 ? 3 : 2; }

// One of `parts` parts of a row and one of `groups` groups of its teachers; blocks are rows times parts times groups. Rows that
// are split, by parts or groups, leave their sums in `scratch` [R, parts, groups, kPartNumbers].
template <class S, int K, AtOne One>
__global__ void __launch_bounds__(kVectorThreads, vector_blocks(K))
    stream_rows_kernel(const __grid_constant__ Params<float> p, unsigned parts, unsigned groups, float* scratch) {
  using Threads = RowThreads<float, kVectorThreads>;
  SIMT_SHARED(float, buffer, 2 * Threads::kWarps * Threads::kMost);
  Threads threads{int(threadIdx.x), 0, buffer};
  const unsigned group = blockIdx.x % groups;
  const int64_t row = blockIdx.x / groups / parts;
  const bool whole = parts == 1 && groups == 1;
  if (whole && p.need_grad && threadIdx.x < unsigned(p.saved_columns)) p.saved[row * p.saved_columns + threadIdx.x] = 0;
  if (left_out(p, row, whole && threadIdx.x == 0)) return;
  const Exponents c = exponents_of(p);
  const RowOf<K> at = row_of_vectors<K>(p, row, group);
  if (group > 0 && at.slot[0] == kNoTeacher) return;
  const Range range = part_of_row(unsigned(p.classes / kRawItems<S>), blockIdx.x / groups % parts, parts);
  VectorSums<K> sums;
  over_vectors(at, range.begin, range.end, [&](unsigned, const Vectors<K>& now) { push_vectors<S, One>(sums, c, now); });
  gather_vectors<One>(sums, c, threads);
  if (threadIdx.x != 0) return;
  if (whole)
    store_student<S>(p, row, at.student, sums.max, sums.z_one, store_teachers(p, row, at, sums));
  else
    store_part(sums, scratch + int64_t(blockIdx.x) * kPartNumbers<K>);
}

constexpr int kMergeThreads = 128, kMergeRows = kMergeThreads / 32;

// A warp per row: its parts' sums together, a part a lane, group by group.
template <class S, int K, AtOne One>
__global__ void __launch_bounds__(kMergeThreads)
    stream_parts_kernel(const __grid_constant__ Params<float> p, unsigned parts, unsigned groups, const float* scratch) {
  const int64_t row = int64_t(blockIdx.x) * kMergeRows + threadIdx.x / 32;
  const unsigned lane = threadIdx.x % 32;
  if (row >= p.rows) return;  // whole warps
  for (int64_t i = lane; p.need_grad && i < p.saved_columns; i += 32) p.saved[row * p.saved_columns + i] = 0;
  if (left_out(p, row, lane == 0)) return;
  __syncwarp();  // the zeros
  RowThreads<float, 32> threads{int(lane), 0, nullptr};
  float kd = 0, max = 0, z_one = 0;
  RowOf<K> at;
#pragma unroll 1
  for (unsigned group = 0; group < groups; ++group) {
    at = row_of_vectors<K>(p, row, group);
    if (group > 0 && at.slot[0] == kNoTeacher) break;
    VectorSums<K> sums;
    if (lane < parts) load_part(sums, scratch + ((row * parts + lane) * groups + group) * kPartNumbers<K>);
    gather_vectors<One>(sums, exponents_of(p), threads);
    if (lane == 0) kd += store_teachers(p, row, at, sums);
    max = sums.max;  // the same bits in every group
    z_one = sums.z_one;
  }
  if (lane == 0) store_student<S>(p, row, at.student, max, z_one, kd);
}

}  // namespace FASTKD_TARGET
}  // namespace fastkd::multi_teacher
