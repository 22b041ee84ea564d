// What the CUDA kernels of mutual receive, by value, and how a row lies in shared memory.
#pragma once

#include "core/cuda/vec.cuh"
#include "mutual/math.h"

namespace fastkd::mutual {
inline namespace FASTKD_TARGET {

template <class A>
struct Params {
  int64_t rows, classes;
  int learners, teachers;
  Network network[kMaxLaunchNetworks];
  unsigned vectors;  // a bit per network: its rows are of the learners' dtype and allow vector accesses
  bool grad_vectors;
  unsigned words;  // of a row of halves for vector_kernel that lies on borders of 4 bytes alone; 0 of whole vectors
  const int64_t* target;
  int64_t ignore_index;
  Network soft;  // without data: labels

  const A *peers, *frozen;  // null: host_weight
  int64_t peer_stride[3], frozen_stride[3];  // learner, network, row
  A host_weight[kMaxLaunchLearners * kMaxLaunchNetworks];
  A inv_t, kd_weight, ce_weight, smoothing;
  Scale<A> scale;
  int integer_t;  // 0 where the temperature is no small integer
  bool cross_entropy, half;
  int slot[kMaxLaunchLearners];

  StoredFactor<A> factor;  // of the stored gradients
  A *row_loss, *row_terms, *saved;
  void* grad;

  FASTKD_HD int networks() const { return learners + teachers; }
  // 0 on the diagonal, and everywhere without a kd_weight.
  FASTKD_HD A weight_of(int m, int n, int64_t row) const {
    if (m == n || kd_weight == 0) return 0;
    const A* device = n < learners ? peers : frozen;
    if (!device) return host_weight[m * networks() + n];
    const int64_t* stride = n < learners ? peer_stride : frozen_stride;
    return device[m * stride[0] + (n < learners ? n : n - learners) * stride[1] + row * stride[2]];
  }
  template <class S>
  FASTKD_HD S* grad_row(int m, int64_t row) const {
    return static_cast<S*>(grad) + (slot[m] * rows + row) * classes;
  }
};

// Of one network in one row.
enum Stat { kMax, kZ, kZOne, kSum, kStats };

// A row's numbers in shared memory: where each network's row and the soft target's lie, each network's statistics, the
// pulls between them, the sums `a` of each warp.
template <class A>
struct RowMemory {
  static constexpr int kPointer = int(sizeof(const void*) / sizeof(A));
  A* start;  // aligned to a pointer
  int learners, networks, warps;

  static FASTKD_HD int64_t numbers(int learners, int networks, int warps) {
    const int64_t all = kPointer * (networks + 1) + kStats * networks + int64_t(3 + warps) * learners * networks;
    return (all + 1) / 2 * 2;
  }
  __device__ const void*& data(int n) const { return reinterpret_cast<const void**>(start)[n]; }
  __device__ A* stats() const { return start + kPointer * (networks + 1); }
  __device__ A* pairs() const { return stats() + kStats * networks; }
  __device__ A& stat(int n, int which) const { return stats()[n * kStats + which]; }
  __device__ A& weight(int m, int n) const { return pairs()[(m * networks + n) * 3]; }
  __device__ A& factor(int m, int n) const { return pairs()[(m * networks + n) * 3 + 1]; }
  __device__ A& ratio(int m, int n) const { return pairs()[(m * networks + n) * 3 + 2]; }
  __device__ A& sum(int warp, int m, int n) const { return pairs()[(3 * learners + warp * learners + m) * networks + n]; }
};

// Whether a network of the learners' dtype S may be read in vectors.
template <class S, int Width>
bool vectors_of(const Network& network, DType type, int64_t classes) {
  for (int d = 0; d < network.rows.dims; ++d)
    if (!rows_aligned<Width>(network.data, network.rows.stride[d], classes, sizeof(S))) return false;
  return network.type == type;
}

template <class S, int Width, class A>
Params<A> make_params(const Args& args) {
  Params<A> p{};
  p.rows = args.rows;
  p.classes = args.classes;
  p.learners = args.learners;
  p.teachers = args.teachers;
  p.grad_vectors = rows_aligned<Width>(args.grad, args.classes, args.classes, sizeof(S));
  for (int n = 0; n < p.networks(); ++n) {
    p.network[n] = args.networks[n];
    p.vectors |= unsigned(vectors_of<S, Width>(args.networks[n], args.type, args.classes)) << n;
  }
  if (args.soft && args.cross_entropy) p.soft = *args.soft;
  const Weights* weights[2] = {&args.peers, &args.frozen};
  p.peers = static_cast<const A*>(args.peers.data);
  p.frozen = static_cast<const A*>(args.frozen.data);
  for (int i = 0; i < 2; ++i) {
    int64_t* stride = i == 0 ? p.peer_stride : p.frozen_stride;
    stride[0] = weights[i]->stride_learner;
    stride[1] = weights[i]->stride_network;
    stride[2] = weights[i]->stride_row;
  }
  for (int m = 0; m < args.learners; ++m) {
    p.slot[m] = args.slot[m];
    for (int n = 0; n < p.networks(); ++n) {
      const Weights& w = n < args.learners ? args.peers : args.frozen;
      if (w.host)
        p.host_weight[m * p.networks() + n] = fastkd::mutual::weight_of<A>(w, m, n < args.learners ? n : n - args.learners, 0);
    }
  }
  p.target = args.target;
  p.ignore_index = args.ignore_index;
  p.inv_t = A(1 / args.temperature);
  p.scale = temperature_scale<A>(args.temperature, args.scale_by_t2);
  p.integer_t = integer_temperature(args.temperature);
  p.kd_weight = A(args.kd_weight);
  p.ce_weight = A(args.ce_weight);
  p.cross_entropy = args.cross_entropy;
  p.smoothing = A(args.label_smoothing);
  p.half = args.type == DType::f16;
  p.factor = stored_factor<A>(args);
  p.row_loss = static_cast<A*>(args.row_loss);
  p.row_terms = static_cast<A*>(args.row_terms);
  p.saved = static_cast<A*>(args.saved);
  p.grad = args.grad;
  return p;
}

}  // namespace FASTKD_TARGET
}  // namespace fastkd::mutual
