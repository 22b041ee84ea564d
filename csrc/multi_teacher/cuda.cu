// multi_teacher on CUDA: forward, then its reduction over rows, then backward. No torch header.
#include "core/dispatch.h"
#include "multi_teacher/on_chip.cuh"
#include "multi_teacher/streaming.cuh"

namespace fastkd::multi_teacher {
inline namespace FASTKD_TARGET {
namespace {

// The policies, smallest first. fastkd/ops/multi_teacher.py knows the largest: ON_CHIP_CLASSES.
template <class A>
struct Policies {
  using Warp = OnChip<32, 4, 8>;
  using Small = OnChip<128, 1, 8>;
  using Medium = OnChip<sizeof(A) == 8 ? 256 : 512, 1, 8>;
  using Large = OnChip<512, 1, 16>;  // too many registers for double
};
constexpr int kReduceThreads = 512, kScaleThreads = 256;
constexpr unsigned kScaleVectors = 1024;  // of a block, four of a thread

template <class S, class T, class A, class Policy>
void launch_on_chip(const Params<A>& p, cudaStream_t stream) {
  const unsigned blocks = unsigned((p.rows + Policy::kRows - 1) / Policy::kRows);
  if (p.kl)
    SIMT_LAUNCH((on_chip_kernel<S, T, A, Policy, true>), dim3(blocks), dim3(Policy::kBlock), 0, stream, p);
  else
    SIMT_LAUNCH((on_chip_kernel<S, T, A, Policy, false>), dim3(blocks), dim3(Policy::kBlock), 0, stream, p);
}

template <class S, class T, class A>
void launch_stream(const Params<A>& p, cudaStream_t stream) {
  const int bytes = int(TeacherStates<A>::bytes(p.combine == Combine::logits ? 1 : p.teachers));
  if (bytes > (40 << 10))  // beside the static arrays; above 48 KiB a kernel must ask
    // A refusal also fails the launch, which is where the error is read.
    (void)cudaFuncSetAttribute(stream_forward_kernel<S, T, A>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  SIMT_LAUNCH((stream_forward_kernel<S, T, A>), dim3(unsigned(p.rows)), dim3(kStreamThreads), bytes, stream, p);
}

template <class S, class T, class A>
void launch_forward(const Args& args, cudaStream_t stream) {
  using Sizes = Policies<A>;
  const Params<A> p = make_params<S, T, A>(args);
  if (args.stream) return launch_stream<S, T>(p, stream);
  if (p.classes <= Sizes::Warp::kMostClasses) return launch_on_chip<S, T, A, typename Sizes::Warp>(p, stream);
  if (p.classes <= Sizes::Small::kMostClasses) return launch_on_chip<S, T, A, typename Sizes::Small>(p, stream);
  if (p.classes <= Sizes::Medium::kMostClasses) return launch_on_chip<S, T, A, typename Sizes::Medium>(p, stream);
  if constexpr (sizeof(A) == sizeof(float)) {
    if (p.classes <= Sizes::Large::kMostClasses) return launch_on_chip<S, T, A, typename Sizes::Large>(p, stream);
  }
  launch_stream<S, T>(p, stream);  // asked for nothing to be saved: without gradient
}

// One block: the sum of the rows' losses in double, the rows that count, the targets out of range.
template <class A>
__global__ void __launch_bounds__(kReduceThreads)
    reduce_kernel(const A* row_loss, const int64_t* target, int64_t rows, int64_t classes, int64_t ignore_index, bool mean,
                  A* loss, A* aux) {
  using Threads = RowThreads<double, kReduceThreads>;
  SIMT_SHARED(double, buffer, 2 * Threads::kWarps * Threads::kMost);
  Threads threads{int(threadIdx.x), 0, buffer};
  Numbers<double, 3> sums{{0, 0, 0}};
  for (int64_t r = threadIdx.x; r < rows; r += kReduceThreads) {
    const Label kind = label_kind(target, r, ignore_index, classes);
    sums.v[0] += double(row_loss[r]);
    sums.v[1] += kind == Label::ignored ? 0 : 1;
    sums.v[2] += kind == Label::outside ? 1 : 0;
  }
  sums = threads.sum(sums);
  if (threadIdx.x != 0) return;
  const double count = sums.v[1] > 1 ? sums.v[1] : 1;
  aux[0] = mean ? A(1 / count) : A(1);
  aux[1] = A(sums.v[2]);
  if (loss) *loss = A(mean ? sums.v[0] / count : sums.v[0]);
}

// grad = rows * (grad_loss * inverse count * inverse scale), for rows_per_block rows of `vectors` vectors each. The gradient
// was stored, so a row is short, and the indices within a block are small: no 64-bit division.
template <class S, class A, int Width>
__global__ void __launch_bounds__(kScaleThreads)
    scale_kernel(const S* stored, const A* grad_loss, bool per_row, const A* aux, const A* saved, int64_t rows,
                 unsigned vectors, unsigned rows_per_block, S* grad) {
  const int64_t first = int64_t(blockIdx.x) * rows_per_block;
  const unsigned here = unsigned(rows - first < int64_t(rows_per_block) ? rows - first : rows_per_block);
  const A common = (per_row ? A(1) : grad_loss[0]) * aux[0];
  for (unsigned i = threadIdx.x; i < here * vectors; i += kScaleThreads) {
    const int64_t row = first + i / vectors, at = (first * vectors + i) * Width;
    const A factor = common * (per_row ? grad_loss[row] : A(1)) * (saved ? saved[row] : A(1));
    Vec<S, Width> part = load_vec<S, Width>(stored + at);
#pragma unroll
    for (int v = 0; v < Width; ++v) store_as(part.v[v], A(load_as(part.v[v])) * factor);
    store_vec<S, Width>(grad + at, part);
  }
}

template <class S, class A, int Width>
void launch_scale(const BackwardArgs& args, cudaStream_t stream) {
  const unsigned vectors = unsigned(args.classes / Width);
  const unsigned rows_per_block = vectors < kScaleVectors ? kScaleVectors / vectors : 1;
  SIMT_LAUNCH((scale_kernel<S, A, Width>), dim3(unsigned((args.rows + rows_per_block - 1) / rows_per_block)),
              dim3(kScaleThreads), 0, stream, static_cast<const S*>(args.grad_rows),
              static_cast<const A*>(args.grad_loss), args.reduction == Reduction::none,
              static_cast<const A*>(args.aux),
              static_cast<const A*>(args.saved), args.rows, vectors, rows_per_block, static_cast<S*>(args.grad));
}

// An error of the launch itself, or null.
const char* launch_error() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace
}  // namespace FASTKD_TARGET

const char* forward_cuda(const Args& args, void* stream_handle) {
  const bool wide = args.student_type == DType::f64;
  const int64_t most = wide ? Policies<double>::Medium::kMostClasses : Policies<float>::Large::kMostClasses;
  if (args.kl && args.classes > most) return "statistics of a row that is too long to be on chip";
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  if (args.rows > 0)
    dispatch_pair(args.student_type, args.teacher_type,
                  [&]<class S, class T, class A>() { launch_forward<S, T, A>(args, stream); });
  const auto reduce = [&]<class A>(A) {
    SIMT_LAUNCH((reduce_kernel<A>), dim3(1), dim3(kReduceThreads), 0, stream, static_cast<const A*>(args.row_loss),
                args.target, args.rows, args.classes, args.ignore_index, args.reduction == Reduction::mean,
                static_cast<A*>(args.loss), static_cast<A*>(args.aux));
  };
  args.student_type == DType::f64 ? reduce(double()) : reduce(float());
  return launch_error();
}

const char* backward_cuda(const BackwardArgs& args, void* stream_handle) {
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  if (args.rows == 0) return nullptr;
  dispatch(args.type, [&]<class S, class A>() {
    constexpr int kWidth = 16 / int(sizeof(S));  // the gradients were allocated here: only the row length decides
    if (args.classes % kWidth == 0)
      launch_scale<S, A, kWidth>(args, stream);
    else
      launch_scale<S, A, 1>(args, stream);
  });
  return launch_error();
}

const char* stream_backward_cuda(const Args& args, const void* grad_loss, void* stream_handle) {
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  if (args.rows == 0) return nullptr;
  const int64_t tiles = (args.classes + kStreamTile - 1) / kStreamTile;
  dispatch_pair(args.student_type, args.teacher_type, [&]<class S, class T, class A>() {
    const Params<A> p = make_params<S, T, A>(args);
    SIMT_LAUNCH((stream_backward_kernel<S, T, A>), dim3(unsigned(args.rows * tiles)), dim3(kStreamThreads), 0, stream, p,
                static_cast<const A*>(grad_loss), args.reduction == Reduction::none,
                static_cast<const A*>(args.aux), tiles);
  });
  return launch_error();
}

}  // namespace fastkd::multi_teacher
