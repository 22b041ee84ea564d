// A long row of few networks in whole vectors: up to four in the learners' dtype, float or shorter, on 16-byte borders; labels
// that are classes, without smoothing. kernel.cuh takes everything else.
#pragma once

#include "core/cuda/block.cuh"
#include "core/cuda/exponents.cuh"
#include "core/cuda/vectors.cuh"
#include "mutual/launch.cuh"

namespace fastkd::mutual {
inline namespace FASTKD_TARGET {

// One block of a multiprocessor: the rows under way stay in the L2 cache for their second reading.
constexpr int kVectorThreads = 512, kVectorNetworks = 4;

template <int M>
struct Vectors {
  uint4 of[M];
};

// What the threads of a row share.
template <int M>
struct RowShared {
  const void* from[M];             // the row of each network; of one that nobody reads, another's
  float weight[M][M];
  float factor[M][M], ratio[M][M];  // of math.h, with the stored gradient's scale
  float label_factor[M], sharp[M];  // of exp(z - max) and of the label
  unsigned pairs;                   // a bit m * M + n where m learns from n
};

template <int M>
__device__ __forceinline__ Vectors<M> load_vectors(const RowShared<M>& row, unsigned vector) {
  Vectors<M> loaded;
#pragma unroll
  for (int n = 0; n < M; ++n) loaded.of[n] = load_raw(row.from[n], vector);
  return loaded;
}

// Calls f(vector, its contents) for this thread's vectors, with `Ahead` the next one's loads in flight meanwhile.
template <bool Ahead, int M, class F>
__device__ __forceinline__ void over_vectors(const RowShared<M>& row, unsigned vectors, const F& f) {
  run_vectors<kVectorThreads, Ahead>(0, vectors, [&](unsigned vector) { return load_vectors(row, vector); }, f);
}

// A thread's sums of each network relative to its maximum so far, and its least logit.
template <int M>
struct NetworkSums {
  float max[M], least[M], z[M], z_one[M];

  __device__ NetworkSums() {
#pragma unroll
    for (int n = 0; n < M; ++n) {
      max[n] = -kInf;
      least[n] = kInf;
      z[n] = z_one[n] = 0;
    }
  }
};

template <AtOne One, int M>
__device__ __forceinline__ void rebase(NetworkSums<M>& sums, int n, const Exponents& c, float new_max) {
  const float growth = base_of(new_max) - base_of(sums.max[n]);
  if (growth != 0) {
    const float down = -fmaxf(growth, 0.f);  // from the base 0 of a masked part the sums are 0
    const float factor = exp2_approximate(down * c.scale);
    sums.z[n] = rounded_product(sums.z[n], factor);
    sums.z_one[n] *= at_one<One>(c, down, factor);
  }
  sums.max[n] = new_max;
}

template <class S, AtOne One, int M>
__device__ __forceinline__ void push_vectors(NetworkSums<M>& sums, const Exponents& c, const Vectors<M>& now) {
#pragma unroll
  for (int n = 0; n < M; ++n) {
    float x[kRawItems<S>];
    unpack<S>(now.of[n], x);
    rebase<One>(sums, n, c, largest(sums.max[n], x));
    const float base = base_of(sums.max[n]);
#pragma unroll
    for (int i = 0; i < kRawItems<S>; ++i) {
      sums.least[n] = fminf(sums.least[n], x[i]);
      const float above = x[i] - base, e = exp2_approximate(above * c.scale);
      sums.z[n] += e;
      if constexpr (One != AtOne::same) sums.z_one[n] += at_one<One>(c, above, e);
    }
  }
}

// All threads' sums together, in every thread.
template <AtOne One, int M, class Threads>
__device__ __forceinline__ void gather(NetworkSums<M>& sums, const Exponents& c, Threads& threads) {
  Numbers<float, M> max, least, z, z_one;
#pragma unroll
  for (int n = 0; n < M; ++n) {
    max.v[n] = sums.max[n];
    least.v[n] = -sums.least[n];
  }
  max = threads.max(max);
  least = threads.max(least);
#pragma unroll
  for (int n = 0; n < M; ++n) {
    rebase<One>(sums, n, c, max.v[n]);
    z.v[n] = sums.z[n];
    z_one.v[n] = sums.z_one[n];
  }
  z = threads.sum(z);
  if constexpr (One != AtOne::same) z_one = threads.sum(z_one);
#pragma unroll
  for (int n = 0; n < M; ++n) {
    sums.least[n] = -least.v[n];
    sums.z[n] = z.v[n];
    sums.z_one[n] = One == AtOne::same ? z.v[n] : z_one.v[n];
  }
}

}  // namespace FASTKD_TARGET
}  // namespace fastkd::mutual
