// A row of the networks as its threads hold it, and the sums of one network: of a tile in shared memory, or over tiles.
#pragma once

#include "core/cuda/block.cuh"
#include "core/cuda/raw.cuh"
#include "mutual/launch.cuh"

namespace fastkd::mutual {
inline namespace FASTKD_TARGET {

// OnChip: one tile holds the row.
template <int ThreadsPerRow, int RowsPerBlock, int Items, bool OnChip>
struct Policy : RowPolicy<ThreadsPerRow, RowsPerBlock, Items> {
  using Spread = RowPolicy<ThreadsPerRow, RowsPerBlock, Items>;
  static constexpr int kWarps = ThreadsPerRow / 32;
  static constexpr bool kOnChip = OnChip;
  static constexpr int kBlocks = 512 / Spread::kBlock;  // of a multiprocessor: lets a thread have 128 registers

  // Classes that lie together in a thread, whatever a network's dtype: the widest vector of a learner.
  template <class S>
  static constexpr int kWidth = kVector<S, S> < Items ? kVector<S, S> : Items;

  // Dynamic shared memory of a row, in numbers: x and e of each network's tile, and the tile of a soft target.
  template <class A>
  static FASTKD_HD int64_t numbers(int learners, int networks, bool soft) {
    return RowMemory<A>::numbers(learners, networks, kWarps) + (2 * networks + (soft ? 1 : 0)) * Spread::kTile;
  }
};

template <class S, class A, class P>
struct Row {
  static constexpr int kItems = P::kItems, kWidth = P::template kWidth<S>;
  using Items = A[kItems];
  using Bits = Raw<kWidth* int(sizeof(S))>;
  // A tile in flight: the vectors of a network that is read in such.
  struct Held {
    Bits raw[kItems / kWidth];
  };
  const Params<A>& p;
  RowThreads<A, P::kThreads>& threads;
  RowMemory<A> memory;
  A* tile;  // [networks][x, e][item][thread]: a thread reads what it wrote itself
  int64_t index;
  unsigned read;  // a bit per network: by a learner, or for its own cross-entropy
  A mass;         // sum of the soft target

  __device__ __forceinline__ A& x(int n, int i) const { return tile[((2 * n) * kItems + i) * P::kThreads + threads.thread]; }
  __device__ __forceinline__ A& e(int n, int i) const {
    return tile[((2 * n + 1) * kItems + i) * P::kThreads + threads.thread];
  }
  __device__ __forceinline__ A& soft(int i) const { return x(p.networks(), i); }

  __device__ __forceinline__ void sync() const {
    if constexpr (P::kWarps > 1)
      __syncthreads();
    else
      __syncwarp();
  }

  __device__ __forceinline__ int64_t class_of(int64_t first, int i) const {
    return item_class<kWidth>(first, i, P::kThreads, threads.thread);
  }

  // The first network from n on that is read.
  __device__ __forceinline__ int next_read(int n) const {
    while (n < p.networks() && !(read >> n & 1u)) ++n;
    return n;
  }

  template <class T>
  __device__ __forceinline__ void load_scalars(int n, int64_t first, A pad, Items& to) const {
    const T* row = static_cast<const T*>(memory.data(n));
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const int64_t c = class_of(first, i);
      to[i] = c < p.classes ? A(load_as(row[c])) : pad;
    }
  }

  __device__ __forceinline__ void load_any(int n, DType type, int64_t first, A pad, Items& to) const {
    switch (type) {
      case DType::f64: return load_scalars<double>(n, first, pad, to);
      case DType::f16: return load_scalars<Half>(n, first, pad, to);
      case DType::bf16: return load_scalars<BFloat16>(n, first, pad, to);
      default: return load_scalars<float>(n, first, pad, to);
    }
  }

  __device__ __forceinline__ void ask(int n, int64_t first, Held& held) const {
    if (!(p.vectors >> n & 1u)) return;
    const S* row = static_cast<const S*>(memory.data(n));
#pragma unroll
    for (int j = 0; j < kItems / kWidth; ++j) {
      const int64_t c = class_of(first, j * kWidth);
      held.raw[j] = Bits{};
      if (c < p.classes) held.raw[j] = load_raw<Bits>(row + c);
    }
  }

  // What ask() asked for. The classes past the end are -inf, like masked ones.
  __device__ __forceinline__ void take(int n, int64_t first, const Held& held, Items& to) const {
    if (!(p.vectors >> n & 1u)) return load_any(n, p.network[n].type, first, -A(kInf), to);
#pragma unroll
    for (int j = 0; j < kItems / kWidth; ++j) {
      A part[kWidth];
      unpack<S>(held.raw[j], part);
      const bool inside = class_of(first, j * kWidth) < p.classes;
#pragma unroll
      for (int v = 0; v < kWidth; ++v) to[j * kWidth + v] = inside ? part[v] : -A(kInf);
    }
  }

  // A tile of the soft target, smoothed, to shared memory; 0 past the end.
  __device__ __forceinline__ void load_soft(int64_t first) const {
    Items probability;
    load_any(p.networks(), p.soft.type, first, A(0), probability);
#pragma unroll
    for (int i = 0; i < kItems; ++i)
      soft(i) = class_of(first, i) < p.classes ? smoothed(probability[i], p.smoothing, p.classes) : A(0);
  }

  // The logit of a learner's label.
  __device__ __forceinline__ A label_logit(int m) const {
    return A(load_as(static_cast<const S*>(memory.data(m))[p.target[index]]));
  }
};

template <class S, class A, class P>
__device__ __forceinline__ A soft_mass(const Row<S, A, P>& row) {
  Numbers<A, 1> mass{{0}};
  for (int64_t first = 0; first < row.p.classes; first += P::kTile) {
    row.load_soft(first);
#pragma unroll
    for (int i = 0; i < P::kItems; ++i) mass.v[0] += row.soft(i);
  }
  return row.threads.sum(mass).v[0];
}

// {z, z at T = 1, sum of (logit - max), weighted by a soft target} of a tile relative to `base`, and the sum of these weights
// where it is not kept; on chip x and e go to shared memory.
template <bool Keep, class S, class A, class P>
__device__ __forceinline__ Numbers<A, Keep ? 3 : 4> exponentials(const Row<S, A, P>& row, int n, int64_t first, A base,
                                                                 const A (&logits)[P::kItems]) {
  const Params<A>& p = row.p;
  const bool cross_entropy = p.cross_entropy && n < p.learners;
  Numbers<A, Keep ? 3 : 4> sums{};
  const auto add = [&](A weight, A part) {
    sums.v[2] += part;
    if constexpr (!Keep) sums.v[3] += weight;
  };
#pragma unroll
  for (int i = 0; i < P::kItems; ++i) {
    const A above = logits[i] - base, x = above * p.inv_t, e = exp_negative(x);
    if constexpr (Keep) {
      row.x(n, i) = x;
      row.e(n, i) = e;
    }
    sums.v[0] += e;
    if (cross_entropy) {
      sums.v[1] += exponential_at_one(p.integer_t, above, e);
      if (p.smoothing > 0 && !p.soft.data && row.class_of(first, i) < p.classes) add(1, above);
    }
  }
  if (cross_entropy && p.soft.data) {
#pragma unroll
    for (int i = 0; i < P::kItems; ++i) add(row.soft(i), soft_part(row.soft(i), logits[i] - base));
  }
  return sums;
}

// Of a network whose row lies in one tile.
template <class S, class A, class P>
__device__ __forceinline__ void keep_network(const Row<S, A, P>& row, int n, const A (&logits)[P::kItems]) {
  const A max = row.threads.max(max_item(-A(kInf), logits));
  const Numbers<A, 3> sums = row.threads.sum(exponentials<true>(row, n, 0, max, logits));
  if (row.threads.thread == 0) {
    row.memory.stat(n, kMax) = max;
    row.memory.stat(n, kZ) = sums.v[0];
    row.memory.stat(n, kZOne) = sums.v[1];
    row.memory.stat(n, kSum) = sums.v[2];
  }
}

// This thread's sums over the tiles so far, relative to the base of its maximum.
template <class A>
struct RunningSums {
  A max = -A(kInf);
  Numbers<A, 4> sums{{0, 0, 0, 0}};  // as of exponentials()

  __device__ __forceinline__ void rebase(A new_max, A inv_t) {
    const A growth = base_of(new_max) - base_of(max);
    if (growth != 0) {
      const A down = growth > 0 ? -growth : A(0);  // from the base 0 of a masked part the sums are 0
      sums.v[0] = rounded_product(sums.v[0], exp_negative(down * inv_t));
      sums.v[1] *= exp_negative(down);
      sums.v[2] -= sums.v[3] == 0 ? A(0) : sums.v[3] * growth;
    }
    max = new_max;
  }
};

// The same over tiles, in one read. Every network goes through the same roundings, so that equal ones have equal sums.
template <class S, class A, class P>
__device__ __forceinline__ void stream_network(const Row<S, A, P>& row, int n) {
  A logits[P::kItems];
  RunningSums<A> running;
  typename Row<S, A, P>::Held next;
  row.ask(n, 0, next);
#pragma unroll 1
  for (int64_t first = 0; first < row.p.classes; first += P::kTile) {
    row.take(n, first, next, logits);
    if (first + P::kTile < row.p.classes) row.ask(n, first + P::kTile, next);
    if (row.p.soft.data) row.load_soft(first);
    running.rebase(max_item(running.max, logits), row.p.inv_t);
    const Numbers<A, 4> part = exponentials<false>(row, n, first, base_of(running.max), logits);
#pragma unroll
    for (int i = 0; i < 4; ++i) running.sums.v[i] += part.v[i];
  }
  running.rebase(row.threads.max(running.max), row.p.inv_t);
  const Numbers<A, 4> sums = row.threads.sum(running.sums);
  if (row.threads.thread == 0) {
    row.memory.stat(n, kMax) = running.max;
    row.memory.stat(n, kZ) = sums.v[0];
    row.memory.stat(n, kZOne) = sums.v[1];
    row.memory.stat(n, kSum) = sums.v[2];
  }
}

}  // namespace FASTKD_TARGET
}  // namespace fastkd::mutual
