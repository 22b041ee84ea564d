// The vectors of a row, 16 bytes each, that a block goes through.
#pragma once

#include "core/cuda/raw.cuh"
#include "core/cuda/simt.h"

namespace fastkd {
inline namespace FASTKD_TARGET {

// Calls f(vector, load(vector)) for this thread's vectors from `begin` to `end`, with `Ahead` the next one's loads in flight
// meanwhile.
template <int Threads, bool Ahead, class Load, class F>
__device__ __forceinline__ void run_vectors(unsigned begin, unsigned end, const Load& load, const F& f) {
  unsigned vector = begin + threadIdx.x;
  if (vector >= end) return;
  auto next = load(vector);
#pragma unroll 1
  for (; vector < end; vector += Threads) {
    const auto now = next;
    const bool more = vector + Threads < end;
    if (Ahead && more) next = load(vector + Threads);
    f(vector, now);
    if (!Ahead && more) next = load(vector + Threads);
  }
}

// One number in all elements from vector `begin` to `end`.
template <int Threads, class S>
__device__ __forceinline__ void fill_vectors(S* row, unsigned begin, unsigned end, float number) {
  float all[kRawItems<S>];
#pragma unroll
  for (int i = 0; i < kRawItems<S>; ++i) all[i] = number;
#pragma unroll 1
  for (unsigned vector = begin + threadIdx.x; vector < end; vector += Threads) store_raw(row, vector, pack<S>(all));
}

}  // namespace FASTKD_TARGET
}  // namespace fastkd
