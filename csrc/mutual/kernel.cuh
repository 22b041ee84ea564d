// One row of all networks by a warp or a block. On chip: the row's exponentials stay in shared memory between the two
// passes, so that each tensor is read once. Streamed: tile by tile, each tensor read twice.
#pragma once

#include "core/block.cuh"
#include "mutual/launch.cuh"

namespace fastkd::mutual {
inline namespace FASTKD_TARGET {

// OnChip: one tile holds the row.
template <int ThreadsPerRow, int RowsPerBlock, int Items, bool OnChip>
struct Policy : RowPolicy<ThreadsPerRow, RowsPerBlock, Items> {
  using Spread = RowPolicy<ThreadsPerRow, RowsPerBlock, Items>;
  static constexpr int kWarps = ThreadsPerRow / 32;
  static constexpr bool kOnChip = OnChip;

  template <class S, class T>
  static constexpr int kWidth = kVector<S, T> < Items ? kVector<S, T> : Items;

  // Dynamic shared memory of a block, in numbers.
  static int64_t numbers(int learners, int networks) {
    return Spread::kRows * (RowMemory<double>::numbers(learners, networks, kWarps) + 2 * networks * Spread::kTile);
  }
};

template <class S, class T, class A, class P>
struct Row {
  static constexpr int kItems = P::kItems, kWidth = P::template kWidth<S, T>;
  using Items = A[kItems];
  const Params<A>& p;
  RowThreads<A, P::kThreads>& threads;
  RowMemory<A> memory;
  A* tile;  // [networks][x, e][item][thread]: a thread reads what it wrote itself
  int64_t index;

  __device__ __forceinline__ A& x(int n, int i) const { return tile[((2 * n) * kItems + i) * P::kThreads + threads.thread]; }
  __device__ __forceinline__ A& e(int n, int i) const { return tile[((2 * n + 1) * kItems + i) * P::kThreads + threads.thread]; }

  __device__ __forceinline__ void sync() const {
    if constexpr (P::kWarps > 1)
      __syncthreads();
    else
      __syncwarp();
  }

  __device__ __forceinline__ int64_t class_of(int64_t first, int i) const {
    return item_class<kWidth>(first, i, P::kThreads, threads.thread);
  }

  // The classes past the end load as -inf, like masked ones.
  __device__ __forceinline__ void load(int n, int64_t first, Items& to) const {
    const bool vectors = p.vectors >> n & 1u;
    if (n < p.learners)
      load_items<kItems, kWidth>(p.template logits_row<S>(n, index), first, p.classes, P::kThreads, threads.thread,
                                 vectors, -A(kInf), to);
    else
      load_items<kItems, kWidth>(p.template logits_row<T>(n, index), first, p.classes, P::kThreads, threads.thread,
                                 vectors, -A(kInf), to);
  }
};

// {z, z at T = 1, sum of (logit - max)} of a tile relative to `base`; on chip x and e go to shared memory.
template <bool Keep, class S, class T, class A, class P>
__device__ __forceinline__ Numbers<A, 3> exponentials(const Row<S, T, A, P>& row, int n, int64_t first, A base,
                                                      const A (&logits)[P::kItems]) {
  const Params<A>& p = row.p;
  Numbers<A, 3> sums{{0, 0, 0}};
#pragma unroll
  for (int i = 0; i < P::kItems; ++i) {
    const A above = logits[i] - base, x = above * p.inv_t, e = exp_negative(x);
    if constexpr (Keep) {
      row.x(n, i) = x;
      row.e(n, i) = e;
    }
    sums.v[0] += e;
    if (p.ce_weight != 0 && n < p.learners) {
      sums.v[1] += exponential_at_one(p.integer_t, above, e);
      if (p.smoothing > 0 && row.class_of(first, i) < p.classes) sums.v[2] += above;
    }
  }
  return sums;
}

// Of a network whose row lies in one tile.
template <class S, class T, class A, class P>
__device__ __forceinline__ void keep_network(const Row<S, T, A, P>& row, int n, const A (&logits)[P::kItems]) {
  const A max = row.threads.max(max_item(-A(kInf), logits));
  const Numbers<A, 3> sums = row.threads.sum(exponentials<true>(row, n, 0, max, logits));
  if (row.threads.thread == 0) {
    row.memory.stat(n, kMax) = max;
    row.memory.stat(n, kZ) = sums.v[0];
    row.memory.stat(n, kZOne) = sums.v[1];
    row.memory.stat(n, kSum) = sums.v[2];
  }
}

// The same over tiles: the maximum first, then the sums, so that equal networks have equal sums.
template <class S, class T, class A, class P>
__device__ __forceinline__ void stream_network(const Row<S, T, A, P>& row, int n) {
  A logits[P::kItems], max = -A(kInf);
  for (int64_t first = 0; first < row.p.classes; first += P::kTile) {
    row.load(n, first, logits);
    max = max_item(max, logits);
  }
  max = row.threads.max(max);
  Numbers<A, 3> sums{{0, 0, 0}};
  for (int64_t first = 0; first < row.p.classes; first += P::kTile) {
    row.load(n, first, logits);
    const Numbers<A, 3> part = exponentials<false>(row, n, first, max, logits);
#pragma unroll
    for (int i = 0; i < 3; ++i) sums.v[i] += part.v[i];
  }
  sums = row.threads.sum(sums);
  if (row.threads.thread == 0) {
    row.memory.stat(n, kMax) = max;
    row.memory.stat(n, kZ) = sums.v[0];
    row.memory.stat(n, kZOne) = sums.v[1];
    row.memory.stat(n, kSum) = sums.v[2];
  }
}

// First pass: every network's maximum and sums, and on chip its x and e.
template <class S, class T, class A, class P>
__device__ __forceinline__ void read_networks(const Row<S, T, A, P>& row) {
  const int networks = row.p.networks();
  if constexpr (P::kOnChip) {
    A next[P::kItems], now[P::kItems];
    row.load(0, 0, next);
#pragma unroll 1
    for (int n = 0; n < networks; ++n) {
#pragma unroll
      for (int i = 0; i < P::kItems; ++i) now[i] = next[i];
      if (n + 1 < networks) row.load(n + 1, 0, next);  // in flight during the reductions of this network
      keep_network(row, n, now);
    }
  } else {
#pragma unroll 1
    for (int n = 0; n < networks; ++n) stream_network(row, n);
  }
}

// The pulls of all pairs, each computed once; that of a network on itself is 0 and its weight is never read.
template <class S, class T, class A, class P>
__device__ __forceinline__ void compute_pulls(const Row<S, T, A, P>& row) {
  const Params<A>& p = row.p;
  const int networks = p.networks(), pairs = p.learners * networks;
  for (int i = row.threads.thread; i < pairs; i += P::kThreads) {
    const int m = i / networks, n = i % networks;
    const A weight = m == n ? A(0) : p.weight_of(m, n, row.index);
    const Pull<A> one = pull(weight, p.scale.grad, row.memory.stat(m, kZ), row.memory.stat(n, kZ));
    row.memory.factor(m, n) = one.factor;
    row.memory.ratio(m, n) = one.ratio;
    for (int warp = 0; warp < P::kWarps; ++warp) row.memory.sum(warp, m, n) = 0;
  }
}

// The power of two that a learner's float16 gradient is stored with.
template <class A>
__device__ __forceinline__ A gradient_scale(const Params<A>& p, int m, int64_t row) {
  A bound = 0;
  for (int n = 0; n < p.networks(); ++n) bound += n == m ? A(0) : magnitude(p.weight_of(m, n, row));
  return A(half_scale(float(bound * p.scale.grad + magnitude(p.ce_weight))));
}

// Second pass, one tile of learner m: what the others say, four at a time, to the warps' sums and to the gradient.
template <class S, class T, class A, class P>
__device__ __forceinline__ void learn_tile(const Row<S, T, A, P>& row, int m, int64_t first, A scale) {
  constexpr int kItems = P::kItems, kTogether = 4;
  const Params<A>& p = row.p;
  const int networks = p.networks(), lane = row.threads.thread % 32, warp = row.threads.thread / 32;
  A x_m[kItems], e_m[kItems], grad[kItems];
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    x_m[i] = row.x(m, i);
    e_m[i] = row.e(m, i);
    grad[i] = 0;
  }
#pragma unroll 1
  for (int from = 0; from < networks; from += kTogether) {
    Numbers<A, kTogether> sums{{0, 0, 0, 0}};
#pragma unroll
    for (int j = 0; j < kTogether; ++j) {
      const int n = from + j;
      if (n >= networks || n == m) continue;
      const A factor = row.memory.factor(m, n), ratio = row.memory.ratio(m, n);
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        const A e_n = row.e(n, i);
        sums.v[j] += weighted_gap(e_n, row.x(n, i), x_m[i]);
        grad[i] += factor * (e_m[i] - ratio * e_n);
      }
    }
    sums = reduce_warp(sums, [](const Numbers<A, kTogether>& a, const Numbers<A, kTogether>& b) {
      Numbers<A, kTogether> c;
#pragma unroll
      for (int j = 0; j < kTogether; ++j) c.v[j] = a.v[j] + b.v[j];
      return c;
    });
    if (lane == 0) {
#pragma unroll
      for (int j = 0; j < kTogether; ++j)
        if (from + j < networks) row.memory.sum(warp, m, from + j) += sums.v[j];
    }
  }
  if (p.slot[m] < 0) return;
  if (p.ce_weight != 0) {
    const A factor = p.ce_weight / row.memory.stat(m, kZOne), uniform = p.ce_weight * p.smoothing / A(p.classes);
    const A t = 1 / p.inv_t;
    const int64_t label = p.target[row.index];
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      grad[i] += factor * exponential_at_one(p.integer_t, x_m[i] * t, e_m[i]) - uniform;
      if (row.class_of(first, i) == label) grad[i] -= p.ce_weight * (1 - p.smoothing);
    }
  }
#pragma unroll
  for (int i = 0; i < kItems; ++i) grad[i] *= scale;
  store_items<kItems, Row<S, T, A, P>::kWidth>(p.template grad_row<S>(m, row.index), first, p.classes, P::kThreads,
                                               row.threads.thread, p.grad_vectors, grad);
}

// The loss of learner m, by one thread, from the sums of all warps.
template <class S, class T, class A, class P>
__device__ __forceinline__ A learner_loss(const Row<S, T, A, P>& row, int m) {
  const Params<A>& p = row.p;
  A loss = 0;
  if (p.ce_weight != 0) {
    const A label = A(load_as(p.template logits_row<S>(m, row.index)[p.target[row.index]]));
    loss = p.ce_weight * cross_entropy(row.memory.stat(m, kZOne), label - row.memory.stat(m, kMax),
                                       row.memory.stat(m, kSum), p.smoothing, p.classes);
  }
  const A z_m = row.memory.stat(m, kZ);
  for (int n = 0; n < p.networks(); ++n) {
    if (n == m) continue;
    A a = 0;
    for (int warp = 0; warp < P::kWarps; ++warp) a += row.memory.sum(warp, m, n);
    loss += weighted(p.weight_of(m, n, row.index), p.scale.loss, divergence(a, row.memory.stat(n, kZ), z_m));
  }
  return loss;
}

// A row that counts nowhere, or whose target is out of range.
template <class S, class T, class A, class P>
__device__ __forceinline__ void leave_out(const Row<S, T, A, P>& row, A nothing) {
  const Params<A>& p = row.p;
  for (int m = row.threads.thread; m < p.learners; m += P::kThreads) {
    p.row_loss[m * p.rows + row.index] = nothing;
    if (p.half && p.slot[m] >= 0) p.saved[p.slot[m] * p.rows + row.index] = 1;
  }
  A grad[P::kItems];
#pragma unroll
  for (int i = 0; i < P::kItems; ++i) grad[i] = nothing;
  for (int m = 0; m < p.learners; ++m)
    for (int64_t first = 0; p.slot[m] >= 0 && first < p.classes; first += P::kTile)
      store_items<P::kItems, Row<S, T, A, P>::kWidth>(p.template grad_row<S>(m, row.index), first, p.classes, P::kThreads,
                                                      row.threads.thread, p.grad_vectors, grad);
}

template <class S, class T, class A, class P>
__global__ void __launch_bounds__(P::kBlock) mutual_kernel(const __grid_constant__ Params<A> p) {
  using Threads = RowThreads<A, P::kThreads>;
  SIMT_DYNAMIC_SHARED(A, dynamic);
  SIMT_SHARED(A, buffer, 2 * Threads::kWarps * Threads::kMost);
  const int in_block = int(threadIdx.x) / P::kThreads, networks = p.networks();
  const int64_t index = int64_t(blockIdx.x) * P::kRows + in_block;
  if (index >= p.rows) return;  // whole warps: a row of less than a block needs no barrier
  Threads threads{int(threadIdx.x) % P::kThreads, 0, buffer};
  const int64_t numbers = RowMemory<A>::numbers(p.learners, networks, P::kWarps);
  A* const start = dynamic + in_block * (numbers + 2 * networks * int64_t(P::kTile));
  const RowMemory<A> memory{start, p.learners, networks, P::kWarps};
  const Row<S, T, A, P> row{p, threads, memory, memory.start + numbers, index};
  const Label kind = label_kind(p.target, index, p.ignore_index, p.classes);
  if (kind == Label::ignored || kind == Label::outside)
    return leave_out(row, kind == Label::ignored ? A(0) : A(__builtin_nanf("")));

  read_networks(row);
  row.sync();  // the statistics
  compute_pulls(row);
  row.sync();
  for (int64_t first = 0; first < p.classes; first += P::kTile) {
    if constexpr (!P::kOnChip) {
      for (int n = 0; n < networks; ++n) {
        A logits[P::kItems];
        row.load(n, first, logits);
        exponentials<true>(row, n, first, row.memory.stat(n, kMax), logits);
      }
    }
#pragma unroll 1
    for (int m = 0; m < p.learners; ++m) {
      const A scale = p.half && p.slot[m] >= 0 ? gradient_scale(p, m, index) : A(1);
      if (p.half && p.slot[m] >= 0 && threads.thread == 0) p.saved[p.slot[m] * p.rows + index] = 1 / scale;
      learn_tile(row, m, first, scale);
    }
  }
  row.sync();  // the sums
  for (int m = threads.thread; m < p.learners; m += P::kThreads) p.row_loss[m * p.rows + index] = learner_loss(row, m);
}

}  // namespace FASTKD_TARGET
}  // namespace fastkd::mutual
