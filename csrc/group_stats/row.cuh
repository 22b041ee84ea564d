// A row's statistics from the threads that share it: in registers where the row fits, else in one pass with running sums.
#pragma once

#include "core/cuda/block.cuh"
#include "core/cuda/vec.cuh"
#include "group_stats/math.h"

namespace fastkd::group_stats {
inline namespace FASTKD_TARGET {

// One launch, by value, so that it lies in constant memory: networks of one type, and which of the M each is.
struct Params {
  int64_t rows, classes, ignore_index;
  Network network[kMaxLaunchNetworks];
  int index[kMaxLaunchNetworks];
  const int64_t* target;
  Network soft;      // where kSoft
  unsigned vectors;  // a bit per network: its rows allow 16-byte accesses
  bool wide;
  Output out;

  FASTKD_HD bool in_vectors(int slot) const { return vectors >> slot & 1u; }
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

// A thread's part of the sums with soft labels, `below` relative to its maximum so far. All terms are at least 0.
template <class A, int Width, int Threads>
struct SoftPart {
  Numbers<A, 2> sums{{0, 0}};  // weight, below

  __device__ __forceinline__ void rise(A from, A to) {
    if (from != -A(kInf) && to > from) sums.v[1] += sums.v[0] * (to - from);
  }

  template <class T, int Items>
  __device__ __forceinline__ static void load(const Network& soft, int64_t row, int64_t first, int64_t classes, int thread,
                                              A (&to)[Items]) {
    load_items<Items, Width>(row_of<T>(soft, row), first, classes, Threads, thread, false, A(0), to);
  }

  // After the same logits went to `part`, whose maximum was `before`.
  template <int Items, class Part>
  __device__ __forceinline__ void push(const Network& soft, int64_t row, const A (&logits)[Items], int64_t first,
                                       int64_t classes, A before, const Part& part) {
    rise(before, part.top.v[0]);
    A probability[Items];
    switch (soft.type) {
      case DType::f64: load<double>(soft, row, first, classes, part.thread, probability); break;
      case DType::f16: load<Half>(soft, row, first, classes, part.thread, probability); break;
      case DType::bf16: load<BFloat16>(soft, row, first, classes, part.thread, probability); break;
      default: load<float>(soft, row, first, classes, part.thread, probability);
    }
#pragma unroll
    for (int i = 0; i < Items; ++i) {
      sums.v[0] += probability[i];
      sums.v[1] += soft_term(probability[i], part.top.v[0] - logits[i]);
    }
  }
};

// Blocks are rows times networks. A row of one tile is read once into registers; so is each tile of a longer one.
template <class T, class A, class P, bool kSoft>
__global__ void __launch_bounds__(P::kBlock, kSoft ? 1 : 0) row_kernel(const __grid_constant__ Params p) {
  using Threads = RowThreads<A, P::kThreads>;
  constexpr int kWidth = kVector<T, T>;
  SIMT_SHARED(A, buffer, 2 * Threads::kWarps * Threads::kMost);
  SIMT_SHARED(int, counters_buffer, 2 * Threads::kWarps * Threads::kMost);
  Threads threads{int(threadIdx.x) % P::kThreads, 0, buffer};
  RowThreads<int, P::kThreads> counters{threads.thread, 0, counters_buffer};
  const int slot = int(blockIdx.y);
  const int64_t r = int64_t(blockIdx.x) * P::kRows + threadIdx.x / P::kThreads;
  if (r >= p.rows) return;  // whole warps: a row of less than a block needs no barrier
  const T* row = row_of<T>(p.network[slot], r);
  RowPart<A, kWidth, P::kThreads> part{label_of<T, A>(p.target, r, p.ignore_index, p.classes, row), threads.thread};
  SoftPart<A, kWidth, P::kThreads> soft;
  const bool with_soft = kSoft && part.label.given;
  for (int64_t first = 0; first < p.classes; first += P::kTile) {
    A logits[P::kItems];
    load_items<P::kItems, kWidth>(row, first, p.classes, P::kThreads, threads.thread, p.in_vectors(slot), -A(kInf), logits);
    const A before = part.top.v[0];
    part.push(logits, first);
    if (with_soft) soft.push(p.soft, r, logits, first, p.classes, before, part);
  }
  const A mine = part.top.v[0];
  RowStats<A> stats = part.reduce(threads, counters, p.classes);
  if (with_soft) {  // the same for all threads of the row
    soft.rise(mine, part.top.v[0]);
    const Numbers<A, 2> sums = threads.sum(soft.sums);
    stats.ce = soft_cross_entropy(sums.v[0], sums.v[1], stats.confidence);
  }
  if (threads.thread == 0) store(p.out, p.index[slot] * p.rows + r, stats, p.wide);
}

}  // namespace FASTKD_TARGET
}  // namespace fastkd::group_stats
