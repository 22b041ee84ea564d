// The statistics of a long row in whole vectors: of float or shorter, on 16-byte borders, labels that are classes. row.cuh takes
// everything else.
#pragma once

#include "core/cuda/exponents.cuh"
#include "core/cuda/raw.cuh"
#include "group_stats/row.cuh"

namespace fastkd::group_stats {
inline namespace FASTKD_TARGET {

constexpr int kLongThreads = 256;

// A vector of masked classes.
template <class T>
__device__ __forceinline__ uint4 masked_vector() {
  float all[kRawItems<T>];
#pragma unroll
  for (int i = 0; i < kRawItems<T>; ++i) all[i] = -kInf;
  return pack<T>(all);
}

// As push_top(), in minima and maxima alone, which leave out NaN; the sums show it.
__device__ __forceinline__ void push_number(Numbers<float, 2>& top, float value) {
  top.v[1] = fmaxf(top.v[1], fminf(value, top.v[0]));
  top.v[0] = fmaxf(top.v[0], value);
}

// Two vectors, kLongThreads apart, whose first class is `first`, go to a thread's part of the row.
template <class T, class Part>
__device__ __forceinline__ void push_vectors(Part& part, const uint4 (&bits)[2], int first) {
  constexpr int kItems = kRawItems<T>;
  float logits[2][kItems];
  const float before = part.top.v[0];
  float most = -kInf;
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    unpack<T>(bits[j], logits[j]);
    most = largest(most, logits[j]);
#pragma unroll
    for (int i = 0; i < kItems; ++i) push_number(part.top, logits[j][i]);
  }
  if (part.top.v[0] > before) part.rebase(before - part.top.v[0]);
  // Ranks need the few classes that are not below the label: a maximum tells where they are.
  if (most >= part.label.logit) {
    const int earlier = int(part.label.index) - first;
#pragma unroll
    for (int j = 0; j < 2; ++j)
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        part.counts.v[0] += logits[j][i] > part.label.logit ? 1 : 0;
        part.counts.v[1] += logits[j][i] == part.label.logit && j * kLongThreads * kItems + i < earlier ? 1 : 0;
      }
  }
  const float base = part.top.v[0] == -kInf ? 0.f : part.top.v[0];
#pragma unroll
  for (int j = 0; j < 2; ++j)
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const float x = logits[j][i] - base, e = exp2_approximate(x * kLog2E);
      part.sums.v[0] += e;
      part.sums.v[1] += e * fmaxf(x, kLowestExponent<float>);  // 0 times what is masked; NaN has an e that shows it
    }
}

// Blocks are rows times networks. Two vectors of a thread are on their way while two are summed.
template <class T>
__global__ void __launch_bounds__(kLongThreads, 5) long_row_kernel(const __grid_constant__ Params p) {
  using Threads = RowThreads<float, kLongThreads>;
  SIMT_SHARED(float, buffer, 2 * Threads::kWarps * Threads::kMost);
  SIMT_SHARED(int, counters_buffer, 2 * Threads::kWarps * Threads::kMost);
  Threads threads{int(threadIdx.x), 0, buffer};
  RowThreads<int, kLongThreads> counters{threads.thread, 0, counters_buffer};
  const int slot = int(blockIdx.y);
  const int64_t r = blockIdx.x;
  const T* row = row_in_memory<T>(p.network[slot], r);
  RowPart<float, kRawItems<T>, kLongThreads> part{label_of<T, float>(p.target, r, p.ignore_index, p.classes, row),
                                                  threads.thread};
  const unsigned vectors = unsigned(p.classes) / kRawItems<T>;  // classes are fewer than 2^31
  const uint4 masked = masked_vector<T>();
  const auto load = [&](unsigned vector) { return vector < vectors ? load_raw(row, vector) : masked; };
  uint4 next[2] = {load(threadIdx.x), load(threadIdx.x + kLongThreads)};
#pragma unroll 1
  for (unsigned vector = threadIdx.x; vector < vectors; vector += 2 * kLongThreads) {
    const uint4 now[2] = {next[0], next[1]};
#pragma unroll
    for (int i = 0; i < 2; ++i) next[i] = load(vector + (2 + i) * kLongThreads);
    push_vectors<T>(part, now, int(vector) * kRawItems<T>);
  }
  const RowStats<float> stats = part.reduce(threads, counters, p.classes);
  if (threadIdx.x == 0) store(p.out, p.index[slot] * p.rows + r, stats, p.wide);
}

}  // namespace FASTKD_TARGET
}  // namespace fastkd::group_stats
