// What the CUDA kernels of feature_ensemble receive: Args in the accumulation type, by value, so that it lies in constant
// memory; and how a block finds its pair.
#pragma once

#include "core/cuda/vec.cuh"
#include "feature_ensemble/math.h"

namespace fastkd::feature_ensemble {
inline namespace FASTKD_TARGET {

// A teacher's type that the kernel learns at run time: any but the student's own, or float32 beside a half.
struct AnyType {
  float as_wide_as;  // for kVector
};

template <class T>
FASTKD_HD const T* element_of(const void* map, int64_t at) {
  return static_cast<const T*>(map) + at;
}

// Elements of a teacher's map, from element `at` on.
template <class T>
struct Source {
  const T* data;

  FASTKD_HD Source(const void* map, DType, int64_t at) : data(element_of<T>(map, at)) {}

  template <class A>
  FASTKD_HD A load(int64_t at) const {
    return A(load_as(data[at]));
  }
  template <int Items, int Width, class A>
  __device__ __forceinline__ void items(unsigned first, unsigned length, int threads, int thread, bool vectors,
                                        A (&to)[Items]) const {
    load_items<Items, Width>(data, first, length, threads, thread, vectors, A(0), to);
  }
};

template <>
struct Source<AnyType> {
  const void* data;
  DType type;
  int64_t start;

  FASTKD_HD Source(const void* map, DType dtype, int64_t at) : data(map), type(dtype), start(at) {}

  template <class A>
  FASTKD_HD A load(int64_t at) const {
    switch (type) {
      case DType::f64: return A(*element_of<double>(data, start + at));
      case DType::f16: return A(load_as(*element_of<Half>(data, start + at)));
      case DType::bf16: return A(load_as(*element_of<BFloat16>(data, start + at)));
      default: return A(*element_of<float>(data, start + at));
    }
  }
  template <int Items, int Width, class A>
  __device__ __forceinline__ void items(unsigned first, unsigned length, int threads, int thread, bool vectors,
                                        A (&to)[Items]) const {
    const auto of = [&]<class T>(const T* from, bool wide) {
      load_items<Items, Width>(from, first, length, threads, thread, wide, A(0), to);
    };
    switch (type) {
      case DType::f64: return of(element_of<double>(data, start), false);  // a vector may be more than an access takes
      case DType::f16: return of(element_of<Half>(data, start), vectors);
      case DType::bf16: return of(element_of<BFloat16>(data, start), vectors);
      default: return of(element_of<float>(data, start), vectors);
    }
  }
};

// Indices within a sample fit 32 bits (op.cpp checks).
template <class A>
struct PairParams {
  const void *student, *teacher;
  void* grad;
  int64_t student_stride, teacher_stride, first_group;
  unsigned outer, inner, groups;
  int index;  // of the pair among all
  Group group;
  DType teacher_type;
  bool transposed, student_vectors, teacher_vectors, grad_vectors;
  A elements;             // what the sum over elements is divided by, 1 for elements="sum"
  A host_weight;
  unsigned first_block;   // of a launch
};

template <class A>
struct Params {
  int64_t samples, total_groups;
  int pairs, p;
  bool shared;
  PairParams<A> pair[kMaxLaunchPairs];
  const A* weight;  // null: host_weight
  int64_t weight_stride_pair, weight_stride_sample;
  const bool* mask;
  Reduction reduction;
  double divisor;
  A *distance, *sample_distance, *loss, *state;
  const A* grad_loss;

  FASTKD_HD A given_weight(int k, int64_t b) const {
    return weight ? weight[pair[k].index * weight_stride_pair + b * weight_stride_sample] : pair[k].host_weight;
  }
  FASTKD_HD A weight_of(int k, int64_t b) const { return given_weight(k, b) / pair[k].elements; }

  // As skips() of math.h.
  FASTKD_HD bool skips(int k, int64_t b) const { return (mask && !mask[b]) || given_weight(k, b) == 0; }
};

// Where a block works: a pair, and its number among the pair's blocks. Blocks of a shared student's pairs take turns, so
// that its map, read by all of them, stays in the cache.
struct Work {
  int pair;
  int64_t block;
};

template <class A>
__device__ __forceinline__ Work work_of(const Params<A>& p) {
  if (p.shared) return {int(blockIdx.x % unsigned(p.pairs)), int64_t(blockIdx.x / unsigned(p.pairs))};
  int k = 0;
  while (k + 1 < p.pairs && blockIdx.x >= p.pair[k + 1].first_block) ++k;
  return {k, int64_t(blockIdx.x - p.pair[k].first_block)};
}

// The element of a teacher's sample that stands beside element `at` of the student's [outer, inner].
template <class A>
__device__ __forceinline__ unsigned teacher_index(const PairParams<A>& pair, unsigned at) {
  return pair.transposed ? at % pair.inner * pair.outer + at / pair.inner : at;
}

template <class S, class T, class A>
Params<A> make_params(const Args& args) {
  constexpr int kWidth = kVector<S, T>;
  Params<A> p{};
  p.samples = args.samples;
  p.total_groups = args.total_groups;
  p.pairs = args.pairs;
  p.p = args.p;
  p.shared = args.shared;
  for (int k = 0; k < args.pairs; ++k) {
    const Pair& from = args.pair[k];
    PairParams<A>& to = p.pair[k];
    to.student = from.student;
    to.teacher = from.teacher;
    to.grad = from.grad;
    to.student_stride = from.student_stride;
    to.teacher_stride = from.teacher_stride;
    to.first_group = from.first_group;
    to.index = k;
    to.teacher_type = from.teacher_type;
    to.outer = unsigned(from.outer);
    to.inner = unsigned(from.inner);
    to.groups = unsigned(from.groups);
    to.group = from.group;
    to.transposed = from.transposed;
    // A row of rows is read in vectors where each of them is; the whole of a sample needs no more than its start.
    const int64_t row = from.group == Group::row ? from.inner : from.elements();
    to.student_vectors = rows_aligned<kWidth>(from.student, from.student_stride, row, sizeof(S));
    to.teacher_vectors =
        !from.transposed && rows_aligned<kWidth>(from.teacher, from.teacher_stride, row, bytes_of(from.teacher_type));
    to.grad_vectors = from.grad && rows_aligned<kWidth>(from.grad, from.elements(), row, sizeof(S));
    to.elements = args.mean_elements ? A(from.elements()) : A(1);
    to.host_weight = args.host_weight ? A(args.host_weight[k]) : A(0);
  }
  p.weight = static_cast<const A*>(args.weight);
  p.weight_stride_pair = args.weight_stride_pair;
  p.weight_stride_sample = args.weight_stride_sample;
  p.mask = args.mask;
  p.reduction = args.reduction;
  p.divisor = args.divisor;
  p.distance = static_cast<A*>(args.distance);
  p.sample_distance = static_cast<A*>(args.sample_distance);
  p.loss = static_cast<A*>(args.loss);
  p.state = static_cast<A*>(args.state);
  p.grad_loss = static_cast<const A*>(args.grad_loss);
  return p;
}

// Deals `blocks_of(pair)` blocks to each pair; the number of all.
template <class A, class F>
int64_t deal_blocks(Params<A>& p, const F& blocks_of) {
  int64_t total = 0;
  for (int k = 0; k < p.pairs; ++k) {
    p.pair[k].first_block = unsigned(total);
    total += blocks_of(p.pair[k]);
  }
  return total;
}

}  // namespace FASTKD_TARGET
}  // namespace fastkd::feature_ensemble
