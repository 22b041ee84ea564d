// The vectors of a row, 16 bytes each, that a block goes through.
#pragma once

#include "core/cuda/raw.cuh"
#include "core/cuda/simt.h"

namespace fastkd {
inline namespace FASTKD_TARGET {

struct Range {
  unsigned begin, end;
};

// The vectors of one of a row's parts.
__device__ __forceinline__ Range part_of_row(unsigned vectors, unsigned part, unsigned parts) {
  const unsigned length = (vectors + parts - 1) / parts, begin = min(part * length, vectors);
  return {begin, min(begin + length, vectors)};
}

// The lanes of a warp bring the parts' sums together.
constexpr int kMostParts = 32;

// Parts of each of `rows` rows, which are few, for `blocks` blocks in all; `most` is what a row's length allows.
inline unsigned parts_for_blocks(int64_t rows, int64_t blocks, int64_t most) {
  const int64_t wanted = (blocks + rows - 1) / rows, parts = wanted < most ? wanted : most;
  return unsigned(parts < 1 ? 1 : parts < kMostParts ? parts : kMostParts);
}

// How many threads go through the vectors of a row: `Threads`, or where that is 0 as many as were launched.
template <int Threads>
__device__ __forceinline__ unsigned vector_threads() {
  return Threads > 0 ? unsigned(Threads) : blockDim.x;
}

// Calls f(vector, load(vector)) for this thread's vectors from `begin` to `end`, with `Ahead` the next one's loads in flight
// meanwhile.
template <int Threads, bool Ahead, class Load, class F>
__device__ __forceinline__ void run_vectors(unsigned begin, unsigned end, const Load& load, const F& f) {
  const unsigned threads = vector_threads<Threads>();
  unsigned vector = begin + threadIdx.x;
  if (vector >= end) return;
  auto next = load(vector);
#pragma unroll 1
  for (; vector < end; vector += threads) {
    const auto now = next;
    const bool more = vector + threads < end;
    if (Ahead && more) next = load(vector + threads);
    f(vector, now);
    if (!Ahead && more) next = load(vector + threads);
  }
}

// One number in all elements from vector `begin` to `end`.
template <int Threads, class S>
__device__ __forceinline__ void fill_vectors(S* row, unsigned begin, unsigned end, float number) {
  float all[kRawItems<S>];
#pragma unroll
  for (int i = 0; i < kRawItems<S>; ++i) all[i] = number;
#pragma unroll 1
  for (unsigned vector = begin + threadIdx.x; vector < end; vector += vector_threads<Threads>())
    store_raw(row, vector, pack<S>(all));
}

}  // namespace FASTKD_TARGET
}  // namespace fastkd
