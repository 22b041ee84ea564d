// Squared distances on CUDA from differences, and the gradient. A block: a square of 64 x 64 results, or 64 rows and 64 columns of
// the gradient; a thread: 4 x 4 of them in registers, while what they are summed over passes by in shared memory.
#pragma once

#include "core/math.h"
#include "core/cuda/block.cuh"
#include "core/cuda/vec.cuh"
#include "relational/math.h"

namespace fastkd::relational {
inline namespace FASTKD_TARGET {

constexpr int kSide = 64, kPatch = 4, kPatches = kSide / kPatch, kDirectThreads = kPatches * kPatches;
constexpr int kStage = 16;  // columns, or rows of the gradient's sum, in shared memory at a time
constexpr int64_t kRollColumns = 512, kRollTerms = 64;  // summed plainly before they go into a Compensated
template <class A>
constexpr bool kRolls = sizeof(A) == sizeof(float);  // of doubles all are: other sums beside them would cost 32 registers

// A stage: line l holds the 64 numbers of one column. One more patch a line than used: lines begin on other banks.
template <class A>
using Patch = Vec<A, kPatch>;
template <class A>
using Lines = Patch<A>[kStage][kPatches + 1];

// A sum of sums whose own rounding does not count: of floats in two of them, for a GPU may have few units for double.
template <class A>
struct Compensated {
  A high = 0, low = 0;

  __device__ __forceinline__ void add(A x) {
    const A sum = high + x;
    if constexpr (sizeof(A) == sizeof(float)) {
      const A other = sum - high;
      low += (high - (sum - other)) + (x - other);
    }
    high = sum;
  }
  __device__ __forceinline__ double total() const { return double(high) + double(low); }
};

// --- rows -----------------------------------------------------------------------------------------------------------------

constexpr int kScaleThreads = 256, kScaleItems = 16;

// How many blocks look for the largest magnitude, and so how many numbers every block of the copy looks through.
FASTKD_HD int64_t magnitude_blocks(int64_t elements) {
  const int64_t blocks = (elements + kScaleThreads * kScaleItems - 1) / (kScaleThreads * kScaleItems);
  return blocks < 1 ? 1 : blocks > kScaleThreads ? kScaleThreads : blocks;
}

template <class A>
__global__ void __launch_bounds__(kScaleThreads) magnitude_kernel(const __grid_constant__ RowsArgs p) {
  using Threads = RowThreads<A, kScaleThreads>;
  SIMT_SHARED(A, buffer, 2 * Threads::kWarps * Threads::kMost);
  Threads threads{int(threadIdx.x), 0, buffer};
  const A* x = static_cast<const A*>(p.from);
  const int64_t elements = p.n * p.columns, step = int64_t(gridDim.x) * kScaleThreads;
  A most = 0;
#pragma unroll 8
  for (int64_t e = int64_t(blockIdx.x) * kScaleThreads + threadIdx.x; e < elements; e += step) {
    const A size = magnitude(x[e]);
    most = size > most ? size : most;  // not of NaN, which the distances show
  }
  most = threads.max(most);
  if (threadIdx.x == 0) p.magnitudes[blockIdx.x] = double(most);
}

// A block per row: scaled, and padded with zeros.
template <class A>
__global__ void __launch_bounds__(kScaleThreads) scaled_rows_kernel(const __grid_constant__ RowsArgs p) {
  using Threads = RowThreads<double, kScaleThreads>;
  SIMT_SHARED(double, buffer, 2 * Threads::kWarps * Threads::kMost);
  Threads threads{int(threadIdx.x), 0, buffer};
  const int64_t a = blockIdx.x, blocks = magnitude_blocks(p.n * p.columns);
  const double scale = row_scale(threads.max(threadIdx.x < blocks ? p.magnitudes[threadIdx.x] : 0.));
  if (a == 0 && threadIdx.x == 0) *p.device_scale = scale;
  const A* from = static_cast<const A*>(p.from) + a * p.columns;
  A* to = static_cast<A*>(p.rows) + a * p.width;
  for (int64_t d = threadIdx.x; d < p.width; d += kScaleThreads) to[d] = d < p.columns ? A(double(from[d]) * scale) : A(0);
}

// --- squared distances ----------------------------------------------------------------------------------------------------

// How the columns of all squares are divided, by N and D alone: few rows have few squares, whose blocks would leave most of
// a GPU idle. A part has at least 128 columns.
struct Parts {
  int64_t squares, count, columns;

  FASTKD_HD Parts(int64_t n, int64_t width) {
    const int64_t sides = (n + kSide - 1) / kSide, most = width < 256 ? 1 : width / 128;
    squares = sides * (sides + 1) / 2;
    const int64_t wanted = squares > 0 ? 512 / squares : 1;
    const int64_t parts = wanted < 1 ? 1 : wanted < most ? wanted : most;
    columns = ((width + parts - 1) / parts + kStage - 1) / kStage * kStage;
    count = columns > 0 ? (width + columns - 1) / columns : 1;
  }
};

// This thread's vector of a stage: of one of 64 rows, which are its lanes.
template <class A>
struct RowLoad {
  const A* from;  // null past the last row

  __device__ __forceinline__ RowLoad(const RowsArgs& p, int64_t side) {
    const int64_t row = side * kSide + threadIdx.x / kPatch;
    from = row < p.n ? static_cast<const A*>(p.rows) + row * p.width + threadIdx.x % kPatch * kPatch : nullptr;
  }
  __device__ __forceinline__ Patch<A> at(int64_t column) const {
    return from ? load_vec<A, kPatch>(from + column) : Patch<A>{};
  }
  // Turned: a column of the rows is a line.
  __device__ __forceinline__ static void put(const Patch<A>& vector, Lines<A>& lines) {
    const int row = int(threadIdx.x) / kPatch, first = int(threadIdx.x) % kPatch * kPatch;
#pragma unroll
    for (int c = 0; c < kPatch; ++c) lines[first + c][row / kPatch].v[row % kPatch] = vector.v[c];
  }
};

template <class A>
__device__ __forceinline__ void add_squares(const Lines<A> (&stage)[2], int i, int k, A (&sums)[kPatch][kPatch]) {
#pragma unroll
  for (int line = 0; line < kStage; ++line) {
    const Patch<A> x = stage[0][line][i], y = stage[1][line][k];
#pragma unroll
    for (int r = 0; r < kPatch; ++r)
#pragma unroll
      for (int c = 0; c < kPatch; ++c) {
        const A difference = x.v[r] - y.v[c];
        sums[r][c] += difference * difference;
      }
  }
}

// (x - y)^2 is added to `high`, and half of what float32 rounds off the difference, its square and the sum to `half_low`: all
// but the square of the difference's rounding. Adding twice of it would take a product more.
__device__ __forceinline__ void add_exact_square(float x, float y, float& high, float& half_low) {
  const float difference = x - y, back = difference - x;
  const float left = (x - (difference - back)) - (y + back);  // x - y = difference + left
  const float sum = fmaf(difference, difference, high), grown = sum - high;
  const float rest = fmaf(difference, difference, -grown) + (high - (sum - grown));
  half_low = fmaf(difference, left, fmaf(0.5f, rest, half_low));
  high = sum;
}

__device__ __forceinline__ void add_exact_squares(const Lines<float> (&stage)[2], int i, int k,
                                                  Compensated<float> (&totals)[kPatch][kPatch]) {
#pragma unroll 2  // 14 instructions a column of a pair, whose code is not to outgrow the cache
  for (int line = 0; line < kStage; ++line) {
    const Patch<float> x = stage[0][line][i], y = stage[1][line][k];
#pragma unroll
    for (int r = 0; r < kPatch; ++r)
#pragma unroll
      for (int c = 0; c < kPatch; ++c) add_exact_square(x.v[r], y.v[c], totals[r][c].high, totals[r][c].low);
  }
}

template <class A>
__device__ __forceinline__ void roll(A (&sums)[kPatch][kPatch], Compensated<A> (&totals)[kPatch][kPatch]) {
#pragma unroll
  for (int r = 0; r < kPatch; ++r)
#pragma unroll
    for (int c = 0; c < kPatch; ++c) {
      totals[r][c].add(sums[r][c]);
      sums[r][c] = 0;
    }
}

__device__ __forceinline__ void double_lows(Compensated<float> (&totals)[kPatch][kPatch]) {
#pragma unroll
  for (int r = 0; r < kPatch; ++r)
#pragma unroll
    for (int c = 0; c < kPatch; ++c) totals[r][c].low *= 2;
}

// Both triangles of a part's sums.
template <class A>
__device__ __forceinline__ void store_squares(const RowsArgs& p, int64_t a0, int64_t b0, bool mirrored,
                                              const Compensated<A> (&totals)[kPatch][kPatch]) {
  double* to = p.parts + int64_t(blockIdx.y) * p.n * p.n;
#pragma unroll
  for (int r = 0; r < kPatch; ++r)
#pragma unroll
    for (int c = 0; c < kPatch; ++c) {
      const int64_t a = a0 + r, b = b0 + c;
      if (a >= p.n || b >= p.n) continue;
      const double total = totals[r][c].total();
      to[a * p.n + b] = total;
      if (mirrored) to[b * p.n + a] = total;
    }
}

// Grid: squares of the triangle k <= i, parts of the columns.
template <class A, bool kExact>
__global__ void __launch_bounds__(kDirectThreads, sizeof(A) == sizeof(float) ? 2 : 1)
    direct_kernel(const __grid_constant__ RowsArgs p) {
  using LinesShared = Lines<A>;
  SIMT_SHARED(LinesShared, stage, 2);
  int64_t i = int64_t((sqrtf(8.f * float(blockIdx.x) + 1.f) - 1.f) / 2.f);  // up to its rounding
  while (i * (i + 1) / 2 > int64_t(blockIdx.x)) --i;
  while ((i + 1) * (i + 2) / 2 <= int64_t(blockIdx.x)) ++i;
  const int64_t k = int64_t(blockIdx.x) - i * (i + 1) / 2;
  const Parts parts(p.n, p.width);
  const int64_t begin = blockIdx.y * parts.columns, end = min(begin + parts.columns, p.width);
  const RowLoad<A> of_i(p, i), of_k(p, k);
  const int mine_i = int(threadIdx.x) / kPatches, mine_k = int(threadIdx.x) % kPatches;
  A sums[kPatch][kPatch] = {};
  Compensated<A> totals[kPatch][kPatch];
  Patch<A> next_i = of_i.at(begin), next_k = of_k.at(begin);
  for (int64_t column = begin; column < end; column += kStage) {
    RowLoad<A>::put(next_i, stage[0]);
    RowLoad<A>::put(next_k, stage[1]);
    __syncthreads();
    if (column + kStage < end) {
      next_i = of_i.at(column + kStage);
      next_k = of_k.at(column + kStage);
    }
    if constexpr (kExact)
      add_exact_squares(stage, mine_i, mine_k, totals);
    else
      add_squares<A>(stage, mine_i, mine_k, sums);
    __syncthreads();
    if (!kExact && kRolls<A> && (column + kStage - begin) % kRollColumns == 0) roll(sums, totals);
  }
  if constexpr (kExact)
    double_lows(totals);
  else
    roll(sums, totals);
  store_squares(p, i * kSide + mine_i * kPatch, k * kSide + mine_k * kPatch, i != k, totals);
}

// --- gradient -------------------------------------------------------------------------------------------------------------

// Lines b of the weights of 64 rows a, from row b of `laplacian`, which is symmetric.
template <class A>
__device__ __forceinline__ void load_weights(const PullArgs& p, int64_t a0, int64_t b0, A (&to)[kPatch]) {
  const int64_t a = a0 + threadIdx.x % kSide;
#pragma unroll
  for (int j = 0; j < kPatch; ++j) {
    const int64_t b = b0 + threadIdx.x / kSide + j * (kDirectThreads / kSide);
    to[j] = a < p.n && b < p.n ? A(-p.laplacian[b * p.n + a]) : A(0);
  }
}

template <class A>
__device__ __forceinline__ void put_weights(const A (&weights)[kPatch], Lines<A>& lines) {
  const int a = int(threadIdx.x) % kSide;
#pragma unroll
  for (int j = 0; j < kPatch; ++j)
    lines[threadIdx.x / kSide + j * (kDirectThreads / kSide)][a / kPatch].v[a % kPatch] = weights[j];
}

// Four columns of a row, zeros outside.
template <class A>
__device__ __forceinline__ Patch<A> row_patch(const PullArgs& p, int64_t row, int64_t column) {
  if (row >= p.n || column >= p.width) return {};
  return load_vec<A, kPatch>(static_cast<const A*>(p.rows) + row * p.width + column);
}

template <class A>
__device__ __forceinline__ void add_pulls(const Lines<A> (&stage)[2], int i, int k, const Patch<A> (&x)[kPatch],
                                          A (&sums)[kPatch][kPatch]) {
#pragma unroll
  for (int line = 0; line < kStage; ++line) {
    const Patch<A> weight = stage[0][line][i], y = stage[1][line][k];
#pragma unroll
    for (int r = 0; r < kPatch; ++r)
#pragma unroll
      for (int c = 0; c < kPatch; ++c) sums[r][c] += weight.v[r] * (x[r].v[c] - y.v[c]);
  }
}

// Grid: 64 columns, 64 rows.
template <class A>
__global__ void __launch_bounds__(kDirectThreads, sizeof(A) == sizeof(float) ? 2 : 1)
    pull_kernel(const __grid_constant__ PullArgs p) {
  using LinesShared = Lines<A>;
  SIMT_SHARED(LinesShared, stage, 2);
  const int mine_i = int(threadIdx.x) / kPatches, mine_k = int(threadIdx.x) % kPatches;
  const int64_t a0 = int64_t(blockIdx.y) * kSide, own = a0 + mine_i * kPatch;
  const int64_t column = int64_t(blockIdx.x) * kSide + mine_k * kPatch;
  Patch<A> x[kPatch];
#pragma unroll
  for (int r = 0; r < kPatch; ++r) x[r] = row_patch<A>(p, own + r, column);
  A sums[kPatch][kPatch] = {};
  Compensated<A> totals[kPatch][kPatch];
  A weights[kPatch];
  load_weights(p, a0, 0, weights);
  Patch<A> y = row_patch<A>(p, mine_i, column);  // line mine_i, patch mine_k
  for (int64_t b = 0; b < p.n; b += kStage) {
    put_weights<A>(weights, stage[0]);
    stage[1][mine_i][mine_k] = y;
    __syncthreads();
    if (b + kStage < p.n) {
      load_weights(p, a0, b + kStage, weights);
      y = row_patch<A>(p, b + kStage + mine_i, column);
    }
    add_pulls<A>(stage, mine_i, mine_k, x, sums);
    __syncthreads();
    if (kRolls<A> && (b + kStage) % kRollTerms == 0) roll(sums, totals);
  }
  roll(sums, totals);
  const double factor = *p.factor;
#pragma unroll
  for (int r = 0; r < kPatch; ++r)
#pragma unroll
    for (int c = 0; c < kPatch; ++c)
      if (own + r < p.n && column + c < p.columns)
        static_cast<A*>(p.grad)[(own + r) * p.columns + column + c] = A(totals[r][c].total() * factor);
}

}  // namespace FASTKD_TARGET
}  // namespace fastkd::relational
