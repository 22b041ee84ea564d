// Reductions over the threads that share a row: a warp, or a whole block. Every thread gets the result, summed in an order
// that depends on the number of threads alone.
#pragma once

#include "core/dtype.h"
#include "core/cuda/simt.h"

namespace fastkd {
inline namespace FASTKD_TARGET {

constexpr unsigned kFullWarp = 0xffffffffu;

// A state of N numbers; `merge(state, state)` combines two.
template <class A, int N>
struct Numbers {
  A v[N];
};

template <class A, int N>
__device__ __forceinline__ Numbers<A, N> shuffle_xor(const Numbers<A, N>& x, int mask) {
  Numbers<A, N> other;
#pragma unroll
  for (int i = 0; i < N; ++i) other.v[i] = __shfl_xor_sync(kFullWarp, x.v[i], mask);
  return other;
}

template <class A, int N, class Merge>
__device__ __forceinline__ Numbers<A, N> reduce_warp(Numbers<A, N> x, const Merge& merge) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) x = merge(x, shuffle_xor(x, mask));
  return x;
}

// How a row is spread: threads per row, rows per block, elements per thread and tile.
template <int ThreadsPerRow, int RowsPerBlock, int Items>
struct RowPolicy {
  static constexpr int kThreads = ThreadsPerRow, kRows = RowsPerBlock, kBlock = ThreadsPerRow * RowsPerBlock;
  static constexpr int kItems = Items, kTile = ThreadsPerRow * Items;
};

// The threads of one row. Threads = 32: a warp of a larger block, without shared memory; else: the whole block.
template <class A, int Threads>
struct RowThreads {
  static constexpr int kThreads = Threads, kWarps = Threads / 32, kMost = 4;  // kMost numbers in a state
  int thread, parity = 0;
  A* buffer;  // shared, 2 * kWarps * kMost; unused by a single warp

  template <int N, class Merge>
  __device__ __forceinline__ Numbers<A, N> reduce(Numbers<A, N> x, const Merge& merge) {
    static_assert(N <= kMost);
    x = reduce_warp(x, merge);
    if constexpr (kWarps > 1) {
      // Two buffers in turn: the barrier of a reduction also ends the reads of the one before the last.
      A* part = buffer + parity * kWarps * kMost;
      parity ^= 1;
      if (thread % 32 == 0) {
#pragma unroll
        for (int i = 0; i < N; ++i) part[thread / 32 * kMost + i] = x.v[i];
      }
      __syncthreads();
      const int lane = thread % 32 % kWarps;  // kWarps divides 32: the lanes hold copies, each a full set
#pragma unroll
      for (int i = 0; i < N; ++i) x.v[i] = part[lane * kMost + i];
#pragma unroll
      for (int mask = kWarps / 2; mask > 0; mask /= 2) x = merge(x, shuffle_xor(x, mask));
    }
    return x;
  }

  template <int N>
  __device__ __forceinline__ Numbers<A, N> max(const Numbers<A, N>& x) {
    return reduce(x, [](const Numbers<A, N>& a, const Numbers<A, N>& b) {
      Numbers<A, N> c;
#pragma unroll
      for (int i = 0; i < N; ++i) c.v[i] = a.v[i] < b.v[i] ? b.v[i] : a.v[i];
      return c;
    });
  }

  __device__ __forceinline__ A max(A x) { return max(Numbers<A, 1>{{x}}).v[0]; }

  template <int N>
  __device__ __forceinline__ Numbers<A, N> sum(const Numbers<A, N>& x) {
    return reduce(x, [](const Numbers<A, N>& a, const Numbers<A, N>& b) {
      Numbers<A, N> c;
#pragma unroll
      for (int i = 0; i < N; ++i) c.v[i] = a.v[i] + b.v[i];
      return c;
    });
  }
};

}  // namespace FASTKD_TARGET
}  // namespace fastkd
