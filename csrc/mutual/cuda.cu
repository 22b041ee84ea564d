// mutual on CUDA: forward, its reductions over rows, backward. No torch header.
#include "core/cuda/launch.cuh"
#include "core/cuda/row_kernels.cuh"
#include "mutual/kernel.cuh"

namespace fastkd::mutual {
inline namespace FASTKD_TARGET {
namespace {

// The policies, smallest first; a row that is longer, or of more networks than shared memory holds, is streamed.
using Warp = Policy<32, 4, 4, true>;
using Small = Policy<128, 1, 8, true>;
using Medium = Policy<512, 1, 8, true>;
// Of few networks, whose tiles leave room for several blocks; in double it lacks registers.
using Wide = Policy<256, 1, 8, false>;
constexpr int64_t kWideBytes = 100 << 10;
// In shared memory at most 32 networks' tiles: 64 KiB, which every supported GPU has.
template <class A>
using Stream = Policy<sizeof(A) == 8 ? 32 : 64, 1, 4, false>;

constexpr int64_t kStaticBytes = 4 << 10;  // beside the dynamic shared memory: reductions, and what CUDA reserves

int64_t most_shared_bytes() {
  int device = 0, bytes = 48 << 10;
  (void)cudaGetDevice(&device);
  (void)cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return bytes - kStaticBytes;
}

template <class S, class A, class P>
void launch(const Args& args, int64_t bytes, cudaStream_t stream) {
  const Params<A> p = make_params<S, P::template kWidth<S>, A>(args);
  allow_dynamic_shared(mutual_kernel<S, A, P>, bytes);
  const unsigned blocks = unsigned((p.rows + P::kRows - 1) / P::kRows);
  SIMT_LAUNCH((mutual_kernel<S, A, P>), dim3(blocks), dim3(P::kBlock), int(bytes), stream, p);
}

// Whether the policy took the call.
template <class S, class A, class P>
bool try_launch(const Args& args, int64_t most_bytes, cudaStream_t stream) {
  const bool soft = args.soft && args.cross_entropy;
  const int64_t bytes =
      P::kRows * P::template numbers<A>(args.learners, args.learners + args.teachers, soft) * int64_t(sizeof(A));
  if (P::kOnChip && (args.stream || args.classes > P::kTile)) return false;
  if (bytes > most_bytes) return false;
  launch<S, A, P>(args, bytes, stream);
  return true;
}

template <class S, class A>
void launch_forward(const Args& args, cudaStream_t stream) {
  const int64_t most = most_shared_bytes();
  if (try_launch<S, A, Warp>(args, most, stream) || try_launch<S, A, Small>(args, most, stream) ||
      try_launch<S, A, Medium>(args, most, stream))
    return;
  if constexpr (sizeof(A) == sizeof(float)) {
    if (try_launch<S, A, Wide>(args, most < kWideBytes ? most : kWideBytes, stream)) return;
  }
  try_launch<S, A, Stream<A>>(args, most, stream);
}

}  // namespace
}  // namespace FASTKD_TARGET

const char* forward_cuda(const Args& args, void* stream_handle) {
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  if (args.rows > 0)
    dispatch(args.type, [&]<class S, class A>() { launch_forward<S, A>(args, stream); });
  launch_reduce(args, args.type, args.learners, stream);
  if (args.terms) {
    Args terms = args;
    terms.row_loss = args.row_terms;
    terms.loss = args.terms;
    launch_reduce(terms, args.type, 2 * args.learners, stream);
  }
  return launch_error();
}

const char* backward_cuda(const BackwardArgs& args, void* stream_handle) {
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  dispatch(args.type, [&]<class S, class A>() {
    StoredGradients<A> p{args.stored, args.grad, static_cast<const A*>(args.grad_loss), static_cast<const A*>(args.aux),
                         static_cast<const A*>(args.saved), args.reduction == Reduction::none, args.rows, args.classes,
                         args.slots, {}};
    for (int s = 0; s < args.slots; ++s) p.learner[s] = int(args.learner[s]);
    launch_scale<S, A>(p, stream);
  });
  return launch_error();
}

}  // namespace fastkd::mutual
