// A row of few networks in vectors of 16 bytes: up to four in the learners' dtype, float or shorter, on 16-byte borders, or
// up to three of halves on 4-byte borders in four loads a vector; labels that are classes, without smoothing. kernel.cuh takes everything else.
#pragma once

#include "core/cuda/block.cuh"
#include "core/cuda/exponents.cuh"
#include "core/cuda/vectors.cuh"
#include "mutual/launch.cuh"

namespace fastkd::mutual {
inline namespace FASTKD_TARGET {

// Those of a row, the last of which may have words past its end.
template <class S>
FASTKD_HD int64_t row_vectors(int64_t classes) {
  return (classes + kRawItems<S> - 1) / kRawItems<S>;
}

// The threads of a block, by the row's length. At most one block of a multiprocessor's registers: the rows under way stay in the
// L2 cache for their second reading.
constexpr int kVectorThreads = 512, kVectorNetworks = 4;

// At least four vectors of a thread where that leaves a warp: what a row costs beside its vectors is paid by each.
inline int vector_block(int64_t vectors) {
  int threads = kVectorThreads;
  while (threads > 32 && 4 * int64_t(threads) > vectors) threads /= 2;
  return threads;
}

// The threads of a block whose size is the launch's, a power of two from a warp on; else as RowThreads.
struct BlockThreads {
  static constexpr int kMost = kVectorNetworks, kNumbers = 2 * kVectorThreads / 32 * kMost;
  int thread, parity;
  float* buffer;  // shared, kNumbers

  template <int N, class Merge>
  __device__ __forceinline__ Numbers<float, N> reduce(Numbers<float, N> x, const Merge& merge) {
    static_assert(N <= kMost);
    x = reduce_warp(x, merge);
    const int warps = int(blockDim.x) / 32;
    if (warps == 1) return x;
    float* part = buffer + parity * (kNumbers / 2);
    parity ^= 1;
    if (thread % 32 == 0) {
#pragma unroll
      for (int i = 0; i < N; ++i) part[thread / 32 * kMost + i] = x.v[i];
    }
    __syncthreads();
    const int lane = thread % 32 & (warps - 1);
#pragma unroll
    for (int i = 0; i < N; ++i) x.v[i] = part[lane * kMost + i];
#pragma unroll 1
    for (int mask = warps / 2; mask > 0; mask /= 2) x = merge(x, shuffle_xor(x, mask));
    return x;
  }
  template <int N>
  __device__ __forceinline__ Numbers<float, N> max(const Numbers<float, N>& x) {
    return reduce(x, [](const Numbers<float, N>& a, const Numbers<float, N>& b) {
      Numbers<float, N> c;
#pragma unroll
      for (int i = 0; i < N; ++i) c.v[i] = a.v[i] < b.v[i] ? b.v[i] : a.v[i];
      return c;
    });
  }
  template <int N>
  __device__ __forceinline__ Numbers<float, N> sum(const Numbers<float, N>& x) {
    return reduce(x, [](const Numbers<float, N>& a, const Numbers<float, N>& b) {
      Numbers<float, N> c;
#pragma unroll
      for (int i = 0; i < N; ++i) c.v[i] = a.v[i] + b.v[i];
      return c;
    });
  }
};

template <int M>
struct Vectors {
  uint4 of[M];
};

// What the threads of a row share.
template <int M>
struct RowShared {
  const void* from[M];  // the row of each network; of one that nobody reads, another's
  float weight[M][M];
  float factor[M][M], ratio[M][M];  // of math.h, with the stored gradient's scale
  float label_factor[M], sharp[M];  // of exp(z - max) and of the label
  unsigned pairs;  // a bit m * M + n where m learns from n
};

// Whether rows may lie on borders of 4 bytes: of halves, for of 100 classes they do. Of float the code would be a twelfth more;
// four networks leave no registers for it.
template <class S, int M>
constexpr bool kNarrow = sizeof(S) == 2 && M < kVectorNetworks;

template <class S, int M>
__device__ __forceinline__ bool whole_vectors(const Params<float>& p) {
  return !kNarrow<S, M> || p.words == 0;
}

// -inf in both halves of a word: what lies past a row's end is like masked classes.
template <class S>
constexpr uint32_t kMaskedWord = is_half<S> ? 0xfc00fc00u : 0xff80ff80u;

template <class S, int M>
__device__ __forceinline__ Vectors<M> load_vectors(const Params<float>& p, const RowShared<M>& row, unsigned vector) {
  Vectors<M> loaded;
  if (whole_vectors<S, M>(p)) {
#pragma unroll
    for (int n = 0; n < M; ++n) loaded.of[n] = load_raw(row.from[n], vector);
  } else {
#pragma unroll
    for (int n = 0; n < M; ++n) loaded.of[n] = load_words(row.from[n], vector, p.words, kMaskedWord<S>);
  }
  return loaded;
}

// Calls f(vector, its contents) for this thread's vectors of `range`, with `Ahead` the next one's loads in flight meanwhile.
template <class S, bool Ahead, int M, class F>
__device__ __forceinline__ void over_vectors(const Params<float>& p, const RowShared<M>& row, const Range& range, const F& f) {
  run_vectors<0, Ahead>(range.begin, range.end, [&](unsigned vector) { return load_vectors<S>(p, row, vector); }, f);
}

// sum e_n (z_n - z_m) at T = 1 of each pair, in this thread.
template <int M>
struct PairSums {
  float a[M][M];
};

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
template <AtOne One, int M>
__device__ __forceinline__ void gather(NetworkSums<M>& sums, const Exponents& c, BlockThreads& threads) {
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
