// Which CUDA kernel takes a row of which length. A translation unit per dtype of the learners includes it (cuda_f32.cu and its
// siblings), so that they are compiled side by side.
#pragma once

#include "core/cuda/launch.cuh"
#include "mutual/kernel.cuh"
#include "mutual/rows.cuh"
#include "mutual/vector_kernel.cuh"

namespace fastkd::mutual {
inline namespace FASTKD_TARGET {

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

inline int64_t most_shared_bytes() {
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

template <class S, int M>
void launch_step(const Params<float>& p, const Split& split, dim3 grid, dim3 block, cudaStream_t stream) {
  switch (at_one_of(p.integer_t, p.cross_entropy)) {
    case AtOne::same: SIMT_LAUNCH((vector_kernel<S, M, AtOne::same>), grid, block, 0, stream, p, split); break;
    case AtOne::power: SIMT_LAUNCH((vector_kernel<S, M, AtOne::power>), grid, block, 0, stream, p, split); break;
    case AtOne::exponential: SIMT_LAUNCH((vector_kernel<S, M, AtOne::exponential>), grid, block, 0, stream, p, split); break;
  }
}

template <class S, int M>
void launch_vectors(const Params<float>& p, unsigned parts, float* scratch, cudaStream_t stream) {
  const dim3 rows(unsigned(p.rows)), of_parts(unsigned(p.rows) * parts);
  const dim3 block(unsigned(vector_block(row_vectors<S>(p.classes) / parts)));
  if (parts == 1) return launch_step<S, M>(p, {}, rows, block, stream);
  launch_step<S, M>(p, {Step::sums, parts, scratch}, of_parts, block, stream);
  launch_step<S, M>(p, {Step::learn, parts, scratch}, of_parts, block, stream);
  launch_step<S, M>(p, {Step::losses, parts, scratch}, rows, dim3(kMostParts), stream);
}

// Parameters for vector_kernel, if rows lie in vectors of so many elements.
template <class S, int Width>
bool make_vector_params(const Args& args, Params<float>& p) {
  p = make_params<S, Width, float>(args);
  return p.vectors == (1u << p.networks()) - 1 && p.grad_vectors;
}

// Whether the kernel of vectors took the call.
template <class S>
bool try_vectors(const Args& args, cudaStream_t stream) {
  const int networks = args.learners + args.teachers;
  const bool labels = !args.cross_entropy || (!args.soft && args.label_smoothing == 0);
  if (networks > kVectorNetworks || !labels || args.classes >= int64_t(1) << 31) return false;
  Params<float> p;
  if (!make_vector_params<S, kRawItems<S>>(args, p)) {
    if (!kNarrow<S, 1> || networks == kVectorNetworks || !make_vector_params<S, 2>(args, p)) return false;
    p.words = unsigned(args.classes / 2);
  }
  float* const scratch = static_cast<float*>(args.scratch);
  const unsigned parts = scratch ? parts_of_row(args) : 1;
  switch (networks) {
    case 1: launch_vectors<S, 1>(p, parts, scratch, stream); break;
    case 2: launch_vectors<S, 2>(p, parts, scratch, stream); break;
    case 3: launch_vectors<S, 3>(p, parts, scratch, stream); break;
    default: launch_vectors<S, 4>(p, parts, scratch, stream);
  }
  return true;
}

template <class S>
void forward_rows(const Args& args, cudaStream_t stream) {
  using A = accumulate_t<S>;
  const int64_t most = most_shared_bytes();
  if constexpr (sizeof(A) == sizeof(float)) {
    if (try_vectors<S>(args, stream)) return;
  }
  if (try_launch<S, A, Warp>(args, most, stream) || try_launch<S, A, Small>(args, most, stream)) return;
  if (try_launch<S, A, Medium>(args, most, stream)) return;
  if constexpr (sizeof(A) == sizeof(float)) {
    if (try_launch<S, A, Wide>(args, most < kWideBytes ? most : kWideBytes, stream)) return;
  }
  try_launch<S, A, Stream<A>>(args, most, stream);
}

}  // namespace FASTKD_TARGET
}  // namespace fastkd::mutual
