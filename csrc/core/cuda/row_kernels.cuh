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

// Block l: the sum of the losses row_loss[l, :] in double. The first one also counts rows: aux = {factor that the stored
// gradients lack, targets out of range}. `items` > 0 divides instead of the rows that count.
template <class A>
__global__ void __launch_bounds__(kReduceThreads)
    reduce_kernel(const A* row_loss, const int64_t* target, int64_t rows, int64_t classes, int64_t ignore_index, bool mean,
                  double items, A* loss, A* aux) {
  using Threads = RowThreads<double, kReduceThreads>;
  SIMT_SHARED(double, buffer, 2 * Threads::kWarps * Threads::kMost);
  Threads threads{int(threadIdx.x), 0, buffer};
  const A* mine = row_loss + int64_t(blockIdx.x) * rows;
  Numbers<double, 3> sums{{0, 0, 0}};
  for (int64_t r = threadIdx.x; r < rows; r += kReduceThreads) {
    const Label kind = label_kind(target, r, ignore_index, classes);
    sums.v[0] += double(mine[r]);
    sums.v[1] += kind == Label::ignored ? 0 : 1;
    sums.v[2] += kind == Label::outside ? 1 : 0;
  }
  sums = threads.sum(sums);
  if (threadIdx.x != 0) return;
  const double count = items > 0 ? items : !mean ? 1 : sums.v[1] > 1 ? sums.v[1] : 1;
  if (blockIdx.x == 0) {
    aux[0] = A(1 / count);
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

// Reduces the row losses after a forward pass; `type` is that of the learners, `losses` as for forward_over_rows() in
// core/torch/run.h.
template <class Args>
void launch_reduce(const Args& args, DType type, int losses, cudaStream_t stream) {
  const auto reduce = [&]<class A>(A) {
    SIMT_LAUNCH((reduce_kernel<A>), dim3(unsigned(losses)), dim3(kReduceThreads), 0, stream,
                static_cast<const A*>(args.row_loss), args.target, args.rows, args.classes, args.ignore_index,
                args.reduction == Reduction::mean, args.items, static_cast<A*>(args.loss), static_cast<A*>(args.aux));
  };
  type == DType::f64 ? reduce(double()) : reduce(float());
}

template <class S, class A, int Width>
void launch_scale_vectors(const StoredGradients<A>& p, cudaStream_t stream) {
  const unsigned vectors = unsigned(p.classes / Width);
  const unsigned rows_per_block = vectors < kScaleVectors ? kScaleVectors / vectors : 1;
  SIMT_LAUNCH((scale_kernel<S, A, Width>),
              dim3(unsigned((p.rows + rows_per_block - 1) / rows_per_block), unsigned(p.slots)), dim3(kScaleThreads), 0,
              stream, p, vectors, rows_per_block);
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
