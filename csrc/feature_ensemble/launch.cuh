// What the CUDA kernels of feature_ensemble receive: Args in the accumulation type, by value, so that it lies in constant
// memory; and how a block finds its pair.
#pragma once

#include "core/vec.cuh"
#include "feature_ensemble/math.h"

namespace fastkd::feature_ensemble {
inline namespace FASTKD_TARGET {

// Indices within a sample fit 32 bits (op.cpp checks).
template <class A>
struct PairParams {
  const void *student, *teacher;
  void* grad;
  int64_t student_stride, teacher_stride, first_group;
  unsigned outer, inner, groups;
  Group group;
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
  Reduction reduction;
  A *distance, *sample_distance, *loss, *state;
  const A* grad_loss;

  FASTKD_HD A weight_of(int k, int64_t b) const {
    const A w = weight ? weight[k * weight_stride_pair + b * weight_stride_sample] : pair[k].host_weight;
    return w / pair[k].elements;
  }
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
    to.outer = unsigned(from.outer);
    to.inner = unsigned(from.inner);
    to.groups = unsigned(from.groups);
    to.group = from.group;
    to.transposed = from.transposed;
    // A row of rows is read in vectors where each of them is; the whole of a sample needs no more than its start.
    const int64_t row = from.group == Group::row ? from.inner : from.elements();
    to.student_vectors = rows_aligned<kWidth>(from.student, from.student_stride, row, sizeof(S));
    to.teacher_vectors = !from.transposed && rows_aligned<kWidth>(from.teacher, from.teacher_stride, row, sizeof(T));
    to.grad_vectors = from.grad && rows_aligned<kWidth>(from.grad, from.elements(), row, sizeof(S));
    to.elements = args.mean_elements ? A(from.elements()) : A(1);
    to.host_weight = args.host_weight ? A(args.host_weight[k]) : A(0);
  }
  p.weight = static_cast<const A*>(args.weight);
  p.weight_stride_pair = args.weight_stride_pair;
  p.weight_stride_sample = args.weight_stride_sample;
  p.reduction = args.reduction;
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
