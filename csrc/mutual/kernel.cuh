// One row of all networks by a warp or a block. On chip: the row's exponentials stay in shared memory between the two
// passes, so that each tensor is read once. Streamed: tile by tile, each tensor read twice.
#pragma once

#include "core/cuda/block.cuh"
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
  const Params<A>& p;
  RowThreads<A, P::kThreads>& threads;
  RowMemory<A> memory;
  A* tile;  // [networks][x, e][item][thread]: a thread reads what it wrote itself
  int64_t index;
  unsigned read;  // a bit per network: by a learner, or for its own cross-entropy
  A mass;         // sum of the soft target

  __device__ __forceinline__ A& x(int n, int i) const { return tile[((2 * n) * kItems + i) * P::kThreads + threads.thread]; }
  __device__ __forceinline__ A& e(int n, int i) const { return tile[((2 * n + 1) * kItems + i) * P::kThreads + threads.thread]; }
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

  // The classes past the end load as -inf, like masked ones.
  __device__ __forceinline__ void load(int n, int64_t first, Items& to) const {
    if (!(p.vectors >> n & 1u)) return load_any(n, p.network[n].type, first, -A(kInf), to);
    const S* row = static_cast<const S*>(memory.data(n));
#pragma unroll
    for (int j = 0; j < kItems / kWidth; ++j) {
      const int64_t c = class_of(first, j * kWidth);
      Vec<S, kWidth> part{};
      if (c < p.classes) part = load_vec<S, kWidth>(row + c);
#pragma unroll
      for (int v = 0; v < kWidth; ++v) to[j * kWidth + v] = c < p.classes ? A(load_as(part.v[v])) : -A(kInf);
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

// {z, z at T = 1, sum of (logit - max), weighted by a soft target} of a tile relative to `base`; on chip x and e go to
// shared memory.
template <bool Keep, class S, class A, class P>
__device__ __forceinline__ Numbers<A, 3> exponentials(const Row<S, A, P>& row, int n, int64_t first, A base,
                                                      const A (&logits)[P::kItems]) {
  const Params<A>& p = row.p;
  const bool cross_entropy = p.cross_entropy && n < p.learners;
  Numbers<A, 3> sums{{0, 0, 0}};
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
      if (p.smoothing > 0 && !p.soft.data && row.class_of(first, i) < p.classes) sums.v[2] += above;
    }
  }
  if (cross_entropy && p.soft.data) {
#pragma unroll
    for (int i = 0; i < P::kItems; ++i) sums.v[2] += soft_part(row.soft(i), logits[i] - base);
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

// The same over tiles: the maximum first, then the sums, so that equal networks have equal sums.
template <class S, class A, class P>
__device__ __forceinline__ void stream_network(const Row<S, A, P>& row, int n) {
  A logits[P::kItems], max = -A(kInf);
  for (int64_t first = 0; first < row.p.classes; first += P::kTile) {
    row.load(n, first, logits);
    max = max_item(max, logits);
  }
  max = row.threads.max(max);
  Numbers<A, 3> sums{{0, 0, 0}};
  for (int64_t first = 0; first < row.p.classes; first += P::kTile) {
    row.load(n, first, logits);
    if (row.p.soft.data) row.load_soft(first);
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

// Where the rows lie and their weights, each found once.
template <class S, class A, class P>
__device__ __forceinline__ void find_row(const Row<S, A, P>& row) {
  const Params<A>& p = row.p;
  const int networks = p.networks(), pairs = p.learners * networks;
#pragma unroll 1
  for (int n = row.threads.thread; n <= networks; n += P::kThreads) {
    const Network& network = n < networks ? p.network[n] : p.soft;
    row.memory.data(n) =
        static_cast<const char*>(network.data) + row_offset(network.rows, row.index) * bytes_of(network.type);
  }
#pragma unroll 1
  for (int i = row.threads.thread; i < pairs; i += P::kThreads)
    row.memory.weight(i / networks, i % networks) = p.weight_of(i / networks, i % networks, row.index);
}

// Which networks are read, a bit each: lane n looks for network n.
template <class S, class A, class P>
__device__ __forceinline__ unsigned networks_read(const Row<S, A, P>& row) {
  const Params<A>& p = row.p;
  const int n = row.threads.thread % 32;
  bool any = n < p.learners && p.cross_entropy;
  for (int m = 0; n < p.networks() && m < p.learners; ++m) any = any || row.memory.weight(m, n) != 0;
  for (int k = 0; n < p.learners && k < p.networks(); ++k) any = any || row.memory.weight(n, k) != 0;
  return __ballot_sync(kFullWarp, any);
}

// First pass: the maximum and the sums of every network that is read, and on chip its x and e.
template <class S, class A, class P>
__device__ __forceinline__ void read_networks(const Row<S, A, P>& row) {
  const int networks = row.p.networks();
  int n = row.next_read(0);
  if constexpr (P::kOnChip) {
    A next[P::kItems], now[P::kItems];
    if (n < networks) row.load(n, 0, next);
#pragma unroll 1
    while (n < networks) {
#pragma unroll
      for (int i = 0; i < P::kItems; ++i) now[i] = next[i];
      const int after = row.next_read(n + 1);
      if (after < networks) row.load(after, 0, next);  // in flight during the reductions of this network
      keep_network(row, n, now);
      n = after;
    }
  } else {
#pragma unroll 1
    for (; n < networks; n = row.next_read(n + 1)) stream_network(row, n);
  }
}

// The pulls of all pairs, each computed once.
template <class S, class A, class P>
__device__ __forceinline__ void compute_pulls(const Row<S, A, P>& row) {
  const Params<A>& p = row.p;
  const int networks = p.networks(), pairs = p.learners * networks;
  for (int i = row.threads.thread; i < pairs; i += P::kThreads) {
    const int m = i / networks, n = i % networks;
    const A weight = row.memory.weight(m, n);
    for (int warp = 0; warp < P::kWarps; ++warp) row.memory.sum(warp, m, n) = 0;
    if (weight == 0) continue;
    const Pull<A> one = pull(weight, p.kd_weight * p.scale.grad, row.memory.stat(m, kZ), row.memory.stat(n, kZ));
    row.memory.factor(m, n) = one.factor;
    row.memory.ratio(m, n) = one.ratio;
  }
}

// The power of two that a learner's float16 gradient is stored with.
template <class S, class A, class P>
__device__ __forceinline__ A gradient_scale(const Row<S, A, P>& row, int m) {
  const Params<A>& p = row.p;
  A bound = 0;
  for (int n = 0; n < p.networks(); ++n) bound += magnitude(row.memory.weight(m, n));
  const A mass = row.mass > 1 ? row.mass : A(1);
  return A(half_scale(float(bound * p.scale.grad * magnitude(p.kd_weight) + magnitude(p.ce_weight) * mass)));
}

// The gradient of ce_weight times the cross-entropy, added to a tile's.
template <class S, class A, class P>
__device__ __forceinline__ void add_cross_entropy(const Row<S, A, P>& row, int m, int64_t first, const A (&x)[P::kItems],
                                                  const A (&e)[P::kItems], A (&grad)[P::kItems]) {
  const Params<A>& p = row.p;
  const A t = 1 / p.inv_t;
  if (p.soft.data) {
    const A factor = p.ce_weight * row.mass / row.memory.stat(m, kZOne);
#pragma unroll
    for (int i = 0; i < P::kItems; ++i)
      grad[i] += factor * exponential_at_one(p.integer_t, x[i] * t, e[i]) - p.ce_weight * row.soft(i);
    return;
  }
  const A factor = p.ce_weight / row.memory.stat(m, kZOne), uniform = p.ce_weight * p.smoothing / A(p.classes);
  const int64_t label = p.target[row.index];
#pragma unroll
  for (int i = 0; i < P::kItems; ++i) {
    grad[i] += factor * exponential_at_one(p.integer_t, x[i] * t, e[i]) - uniform;
    if (row.class_of(first, i) == label) grad[i] -= p.ce_weight * (1 - p.smoothing);
  }
}

// Second pass, one tile of learner m: what the others say, four at a time, to the warps' sums and to the gradient.
template <class S, class A, class P>
__device__ __forceinline__ void learn_tile(const Row<S, A, P>& row, int m, int64_t first, A scale) {
  constexpr int kItems = P::kItems, kTogether = 4;
  const Params<A>& p = row.p;
  const int networks = p.networks(), lane = row.threads.thread % 32, warp = row.threads.thread / 32;
  const bool read = row.read >> m & 1u;
  A x_m[kItems], e_m[kItems], grad[kItems];
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    x_m[i] = read ? row.x(m, i) : A(0);
    e_m[i] = read ? row.e(m, i) : A(0);
    grad[i] = 0;
  }
#pragma unroll 1
  for (int from = 0; from < networks; from += kTogether) {
    Numbers<A, kTogether> sums{{0, 0, 0, 0}};
#pragma unroll
    for (int j = 0; j < kTogether; ++j) {
      const int n = from + j;
      if (n >= networks || row.memory.weight(m, n) == 0) continue;
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
  if (p.ce_weight != 0) add_cross_entropy(row, m, first, x_m, e_m, grad);
#pragma unroll
  for (int i = 0; i < kItems; ++i) grad[i] *= scale;
  store_items<kItems, Row<S, A, P>::kWidth>(p.template grad_row<S>(m, row.index), first, p.classes, P::kThreads,
                                               row.threads.thread, p.grad_vectors, grad);
}

// A learner's cross-entropy at weight 1, by one thread.
template <class S, class A, class P>
__device__ __forceinline__ A learner_cross_entropy(const Row<S, A, P>& row, int m) {
  const Params<A>& p = row.p;
  const A z = row.memory.stat(m, kZOne), sum = row.memory.stat(m, kSum);
  if (p.soft.data) return row.mass * natural_log(z) - sum;
  return cross_entropy(z, row.label_logit(m) - row.memory.stat(m, kMax), sum, p.smoothing, p.classes);
}

// The loss of learner m and its terms, by one thread, from the sums of all warps.
template <class S, class A, class P>
__device__ __forceinline__ void store_loss(const Row<S, A, P>& row, int m) {
  const Params<A>& p = row.p;
  const A ce = p.cross_entropy ? learner_cross_entropy(row, m) : A(0);
  A kd = 0;
  for (int n = 0; n < p.networks(); ++n) {
    const A weight = row.memory.weight(m, n);
    if (weight == 0) continue;
    A a = 0;
    for (int warp = 0; warp < P::kWarps; ++warp) a += row.memory.sum(warp, m, n);
    kd += weight * p.scale.loss * divergence(a, row.memory.stat(n, kZ), row.memory.stat(m, kZ));
  }
  const int64_t at = m * p.rows + row.index;
  p.row_loss[at] = weigh(p.kd_weight, kd, p.ce_weight, ce);
  if (!p.row_terms) return;
  p.row_terms[at] = kd;
  p.row_terms[p.learners * p.rows + at] = ce;
}

// A row that counts nowhere, or whose target is out of range.
template <class S, class A, class P>
__device__ __forceinline__ void leave_out(const Row<S, A, P>& row, A nothing) {
  const Params<A>& p = row.p;
  for (int m = row.threads.thread; m < p.learners; m += P::kThreads) {
    p.row_loss[m * p.rows + row.index] = nothing;
    for (int i = 0; p.row_terms && i < 2; ++i) p.row_terms[(i * p.learners + m) * p.rows + row.index] = nothing;
    if (p.half && p.slot[m] >= 0) p.saved[p.slot[m] * p.rows + row.index] = 1;
  }
  A grad[P::kItems];
#pragma unroll
  for (int i = 0; i < P::kItems; ++i) grad[i] = nothing;
  for (int m = 0; m < p.learners; ++m)
    for (int64_t first = 0; p.slot[m] >= 0 && first < p.classes; first += P::kTile)
      store_items<P::kItems, Row<S, A, P>::kWidth>(p.template grad_row<S>(m, row.index), first, p.classes, P::kThreads,
                                                      row.threads.thread, p.grad_vectors, grad);
}

template <class S, class A, class P>
__global__ void __launch_bounds__(P::kBlock, P::kBlocks) mutual_kernel(const __grid_constant__ Params<A> p) {
  using Threads = RowThreads<A, P::kThreads>;
  SIMT_DYNAMIC_SHARED(A, dynamic);
  SIMT_SHARED(A, buffer, 2 * Threads::kWarps * Threads::kMost);
  const int in_block = int(threadIdx.x) / P::kThreads, networks = p.networks();
  const int64_t index = int64_t(blockIdx.x) * P::kRows + in_block;
  if (index >= p.rows) return;  // whole warps: a row of less than a block needs no barrier
  Threads threads{int(threadIdx.x) % P::kThreads, 0, buffer};
  A* const start = dynamic + in_block * P::template numbers<A>(p.learners, networks, p.soft.data);
  const RowMemory<A> memory{start, p.learners, networks, P::kWarps};
  A* const tile = start + RowMemory<A>::numbers(p.learners, networks, P::kWarps);
  Row<S, A, P> row{p, threads, memory, tile, index, 0, A(0)};
  const Label kind = label_kind(p.target, index, p.ignore_index, p.classes);
  if (kind == Label::ignored || kind == Label::outside)
    return leave_out(row, kind == Label::ignored ? A(0) : A(__builtin_nanf("")));

  find_row(row);
  row.sync();  // the weights
  row.read = networks_read(row);
  if (p.soft.data) row.mass = soft_mass(row);
  read_networks(row);
  row.sync();  // the statistics
  compute_pulls(row);
  row.sync();
  for (int64_t first = 0; first < p.classes; first += P::kTile) {
    if constexpr (!P::kOnChip) {
      if (p.soft.data) row.load_soft(first);
#pragma unroll 1
      for (int n = row.next_read(0); n < networks; n = row.next_read(n + 1)) {
        A logits[P::kItems];
        row.load(n, first, logits);
        exponentials<true>(row, n, first, row.memory.stat(n, kMax), logits);
      }
    }
#pragma unroll 1
    for (int m = 0; m < p.learners; ++m) {
      const A scale = p.half && p.slot[m] >= 0 ? gradient_scale(row, m) : A(1);
      if (p.half && p.slot[m] >= 0 && threads.thread == 0) p.saved[p.slot[m] * p.rows + index] = 1 / scale;
      learn_tile(row, m, first, scale);
    }
  }
  row.sync();  // the sums
#pragma unroll 1
  for (int m = threads.thread; m < p.learners; m += P::kThreads) store_loss(row, m);
}

}  // namespace FASTKD_TARGET
}  // namespace fastkd::mutual
