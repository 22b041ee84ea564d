// Tiles of rows that do not fit on chip: how they are loaded, under softcap and logit scale where a network has them.
#pragma once

#include "core/softcap.h"
#include "multi_teacher/launch.cuh"

namespace fastkd::multi_teacher {
inline namespace FASTKD_TARGET {

// Of double half as many, so that the states of 16 teachers, 64 KiB, fit the shared memory of every GPU.
template <class A>
constexpr int kStreamThreads = sizeof(A) == 8 ? 128 : 256;
constexpr int kStreamItems = 8;
template <class A>
constexpr int64_t kStreamTile = int64_t(kStreamThreads<A>) * kStreamItems;

// A masked class stays masked. Products of their own rounding: fused into a difference of logits, equal networks would differ.
template <int N, class A>
__device__ __forceinline__ void cap_items(const Params<A>& p, int slot, A (&x)[N]) {
  if (!p.capped) return;
  const A cap = p.cap[slot], inner = p.cap_inner[slot];
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const A scaled = rounded_product(x[i], inner);
    x[i] = cap == 0 || x[i] == -A(kInf) ? scaled : rounded_product(cap, hyperbolic_tangent(scaled));
  }
}

template <int Width, class A>
__device__ __forceinline__ void load_network(const Params<A>& p, int slot, int64_t row, int64_t first, A (&to)[kStreamItems]) {
  load_items<kStreamItems, Width>(any_row(p.network[slot], row), first, p.classes, kStreamThreads<A>, int(threadIdx.x),
                                  p.in_vectors(slot), -A(kInf), to);
  cap_items(p, slot, to);
}

template <class S, class A>
__device__ __forceinline__ void load_student(const Params<A>& p, int64_t row, int64_t first, A (&s)[kStreamItems]) {
  load_items<kStreamItems, kVector<S, S>>(row_in_memory<S>(p.network[0], row), first, p.classes, kStreamThreads<A>,
                                          int(threadIdx.x), p.in_vectors(0), -A(kInf), s);
  cap_items(p, 0, s);
}

template <int Width, class A>
__device__ __forceinline__ void load_soft(const Params<A>& p, int64_t row, int64_t first, A (&y)[kStreamItems]) {
  load_items<kStreamItems, Width>(any_row(p.soft, row), first, p.classes, kStreamThreads<A>, int(threadIdx.x), p.soft_vectors,
                                  A(0), y);
}

// Teacher k's logits in this tile, or with combine="logits" the mixture of those in `reads`, -inf where one is masked and
// past the end.
template <int Width, class A>
__device__ __forceinline__ void load_teacher(const Params<A>& p, int k, unsigned reads, int64_t row, int64_t first,
                                             A (&t)[kStreamItems]) {
  const bool mixes = p.combine == Combine::logits;
  A one[kStreamItems];
  int count = 0;
#pragma unroll
  for (int i = 0; i < kStreamItems; ++i) t[i] = 0;
#pragma unroll 1
  for (int j = mixes ? next_teacher(reads, -1) : k; j != kNoTeacher; j = mixes ? next_teacher(reads, j) : kNoTeacher) {
    load_network<Width>(p, j + 1, row, first, one);
    const A weight = p.uniform ? 1 / A(++count) : p.weight_of(j, row);
    if (!mixes) {
#pragma unroll
      for (int i = 0; i < kStreamItems; ++i) t[i] = one[i];
      return;
    }
#pragma unroll
    for (int i = 0; i < kStreamItems; ++i) t[i] = mix_logit(t[i], one[i], p.uniform, weight);
  }
}

// The gradient with respect to the student's logits from that with respect to what softcap and logit scale make of them.
template <class S, class A>
__device__ __forceinline__ void uncap_gradient(const Params<A>& p, int64_t row, int64_t first, A (&grad)[kStreamItems]) {
  if (!p.capped) return;
  const A inv_cap = p.cap[0] == 0 ? A(0) : 1 / p.cap[0];
  A y[kStreamItems];
  load_student<S>(p, row, first, y);
#pragma unroll
  for (int i = 0; i < kStreamItems; ++i) {
    const A part = y[i] == -A(kInf) ? A(0) : y[i] * inv_cap;
    grad[i] *= p.logit_scale * (1 - part * part);
  }
}

}  // namespace FASTKD_TARGET
}  // namespace fastkd::multi_teacher
