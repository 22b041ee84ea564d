// The triplets on CUDA. A block takes a square of tiles of the triangle k < i (32 i x 32 k each) and a chunk of the vertices
// j; a thread holds one i and eight k of a tile in registers while the vertices pass by in shared memory.
#pragma once

#include "core/cuda/block.cuh"
#include "core/cuda/vec.cuh"
#include "relational/math.h"

namespace fastkd::relational {
inline namespace FASTKD_TARGET {

constexpr int kTile = 32, kWarps = 4, kItems = kTile / kWarps, kAngleThreads = 32 * kWarps;
// The triangle's side is divided into at most kSquares parts, so that the partial sums by sides are kSquares [N, N].
constexpr int64_t kSquares = 8;

// How the triangle is divided, by N alone.
struct Division {
  int64_t n, padded, tiles, tiles_per_square, squares;

  FASTKD_HD explicit Division(int64_t size)
      : n(size),
        padded(padded_size(size)),
        tiles((size + kTile - 1) / kTile),
        tiles_per_square(tiles > 0 ? (tiles + kSquares - 1) / kSquares : 1),
        squares((tiles + tiles_per_square - 1) / tiles_per_square) {}

  FASTKD_HD int64_t pairs() const { return squares * (squares + 1) / 2; }  // blocks of a chunk
  FASTKD_HD int64_t tile_pairs() const { return tiles * (tiles + 1) / 2; }
  FASTKD_HD static int64_t pair_index(int64_t i, int64_t k) { return i * (i + 1) / 2 + k; }

  // Partial sums, all in A: losses [pairs, N], derivatives by sides [squares, N, padded], both to be cleared before; those
  // by opposite sides [kChunks, tile pairs, k, i].
  FASTKD_HD int64_t sides_at() const { return pairs() * n; }
  FASTKD_HD int64_t opposite_at() const { return sides_at() + squares * n * padded; }
  FASTKD_HD int64_t elements() const { return opposite_at() + kChunks * tile_pairs() * kTile * kTile; }
};

template <class A>
struct AngleParams {
  int64_t n;
  const A *student, *teacher;
  const double* weight;
  A *losses, *by_side, *by_opposite;
};

// Vertices in shared memory at a time; planes of one.
template <class A>
struct Staging {
  static constexpr int kVertices = sizeof(A) == sizeof(float) ? 16 : 8;
  static constexpr int kPlanes = sizeof(A) == sizeof(float) ? 3 : 2;
};

// For each vertex of the stage: hi, inv, lo of student and teacher, to the tile's i or k.
template <class A>
using Stage = A[Staging<A>::kVertices][2][Staging<A>::kPlanes][kTile];

// Vertices [j0, j0 + kVertices) to the columns of a tile; zeros past j_end: an inv of 0 contributes nothing.
template <class A>
__device__ __forceinline__ void load_stage(const AngleParams<A>& p, int64_t j0, int64_t j_end, int64_t tile, Stage<A>& to) {
  constexpr int kPlanes = Staging<A>::kPlanes, kLines = Staging<A>::kVertices * 2 * kPlanes;
  const int64_t padded = padded_size(p.n);
  const int lane = int(threadIdx.x) % 32;
  for (int line = int(threadIdx.x) / 32; line < kLines; line += kWarps) {
    const int plane = line % kPlanes, network = line / kPlanes % 2, v = line / kPlanes / 2;
    const A* from = network ? p.teacher : p.student;
    const int64_t j = j0 + v;
    to[v][network][plane][lane] = j < j_end ? from[(plane * p.n + j) * padded + tile * kTile + lane] : A(0);
  }
}

template <class A>
__device__ __forceinline__ Plane<A> staged(const Stage<A>& stage, int v, int network, int column) {
  const auto& planes = stage[v][network];
  if constexpr (Staging<A>::kPlanes == 3)
    return {planes[0][column], planes[2][column], planes[1][column]};
  else
    return {planes[0][column], A(0), planes[1][column]};
}

// The opposite sides of a thread's triplets: student and teacher, hi and lo.
template <class A>
struct Opposite {
  A s_hi[kItems], s_lo[kItems], t_hi[kItems], t_lo[kItems];

  __device__ __forceinline__ void load(const AngleParams<A>& p, int64_t i, int64_t k0) {
    const int64_t padded = padded_size(p.n);
#pragma unroll
    for (int m = 0; m < kItems; ++m) {
      const bool inside = k0 + m < p.n;  // rows are not padded
      const int64_t at = (k0 + m) * padded + i, lo = at + 2 * p.n * padded;
      s_hi[m] = inside ? p.student[at] : A(0);
      t_hi[m] = inside ? p.teacher[at] : A(0);
      s_lo[m] = t_lo[m] = 0;
      if constexpr (Staging<A>::kPlanes == 3) {
        s_lo[m] = inside ? p.student[lo] : A(0);
        t_lo[m] = inside ? p.teacher[lo] : A(0);
      }
    }
  }
};

// Sums over the 32 lanes of 8 values each; lane l returns that of value (l / 16) * 4 + (l / 8 % 2) * 2 + l / 4 % 2. Halving
// the number of values at each step takes 9 shuffles instead of 40.
template <class A>
__device__ __forceinline__ A transposed_sums(A (&x)[8]) {
  const int lane = int(threadIdx.x) % 32;
#pragma unroll
  for (int half = 4, mask = 16; half > 0; half /= 2, mask /= 2) {
    const bool upper = (lane & mask) != 0;
#pragma unroll
    for (int m = 0; m < half; ++m) {
      const A kept = upper ? x[m + half] : x[m], sent = upper ? x[m] : x[m + half];
      x[m] = kept + __shfl_xor_sync(kFullWarp, sent, mask);
    }
  }
  A sum = x[0];
  sum += __shfl_xor_sync(kFullWarp, sum, 2);
  return sum + __shfl_xor_sync(kFullWarp, sum, 1);
}

// What a block keeps of the vertices of a stage before it is summed over warps.
template <class A>
struct StageSums {
  A loss[Staging<A>::kVertices][kWarps][kTile], side_i[Staging<A>::kVertices][kWarps][kTile];
  A side_k[Staging<A>::kVertices][kTile];
};

// One vertex of the stage and this thread's triplets.
template <bool kGrad, class A>
__device__ __forceinline__ void vertex_triplets(const Stage<A>& stage_i, const Stage<A>& stage_k, int v, A weight,
                                                const Opposite<A>& opposite, int inside, A (&by_opposite)[kItems],
                                                StageSums<A>& sums) {
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  const Plane<A> si = staged<A>(stage_i, v, 0, lane), ti = staged<A>(stage_i, v, 1, lane);
  A loss = 0, side_i = 0, side_k[kItems];
#pragma unroll
  for (int m = 0; m < kItems; ++m) {
    Plane<A> sk = staged<A>(stage_k, v, 0, warp * kItems + m), tk = staged<A>(stage_k, v, 1, warp * kItems + m);
    if (m >= inside) sk.inv = tk.inv = 0;  // not k < i
    const Triplet<A> r =
        triplet(si, sk, opposite.s_hi[m], opposite.s_lo[m], ti, tk, opposite.t_hi[m], opposite.t_lo[m], weight);
    loss += r.loss;
    side_i += r.by_side_i;
    side_k[m] = r.by_side_k;
    by_opposite[m] += r.by_opposite;
  }
  sums.loss[v][warp][lane] = loss;
  if constexpr (kGrad) {
    sums.side_i[v][warp][lane] = side_i;
    const A column = transposed_sums(side_k);
    if (lane % 4 == 0) sums.side_k[v][warp * kItems + lane / 4 % 2 + lane / 8 % 2 * 2 + lane / 16 * 4] = column;
  }
}

// Where a block's sums over a stage go: to the vertices' losses [N] and rows [N, padded] by the square of i and of k.
template <class A>
struct Targets {
  A *losses, *by_side_i, *by_side_k;
};

// Each address is this thread's alone in every stage and tile of the block: sums without atomics, in a fixed order.
template <bool kGrad, class A>
__device__ __forceinline__ void add_stage(const StageSums<A>& sums, int64_t j0, int64_t j_end, int64_t tile_i, int64_t tile_k,
                                          int64_t padded, const Targets<A>& to) {
  const int lane = int(threadIdx.x) % 32;
  for (int v = int(threadIdx.x) / 32; v < Staging<A>::kVertices; v += kWarps) {
    const int64_t j = j0 + v;
    if (j >= j_end) return;  // the whole warp
    A loss = 0, side = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) loss += sums.loss[v][w][lane];
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) loss += __shfl_xor_sync(kFullWarp, loss, mask);
    if (lane == 0) to.losses[j] += loss;
    if constexpr (kGrad) {
#pragma unroll
      for (int w = 0; w < kWarps; ++w) side += sums.side_i[v][w][lane];
      to.by_side_i[j * padded + tile_i * kTile + lane] += side;
      to.by_side_k[j * padded + tile_k * kTile + lane] += sums.side_k[v][lane];
    }
  }
}

template <bool kGrad, class A>
__global__ void __launch_bounds__(kAngleThreads) angle_kernel(const __grid_constant__ AngleParams<A> p) {
  using StageShared = Stage<A>;
  using SumsShared = StageSums<A>;
  SIMT_SHARED(StageShared, stages, 2);
  SIMT_SHARED(SumsShared, sums, 1);
  constexpr int kVertices = Staging<A>::kVertices;
  const Division d(p.n);
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  const int64_t chunk = blockIdx.x, off_diagonal = d.pairs() - d.squares;
  // Squares on the diagonal, which are half the work, come last: while they end, few blocks wait for one.
  int64_t square_i = int64_t(blockIdx.y) - off_diagonal, square_k = square_i;
  if (square_i < 0) {
    square_i = 1;
    while (Division::pair_index(square_i, 0) <= int64_t(blockIdx.y)) ++square_i;
    square_k = int64_t(blockIdx.y) - Division::pair_index(square_i - 1, 0);
  }
  const int64_t begin = p.n * chunk / kChunks, end = p.n * (chunk + 1) / kChunks;
  const Targets<A> to{p.losses + Division::pair_index(square_i, square_k) * p.n, p.by_side + square_k * p.n * d.padded,
                      p.by_side + square_i * p.n * d.padded};
  const int64_t last_i = min(d.tiles, (square_i + 1) * d.tiles_per_square);
  for (int64_t tile_i = square_i * d.tiles_per_square; tile_i < last_i; ++tile_i) {
    const int64_t last_k = min(tile_i + 1, (square_k + 1) * d.tiles_per_square);
    for (int64_t tile_k = square_k * d.tiles_per_square; tile_k < last_k; ++tile_k) {
      const int64_t i = tile_i * kTile + lane, k0 = tile_k * kTile + warp * kItems;
      const int inside = int(min(i - k0, int64_t(kItems)));  // of the thread's k, those < i
      Opposite<A> opposite;
      opposite.load(p, i, k0);
      A by_opposite[kItems] = {};
      for (int64_t j0 = begin; j0 < end; j0 += kVertices) {
        load_stage<A>(p, j0, end, tile_i, stages[0]);
        load_stage<A>(p, j0, end, tile_k, stages[1]);
        __syncthreads();
#pragma unroll 1
        for (int v = 0; v < kVertices; ++v) {
          const A weight = p.weight && j0 + v < end ? A(p.weight[j0 + v]) : A(1);
          vertex_triplets<kGrad, A>(stages[0], stages[1], v, weight, opposite, inside, by_opposite, sums[0]);
        }
        __syncthreads();
        add_stage<kGrad>(sums[0], j0, end, tile_i, tile_k, d.padded, to);
      }
      if constexpr (kGrad) {
        A* pair = p.by_opposite + (chunk * d.tile_pairs() + Division::pair_index(tile_i, tile_k)) * kTile * kTile;
#pragma unroll
        for (int m = 0; m < kItems; ++m) pair[(warp * kItems + m) * kTile + lane] = by_opposite[m];
      }
    }
  }
}

}  // namespace FASTKD_TARGET
}  // namespace fastkd::relational
