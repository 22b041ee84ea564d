// One row of all networks by a warp or a block. On chip: the row's exponentials stay in shared memory between the two
// passes, so that each tensor is read once. Streamed: tile by tile, each tensor read twice.
#pragma once

#include "mutual/row.cuh"

namespace fastkd::mutual {
inline namespace FASTKD_TARGET {

// Where the rows lie and their weights, each found once.
template <class S, class A, class P>
__device__ __forceinline__ void find_row(const Row<S, A, P>& row) {
  const Params<A>& p = row.p;
  const int networks = p.networks(), pairs = p.learners * networks;
#pragma unroll 1
  for (int n = row.threads.thread; n <= networks; n += P::kThreads) {
    const Network& network = n < networks ? p.network[n] : p.soft;
    row.memory.data(n) = static_cast<const char*>(network.data) + row_offset(network.rows, row.index) * bytes_of(network.type);
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
    A now[P::kItems];
    typename Row<S, A, P>::Held next;
    if (n < networks) row.ask(n, 0, next);
#pragma unroll 1
    while (n < networks) {
      row.take(n, 0, next, now);
      const int after = row.next_read(n + 1);
      if (after < networks) row.ask(after, 0, next);  // in flight during the reductions of this network
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
  typename Row<S, A, P>::Held next;
  const int lead = row.next_read(0);
  if (!P::kOnChip && lead < networks) row.ask(lead, 0, next);
#pragma unroll 1
  for (int64_t first = 0; first < p.classes; first += P::kTile) {
    if constexpr (!P::kOnChip) {
      if (p.soft.data) row.load_soft(first);
#pragma unroll 1
      for (int n = lead; n < networks; n = row.next_read(n + 1)) {
        A logits[P::kItems];
        row.take(n, first, next, logits);
        const int after = row.next_read(n + 1);
        if (after < networks)
          row.ask(after, first, next);
        else if (first + P::kTile < p.classes)
          row.ask(lead, first + P::kTile, next);  // in flight while the learners learn
        exponentials<true>(row, n, first, row.memory.stat(n, kMax), logits);
      }
    }
#pragma unroll 1
    for (int m = 0; m < p.learners; ++m) {
      const A scale = p.half && p.slot[m] >= 0 ? gradient_scale(row, m) : p.factor.value();
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
