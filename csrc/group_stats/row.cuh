// A row's statistics from the threads that share it: in registers where the row fits, else in one pass with running sums.
#pragma once

#include "core/block.cuh"
#include "core/vec.cuh"
#include "group_stats/math.h"

namespace fastkd::group_stats {
inline namespace FASTKD_TARGET {

// Args by value, so that it lies in constant memory.
struct Params {
  int64_t rows, classes, ignore_index;
  int64_t stride[kMaxLaunchNetworks];
  const void* logits[kMaxLaunchNetworks];
  const int64_t* target;
  unsigned vectors;  // a bit per network: its rows allow 16-byte accesses
  Output out;        // of the launch's first network on

  template <class T>
  FASTKD_HD const T* row(int network, int64_t r) const {
    return static_cast<const T*>(logits[network]) + r * stride[network];
  }
  FASTKD_HD bool in_vectors(int network) const { return vectors >> network & 1u; }
};

// The largest and the second largest logit, which are the same where two classes tie. NaN is left out.
template <class A>
__device__ __forceinline__ void push_top(Numbers<A, 2>& top, A value) {
  const A loser = value > top.v[0] ? top.v[0] : value;
  top.v[1] = loser > top.v[1] ? loser : top.v[1];
  top.v[0] = value > top.v[0] ? value : top.v[0];
}

template <class A>
__device__ __forceinline__ Numbers<A, 2> merge_top(const Numbers<A, 2>& a, const Numbers<A, 2>& b) {
  const bool first = a.v[0] > b.v[0];
  const A loser = first ? b.v[0] : a.v[0], second = first ? a.v[1] : b.v[1];
  return {{first ? a.v[0] : b.v[0], loser > second ? loser : second}};
}

// A thread's part of a row. z and s relative to its own maximum so far, or to 0 while every class was masked.
template <class A, int Width, int Threads>
struct RowPart {
  Label<A> label;
  int thread;
  Numbers<A, 2> top{{-A(kInf), -A(kInf)}};
  Numbers<A, 2> sums{{0, 0}};  // z, s
  Numbers<int, 2> counts{{0, 0}};  // classes above the label's logit, classes before the label that have it

  __device__ __forceinline__ void rebase(A fall) {  // <= 0
    const A factor = exp_negative(fall);
    sums.v[1] = factor * (sums.v[1] + sums.v[0] * bounded(fall));
    sums.v[0] *= factor;
  }

  // Items of load_items() from class `first` on, classes past the end -inf.
  template <int Items>
  __device__ __forceinline__ void push(const A (&logits)[Items], int64_t first) {
    const A before = top.v[0];
#pragma unroll
    for (int i = 0; i < Items; ++i) push_top(top, logits[i]);
    if (top.v[0] > before) rebase(before - top.v[0]);
    const A base = top.v[0] == -A(kInf) ? A(0) : top.v[0];
    const int earlier = int(label.index - first);  // of this tile: classes are fewer than 2^31
#pragma unroll
    for (int i = 0; i < Items; ++i) {
      const int c = item_class<Width>(0, i, Threads, thread);
      const A x = logits[i] - base, e = exp_negative(x);
      sums.v[0] += e;
      sums.v[1] += e * bounded(x);
      counts.v[0] += logits[i] > label.logit ? 1 : 0;
      counts.v[1] += logits[i] == label.logit && c < earlier ? 1 : 0;
    }
  }

  // The whole row's statistics, in every thread. A row of masked classes alone leaves -inf - -inf, so NaN.
  __device__ __forceinline__ RowStats<A> reduce(RowThreads<A, Threads>& threads, RowThreads<int, Threads>& counters,
                                                int64_t classes) {
    const A mine = top.v[0];
    top = threads.reduce(top, [](const Numbers<A, 2>& a, const Numbers<A, 2>& b) { return merge_top(a, b); });
    rebase(mine - top.v[0]);
    sums = threads.sum(sums);
    counts = counters.sum(counts);
    return row_stats(sums.v[0], sums.v[1], top.v[1] - top.v[0], top.v[0], label, int64_t(counts.v[0]), counts.v[1] > 0,
                     classes);
  }
};

// Blocks are rows times networks. A row of one tile is read once into registers; so is each tile of a longer one.
template <class T, class A, class P>
__global__ void __launch_bounds__(P::kBlock) row_kernel(const __grid_constant__ Params p) {
  using Threads = RowThreads<A, P::kThreads>;
  constexpr int kWidth = kVector<T, T>;
  SIMT_SHARED(A, buffer, 2 * Threads::kWarps * Threads::kMost);
  SIMT_SHARED(int, counters_buffer, 2 * Threads::kWarps * Threads::kMost);
  Threads threads{int(threadIdx.x) % P::kThreads, 0, buffer};
  RowThreads<int, P::kThreads> counters{threads.thread, 0, counters_buffer};
  const int network = int(blockIdx.y);
  const int64_t r = int64_t(blockIdx.x) * P::kRows + threadIdx.x / P::kThreads;
  if (r >= p.rows) return;  // whole warps: a row of less than a block needs no barrier
  const T* row = p.template row<T>(network, r);
  RowPart<A, kWidth, P::kThreads> part{label_of<T, A>(p.target, r, p.ignore_index, p.classes, row), threads.thread};
  for (int64_t first = 0; first < p.classes; first += P::kTile) {
    A logits[P::kItems];
    load_items<P::kItems, kWidth>(row, first, p.classes, P::kThreads, threads.thread, p.in_vectors(network), -A(kInf),
                                  logits);
    part.push(logits, first);
  }
  const RowStats<A> stats = part.reduce(threads, counters, p.classes);
  if (threads.thread == 0) store(p.out, network * p.rows + r, stats);
}

}  // namespace FASTKD_TARGET
}  // namespace fastkd::group_stats
