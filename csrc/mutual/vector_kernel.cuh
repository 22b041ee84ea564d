// The kernel of rows in vectors: a block takes a row, or where rows are few a part of one (split.cuh), reads it for the sums, and
// again, from the L2 cache, for the divergences and the gradients.
#pragma once

#include "mutual/split.cuh"

namespace fastkd::mutual {
inline namespace FASTKD_TARGET {

// Four classes of all networks: z relative to the base, exp(z / T).
template <int M>
struct Classes {
  float x[M][4], e[M][4];
};

template <class S>
__device__ __forceinline__ void unpack_four(const uint4& bits, int group, float (&to)[4]) {
  if constexpr (sizeof(S) == 4) {
    unpack<S>(bits, to);
  } else {
    const auto words = __builtin_bit_cast(RawArray<uint32_t, uint4>, bits);
    unpack_pair(words.v[2 * group], S{}, to[0], to[1]);
    unpack_pair(words.v[2 * group + 1], S{}, to[2], to[3]);
  }
}

template <class S, int M>
__device__ __forceinline__ Classes<M> classes_of(const Vectors<M>& now, int group, const Exponents& c, const float (&base)[M]) {
  Classes<M> four;
#pragma unroll
  for (int n = 0; n < M; ++n) {
    unpack_four<S>(now.of[n], group, four.x[n]);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      four.x[n][i] -= base[n];
      four.e[n][i] = exp2_approximate(four.x[n][i] * c.scale);
    }
  }
  return four;
}

// e_n (z_n - z_m), summed, where a network has masked classes: one of n counts 0, one of m alone makes the sum infinite.
template <int M>
__device__ __forceinline__ float masked_gaps(const Classes<M>& four, int m, int n, const Exponents& c, float a) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float gap = four.x[n][i] - four.x[m][i];
    if (!(four.x[n][i] * c.scale < kNothing)) a += four.e[n][i] * gap;
    if (gap == kInf) a = kInf;
  }
  return a;
}

// What network n says to learner m.
template <int M>
__device__ __forceinline__ void learn(const RowShared<M>& row, const Classes<M>& four, int m, int n, const Exponents& c,
                                      bool masked, float& a, float (&grad)[4]) {
  const float factor = row.factor[m][n], ratio = row.ratio[m][n];
  if (masked) {  // the whole block
    a = masked_gaps(four, m, n, c, a);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) a += four.e[n][i] * (four.x[n][i] - four.x[m][i]);
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) grad[i] += factor * (four.e[m][i] - ratio * four.e[n][i]);
}

// One vector of all networks: the sums of the pairs, and the gradients to `packed`.
template <class S, AtOne One, int M>
__device__ __forceinline__ void learn_vector(const Params<float>& p, const RowShared<M>& row, const Exponents& c,
                                             const float (&base)[M], bool masked, int label, const Vectors<M>& now,
                                             PairSums<M>& sums, uint32_t (&packed)[M][4]) {
  constexpr int kGroups = kRawItems<S> / 4, kWords = 4 / kGroups;
#pragma unroll
  for (int group = 0; group < kGroups; ++group) {
    const Classes<M> four = classes_of<S>(now, group, c, base);
#pragma unroll
    for (int m = 0; m < M; ++m) {
      if (m >= p.learners) break;
      float grad[4] = {0, 0, 0, 0};
      if (p.ce_weight != 0) {
#pragma unroll
        for (int i = 0; i < 4; ++i) grad[i] = row.label_factor[m] * at_one<One>(c, four.x[m][i], four.e[m][i]);
      }
#pragma unroll
      for (int n = 0; n < M; ++n)
        if (row.pairs >> (m * M + n) & 1u) learn(row, four, m, n, c, masked, sums.a[m][n], grad);
      const int at = label - 4 * group;
      if (at >= 0 && at < 4) {
#pragma unroll
        for (int i = 0; i < 4; ++i) grad[i] -= i == at ? row.sharp[m] : 0.f;
      }
#pragma unroll
      for (int w = 0; w < kWords; ++w) {
        if constexpr (sizeof(S) == 4)
          packed[m][w] = float_to_bits(grad[w]);
        else
          packed[m][group * kWords + w] = pack_pair<S>(grad[2 * w], grad[2 * w + 1]);
      }
    }
  }
}

// Thread m: the weights, rows and scales of network m.
template <class S, int M>
__device__ __forceinline__ void find_network(const Params<float>& p, int64_t index, int m, RowShared<M>& row) {
  bool read = m < p.learners && p.cross_entropy;
#pragma unroll
  for (int n = 0; n < M; ++n) {
    const bool given = m < p.learners;
    row.weight[m][n] = given ? p.weight_of(m, n, index) : 0.f;
    read = read || row.weight[m][n] != 0 || (n < p.learners && p.weight_of(n, m, index) != 0);
  }
  row.from[m] = read ? row_in_memory<S>(p.network[m], index) : nullptr;
}

// Who learns from whom. A network that nobody reads repeats another, whose cached vectors cost no traffic.
template <int M>
__device__ __forceinline__ void find_pairs(RowShared<M>& row) {
  unsigned pairs = 0;
  const void* some = nullptr;
  for (int i = 0; i < M * M; ++i) pairs |= unsigned(row.weight[i / M][i % M] != 0) << i;
  for (int n = 0; n < M; ++n) some = row.from[n] ? row.from[n] : some;
  for (int n = 0; n < M; ++n) row.from[n] = row.from[n] ? row.from[n] : some;
  row.pairs = pairs;
}

// What the gradient of learner m is made of, from the sums.
template <int M>
__device__ __forceinline__ void find_factors(const Params<float>& p, int64_t index, int m, const NetworkSums<M>& sums,
                                             bool saves, RowShared<M>& row) {
  float bound = 0, scale = p.factor.value(), z_m = 1, z_one = 1;
#pragma unroll
  for (int n = 0; n < M; ++n) {
    bound += magnitude(row.weight[m][n]);
    z_m = n == m ? sums.z[n] : z_m;
    z_one = n == m ? sums.z_one[n] : z_one;
  }
  if (p.half && p.slot[m] >= 0) {
    scale = half_scale(bound * p.scale.grad * magnitude(p.kd_weight) + magnitude(p.ce_weight));
    if (saves) p.saved[p.slot[m] * p.rows + index] = 1 / scale;
  }
#pragma unroll
  for (int n = 0; n < M; ++n) {
    const Pull<float> one = pull(row.weight[m][n], p.kd_weight * p.scale.grad * scale, z_m, sums.z[n]);
    row.factor[m][n] = one.factor;
    row.ratio[m][n] = one.ratio;
  }
  row.label_factor[m] = p.ce_weight != 0 ? p.ce_weight * scale / z_one : 0.f;
  row.sharp[m] = p.ce_weight != 0 ? p.ce_weight * scale : 0.f;
}

// Thread m: the loss of learner m and its terms.
template <class S, int M>
__device__ __forceinline__ void store_learner(const Params<float>& p, int64_t index, int m, const NetworkSums<M>& sums,
                                              const RowShared<M>& row, const PairSums<M>& pairs) {
  float kd = 0, ce = 0, z = 1, z_one = 1, max = 0, a[M] = {};
#pragma unroll
  for (int i = 0; i < M; ++i) {  // registers have no index
    z = i == m ? sums.z[i] : z;
    z_one = i == m ? sums.z_one[i] : z_one;
    max = i == m ? sums.max[i] : max;
#pragma unroll
    for (int n = 0; n < M; ++n) a[n] = i == m ? pairs.a[i][n] : a[n];
  }
#pragma unroll
  for (int n = 0; n < M; ++n) {
    if (row.pairs >> (m * M + n) & 1u) kd += row.weight[m][n] * p.scale.loss * divergence(a[n] * p.inv_t, sums.z[n], z);
  }
  if (p.cross_entropy) {
    const float label = load_as(static_cast<const S*>(row.from[m])[p.target[index]]);
    ce = cross_entropy(z_one, label - base_of(max), 0.f, 0.f, p.classes);
  }
  const int64_t at = m * p.rows + index;
  p.row_loss[at] = weigh(p.kd_weight, kd, p.ce_weight, ce);
  if (!p.row_terms) return;
  p.row_terms[at] = kd;
  p.row_terms[p.learners * p.rows + at] = ce;
}

// A row without a loss: 0, or NaN for a label out of range. Every part its gradients, the first one the losses.
template <class S, int M>
__device__ __forceinline__ void leave_out_vectors(const Params<float>& p, int64_t index, const Split& split, const Range& range,
                                                  bool first, float nothing) {
  if (split.step == Step::sums || split.step == Step::losses) return;
  const int64_t begin = int64_t(range.begin) * kRawItems<S>, past = int64_t(range.end) * kRawItems<S>;
  const int64_t end = past < p.classes ? past : p.classes;
  for (int m = 0; m < p.learners; ++m) {
    if (first && threadIdx.x == 0) {
      p.row_loss[m * p.rows + index] = nothing;
      for (int i = 0; p.row_terms && i < 2; ++i) p.row_terms[(i * p.learners + m) * p.rows + index] = nothing;
      if (p.half && p.slot[m] >= 0) p.saved[p.slot[m] * p.rows + index] = 1;
    }
    if (p.slot[m] < 0) continue;
    S* const grad = p.template grad_row<S>(m, index);
    if (whole_vectors<S, M>(p))
      fill_vectors<0>(grad, range.begin, range.end, nothing);
    else
      for (int64_t c = begin + threadIdx.x; c < end; c += blockDim.x) store_as(grad[c], nothing);
  }
}

// Four pairs' sums at a time over all threads.
template <int M>
__device__ __forceinline__ void sum_pairs(PairSums<M>& sums, BlockThreads& threads) {
#pragma unroll
  for (int m = 0; m < M; ++m) {
    Numbers<float, M> of;
#pragma unroll
    for (int n = 0; n < M; ++n) of.v[n] = sums.a[m][n];
    of = threads.sum(of);
#pragma unroll
    for (int n = 0; n < M; ++n) sums.a[m][n] = of.v[n];
  }
}

template <class S, int M, AtOne One>
__global__ void __launch_bounds__(kVectorThreads, 1)
    vector_kernel(const __grid_constant__ Params<float> p, const __grid_constant__ Split split) {
  using Shared = RowShared<M>;
  SIMT_SHARED(float, buffer, BlockThreads::kNumbers);
  SIMT_SHARED(Shared, shared, 1);
  BlockThreads threads{int(threadIdx.x), 0, buffer};
  Shared& row = shared[0];
  const bool rows = split.step == Step::losses;  // a block each
  const int64_t index = rows ? blockIdx.x : blockIdx.x / split.parts;
  const unsigned part = rows ? 0 : blockIdx.x % split.parts;
  const Range range = part_of_row(unsigned(row_vectors<S>(p.classes)), part, split.parts);
  const Label kind = label_kind(p.target, index, p.ignore_index, p.classes);
  if (kind == Label::ignored || kind == Label::outside)
    return leave_out_vectors<S, M>(p, index, split, range, part == 0, kind == Label::ignored ? 0.f : __builtin_nanf(""));
  if (threadIdx.x < M) find_network<S>(p, index, int(threadIdx.x), row);
  __syncthreads();
  if (threadIdx.x == 0) find_pairs(row);
  __syncthreads();
  if (!row.from[0]) return leave_out_vectors<S, M>(p, index, split, range, part == 0, 0.f);  // nobody reads anything
  const Exponents c = make_exponents(p.inv_t, p.integer_t);
  constexpr int kNumbers = kPartNumbers<M>;
  NetworkSums<M> sums;
  if (split.step == Step::whole || split.step == Step::sums)
    over_vectors<S, true>(p, row, range, [&](unsigned, const Vectors<M>& now) { push_vectors<S, One>(sums, c, now); });
  else if (threadIdx.x < split.parts)  // at most a warp of them
    load_part(split.numbers(index, threadIdx.x, kNumbers), sums);
  gather<One>(sums, c, threads);
  if (split.step == Step::sums) {
    if (threadIdx.x == 0) store_part(sums, split.numbers(index, part, kNumbers));
    return;
  }
  if (int(threadIdx.x) < p.learners) find_factors(p, index, int(threadIdx.x), sums, part == 0, row);
  __syncthreads();
  float base[M];
  bool masked = false;
#pragma unroll
  for (int n = 0; n < M; ++n) {
    base[n] = base_of(sums.max[n]);
    masked = masked || !(sums.least[n] - base[n] > -0x1p100f);  // else every difference is finite
  }
  PairSums<M> pairs{};
  const int64_t label = p.ce_weight != 0 ? p.target[index] : -1;
  const Range learnt = rows ? Range{0, 0} : range;
  // Of four networks there are no registers for a next vector.
  over_vectors<S, (M < 4)>(p, row, learnt, [&](unsigned vector, const Vectors<M>& now) {
    uint32_t packed[M][4];
    const int64_t at = label - int64_t(vector) * kRawItems<S>;
    learn_vector<S, One>(p, row, c, base, masked, at >= 0 && at < kRawItems<S> ? int(at) : -1, now, pairs, packed);
#pragma unroll
    for (int m = 0; m < M; ++m) {
      if (m >= p.learners || p.slot[m] < 0) continue;
      const uint4 bits{packed[m][0], packed[m][1], packed[m][2], packed[m][3]};
      if (whole_vectors<S, M>(p))
        store_raw(p.template grad_row<S>(m, index), vector, bits);
      else
        store_words(p.template grad_row<S>(m, index), vector, p.words, bits);
    }
  });
  if (rows && threadIdx.x < split.parts) load_part(split.numbers(index, threadIdx.x, kNumbers), pairs);
  sum_pairs(pairs, threads);
  if (split.step == Step::learn) {
    if (threadIdx.x == 0) store_part(pairs, split.numbers(index, part, kNumbers));
    return;
  }
  if (int(threadIdx.x) < p.learners) store_learner<S>(p, index, int(threadIdx.x), sums, row, pairs);
}

}  // namespace FASTKD_TARGET
}  // namespace fastkd::mutual
