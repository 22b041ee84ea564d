// Few long rows in vectors: each is split into parts, a block each, which three launches of vector_kernel bring together.
#pragma once

#include "mutual/vectors.cuh"

namespace fastkd::mutual {
inline namespace FASTKD_TARGET {

// What a launch does: everything; or the sums of parts; divergences and gradients of parts, from all parts' sums; the losses of
// rows, from both.
enum class Step { whole, sums, learn, losses };

struct alignas(16) Split {  // which compilers copy in one access
  Step step = Step::whole;
  unsigned parts = 1;        // of a row
  float* scratch = nullptr;  // [R, parts, kPartNumbers]

  __device__ __forceinline__ float* numbers(int64_t row, unsigned part, int of_part) const {
    return scratch + (row * parts + part) * of_part;
  }
};

// Of a part: max, least, z, z_one of each network, `a` of each pair.
template <int M>
constexpr int kPartNumbers = 4 * M + M * M;

// So many rows make two rounds of blocks on the largest GPUs. Fewer are split into parts until all together fill such a GPU with
// blocks of the least size, four to a multiprocessor; a part has at least as many vectors as such a block takes.
constexpr int64_t kWholeRows = 264, kBlocks = 528, kLeastVectors = 512;

inline unsigned parts_of_row(const Args& args) {
  if (args.rows == 0 || args.rows >= kWholeRows) return 1;
  const int64_t vectors = args.classes * bytes_of(args.type) / int64_t(sizeof(uint4));
  return parts_for_blocks(args.rows, kBlocks, vectors / kLeastVectors);
}

template <int M>
__device__ __forceinline__ void store_part(const NetworkSums<M>& sums, float* to) {
#pragma unroll
  for (int n = 0; n < M; ++n) {
    to[4 * n] = sums.max[n];
    to[4 * n + 1] = sums.least[n];
    to[4 * n + 2] = sums.z[n];
    to[4 * n + 3] = sums.z_one[n];
  }
}

template <int M>
__device__ __forceinline__ void load_part(const float* from, NetworkSums<M>& sums) {
#pragma unroll
  for (int n = 0; n < M; ++n) {
    sums.max[n] = from[4 * n];
    sums.least[n] = from[4 * n + 1];
    sums.z[n] = from[4 * n + 2];
    sums.z_one[n] = from[4 * n + 3];
  }
}

template <int M>
__device__ __forceinline__ void store_part(const PairSums<M>& pairs, float* to) {
#pragma unroll
  for (int i = 0; i < M * M; ++i) to[4 * M + i] = pairs.a[i / M][i % M];
}

template <int M>
__device__ __forceinline__ void load_part(const float* from, PairSums<M>& pairs) {
#pragma unroll
  for (int i = 0; i < M * M; ++i) pairs.a[i / M][i % M] = from[4 * M + i];
}

}  // namespace FASTKD_TARGET
}  // namespace fastkd::mutual
