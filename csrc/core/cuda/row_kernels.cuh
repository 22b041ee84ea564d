// The small kernels after a forward over rows and in the backward: the losses of L learners from those of their rows, and
// their stored gradients times grad_output.
#pragma once

#include "core/cuda/block.cuh"
#include "core/dispatch.h"
#include "core/reduction.h"
#include "core/cuda/vec.cuh"

namespace fastkd {
inline namespace FASTKD_TARGET {

constexpr int kReduceThreads = 512, kScaleThreads = 256;
constexpr unsigned kScaleVectors = 1024;  // of a block, four of a thread
constexpr int kMostLearners = 16;         // of one launch

// What a sum over rows gathers: the losses in double, the rows that count, the targets out of range.
using RowCounts = Numbers<double, 3>;

template <class A>
__device__ __forceinline__ RowCounts count_rows(const A* losses, const int64_t* target, int64_t begin, int64_t end,
                                                int64_t classes, int64_t ignore_index) {
  RowCounts sums{{0, 0, 0}};
  for (int64_t r = begin + threadIdx.x; r < end; r += kReduceThreads) {
    const Label kind = label_kind(target, r, ignore_index, classes);
    sums.v[0] += double(losses[r]);
    sums.v[1] += kind == Label::ignored ? 0 : 1;
    sums.v[2] += kind == Label::outside ? 1 : 0;
  }
  return sums;
}

// Many rows are summed by many blocks, each of which leaves its sums where the first of its losses were, which are read no
// more; then one block sums these.
constexpr int64_t kPartRows = 8192;

FASTKD_HD int64_t parts_of_rows(int64_t rows) { return (rows + kPartRows - 1) / kPartRows; }
FASTKD_HD int64_t part_begin(int64_t rows, int64_t part) { return rows * part / parts_of_rows(rows); }

// Of a part, on double's border.
template <class A>
__device__ __forceinline__ double* part_sums(A* losses, int64_t rows, int64_t part) {
  return reinterpret_cast<double*>((reinterpret_cast<uintptr_t>(losses + part_begin(rows, part)) + 7) / 8 * 8);
}

// Block (part, l).
template <class A>
__global__ void __launch_bounds__(kReduceThreads)
    reduce_parts_kernel(A* row_loss, const int64_t* target, int64_t rows, int64_t classes, int64_t ignore_index) {
  using Threads = RowThreads<double, kReduceThreads>;
  SIMT_SHARED(double, buffer, 2 * Threads::kWarps * Threads::kMost);
  Threads threads{int(threadIdx.x), 0, buffer};
  A* mine = row_loss + int64_t(blockIdx.y) * rows;
  const int64_t begin = part_begin(rows, blockIdx.x), end = part_begin(rows, int64_t(blockIdx.x) + 1);
  const RowCounts sums = threads.sum(count_rows(mine, target, begin, end, classes, ignore_index));
  if (threadIdx.x != 0) return;
#pragma unroll
  for (int v = 0; v < 3; ++v) part_sums(mine, rows, blockIdx.x)[v] = sums.v[v];
}

// Before the rows: aux[0] = 1 / rows that count, for what is stored.
template <class A>
__global__ void __launch_bounds__(kReduceThreads)
    count_kernel(const int64_t* target, int64_t rows, int64_t ignore_index, A* aux) {
  using Threads = RowThreads<double, kReduceThreads>;
  SIMT_SHARED(double, buffer, 2 * Threads::kWarps * Threads::kMost);
  Threads threads{int(threadIdx.x), 0, buffer};
  Numbers<double, 1> sum{{0}};
  for (int64_t r = threadIdx.x; r < rows; r += kReduceThreads) sum.v[0] += target[r] == ignore_index ? 0 : 1;
  sum = threads.sum(sum);
  if (threadIdx.x == 0) aux[0] = A(1 / (sum.v[0] > 1 ? sum.v[0] : 1));
}

// Block l: the sum of the losses row_loss[l, :], or of the parts'. The first one also counts rows: aux = {factor that the
// stored gradients lack, 1 where they are `whole`; targets out of range}. `items` > 0 divides instead of the rows that count.
template <class A>
__global__ void __launch_bounds__(kReduceThreads)
    reduce_kernel(A* row_loss, const int64_t* target, int64_t rows, int64_t classes, int64_t ignore_index, bool mean,
                  double items, bool whole, bool parts, A* loss, A* aux) {
  using Threads = RowThreads<double, kReduceThreads>;
  SIMT_SHARED(double, buffer, 2 * Threads::kWarps * Threads::kMost);
  Threads threads{int(threadIdx.x), 0, buffer};
  A* mine = row_loss + int64_t(blockIdx.x) * rows;
  RowCounts sums{{0, 0, 0}};
  if (!parts) sums = count_rows(mine, target, 0, rows, classes, ignore_index);
  for (int64_t i = threadIdx.x; parts && i < parts_of_rows(rows); i += kReduceThreads) {
#pragma unroll
    for (int v = 0; v < 3; ++v) sums.v[v] += part_sums(mine, rows, i)[v];
  }
  sums = threads.sum(sums);
  if (threadIdx.x != 0) return;
  const double count = items > 0 ? items : !mean ? 1 : sums.v[1] > 1 ? sums.v[1] : 1;
  if (blockIdx.x == 0) {
    aux[0] = whole ? A(1) : A(1 / count);
    aux[1] = A(sums.v[2]);
  }
  if (loss) loss[blockIdx.x] = A(sums.v[0] / count);
}

// Stored gradients [S, R, C], what they lack, and where they go. Slot s belongs to learner learner[s].
template <class A>
struct StoredGradients {
  const void* stored;
  void* grad;          // [S, R, C]
  const A* grad_loss;  // [L] or, per row, [L, R]
  const A* aux;        // see reduce_kernel
  const A* saved;      // [S, R] inverse scales, or null
  bool per_row;
  int64_t rows, classes;
  int slots;
  int learner[kMostLearners];
};

// grad = stored * (grad_loss * inverse count * inverse scale), for rows_per_block rows of `vectors` vectors each of slot
// blockIdx.y. The gradient was stored, so a row is short, and the indices within a block are small: no 64-bit division.
template <class S, class A, int Width>
__global__ void __launch_bounds__(kScaleThreads)
    scale_kernel(const __grid_constant__ StoredGradients<A> p, unsigned vectors, unsigned rows_per_block) {
  const int64_t first = int64_t(blockIdx.x) * rows_per_block, slot_rows = blockIdx.y * p.rows;
  const int64_t learner = p.learner[blockIdx.y];
  const unsigned here = unsigned(p.rows - first < int64_t(rows_per_block) ? p.rows - first : rows_per_block);
  const A common = (p.per_row ? A(1) : p.grad_loss[learner]) * p.aux[0];
  if (p.stored == p.grad && !p.per_row && !p.saved && common == 1) return;  // in place, and nothing is left to do
  for (unsigned i = threadIdx.x; i < here * vectors; i += kScaleThreads) {
    const int64_t row = first + i / vectors, at = ((slot_rows + first) * vectors + i) * Width;
    const A upstream = p.per_row ? p.grad_loss[learner * p.rows + row] : A(1);
    const A factor = common * upstream * (p.saved ? p.saved[slot_rows + row] : A(1));
    Vec<S, Width> part = load_vec<S, Width>(static_cast<const S*>(p.stored) + at);
#pragma unroll
    for (int v = 0; v < Width; ++v) store_as(part.v[v], A(load_as(part.v[v])) * factor);
    store_vec<S, Width>(static_cast<S*>(p.grad) + at, part);
  }
}

// The reduction's factor, which stored gradients may have in them, so that a backward with grad_output 1 has nothing left
// to do: a number, or in memory.
struct RowFactor {
  double known = 1;
  bool counted = false, whole = false;  // aux[0] has it; the stored gradients will have it
};

// Rows that one block counts in a few microseconds.
constexpr int64_t kCountedRows = 65536;

// `bytes`: of the stored gradients. Labels are counted before the rows where that costs less than the backward's pass, which
// is the case for what does not stay in the L2 cache; not in float16, which has a scale of its own.
template <class Args>
RowFactor launch_factor(const Args& args, DType type, int64_t bytes, cudaStream_t stream) {
  RowFactor factor;
  if (bytes == 0 || type == DType::f16 || args.reduction == Reduction::none) return factor;
  factor.whole = true;
  if (args.items > 0 || args.reduction == Reduction::sum || !args.target) {
    const double rows = args.rows > 0 ? double(args.rows) : 1;
    factor.known = 1 / (args.items > 0 ? args.items : args.reduction == Reduction::sum ? 1 : rows);
    return factor;
  }
  int device = 0, l2 = 0;
  (void)cudaGetDevice(&device);
  (void)cudaDeviceGetAttribute(&l2, cudaDevAttrL2CacheSize, device);
  factor.counted = factor.whole = args.rows <= kCountedRows && bytes >= l2 / 8;
  if (!factor.counted) return factor;
  const auto count = [&]<class A>(A) {
    SIMT_LAUNCH((count_kernel<A>), dim3(1), dim3(kReduceThreads), 0, stream, args.target, args.rows, args.ignore_index,
                static_cast<A*>(args.aux));
  };
  type == DType::f64 ? count(double()) : count(float());
  return factor;
}

// Reduces the row losses after a forward pass; `type` is that of the learners, `losses` as for forward_over_rows() in
// core/torch/run.h, `whole` as of launch_factor().
template <class Args>
void launch_reduce(const Args& args, DType type, int losses, bool whole, cudaStream_t stream) {
  const auto reduce = [&]<class A>(A) {
    A* row_loss = const_cast<A*>(static_cast<const A*>(args.row_loss));
    // Where the rows' losses are themselves the result they stay.
    const bool parts = args.reduction != Reduction::none && args.rows >= 2 * kPartRows;
    if (parts)
      SIMT_LAUNCH((reduce_parts_kernel<A>), dim3(unsigned(parts_of_rows(args.rows)), unsigned(losses)), dim3(kReduceThreads), 0,
                  stream, row_loss, args.target, args.rows, args.classes, args.ignore_index);
    SIMT_LAUNCH((reduce_kernel<A>), dim3(unsigned(losses)), dim3(kReduceThreads), 0, stream, row_loss, args.target, args.rows,
                args.classes, args.ignore_index, args.reduction == Reduction::mean, args.items, whole, parts,
                static_cast<A*>(args.loss), static_cast<A*>(args.aux));
  };
  type == DType::f64 ? reduce(double()) : reduce(float());
}

template <class S, class A, int Width>
void launch_scale_vectors(const StoredGradients<A>& p, cudaStream_t stream) {
  const unsigned vectors = unsigned(p.classes / Width);
  const unsigned rows_per_block = vectors < kScaleVectors ? kScaleVectors / vectors : 1;
  SIMT_LAUNCH((scale_kernel<S, A, Width>), dim3(unsigned((p.rows + rows_per_block - 1) / rows_per_block), unsigned(p.slots)),
              dim3(kScaleThreads), 0, stream, p, vectors, rows_per_block);
}

template <class S, class A>
void launch_scale(const StoredGradients<A>& p, cudaStream_t stream) {
  constexpr int kWidth = 16 / int(sizeof(S));
  if (p.rows == 0 || p.slots == 0) return;
  // A compiler may hand over a view of a larger buffer as the stored gradients.
  const bool aligned = (reinterpret_cast<uintptr_t>(p.stored) | reinterpret_cast<uintptr_t>(p.grad)) % 16 == 0;
  if (p.classes % kWidth == 0 && aligned)
    launch_scale_vectors<S, A, kWidth>(p, stream);
  else
    launch_scale_vectors<S, A, 1>(p, stream);
}

}  // namespace FASTKD_TARGET
}  // namespace fastkd
