// Which CUDA kernel takes a row of which length. A translation unit per dtype of the student includes it (cuda_f32.cu and
// its siblings): all in one take a compiler minutes.
#pragma once

#include "core/cuda/launch.cuh"
#include "multi_teacher/on_chip.cuh"
#include "multi_teacher/rows.cuh"
#include "multi_teacher/stream_divergence.cuh"
#include "multi_teacher/stream_gradient.cuh"
#include "multi_teacher/stream_rows.cuh"
#include "multi_teacher/streaming.cuh"

namespace fastkd::multi_teacher {
inline namespace FASTKD_TARGET {

// The policies, smallest first: a row is one tile.
template <class A>
struct Policies {
  using Warp = RowPolicy<32, 4, 8>;
  using Small = RowPolicy<128, 1, 8>;
  using Medium = RowPolicy<sizeof(A) == 8 ? 256 : 512, 1, 8>;
  using Large = RowPolicy<512, 1, 16>;  // too many registers for double
};
static_assert(Policies<float>::Large::kTile == kMaxOnChip<float> && Policies<double>::Medium::kTile == kMaxOnChip<double>);

template <class Policy>
unsigned blocks_of(int64_t rows) {
  return unsigned((rows + Policy::kRows - 1) / Policy::kRows);
}

template <class S, class A, class Policy>
void launch_divergence(const Params<A>& p, cudaStream_t stream) {
  SIMT_LAUNCH((divergence_kernel<S, A, Policy>), dim3(blocks_of<Policy>(p.rows)), dim3(Policy::kBlock), 0, stream, p);
}

template <class S, class A, class Policy>
void launch_on_chip(const Params<A>& p, cudaStream_t stream) {
  const unsigned blocks = blocks_of<Policy>(p.rows);
  if (p.divergence != Divergence::forward) {
    if constexpr (sizeof(A) == 8)  // half as much in a thread: with 8 items it would need over 168 registers
      launch_divergence<S, A, RowPolicy<Policy::kTile / 4, 1, 4>>(p, stream);
    else
      launch_divergence<S, A, Policy>(p, stream);
  } else if (p.kl) {
    SIMT_LAUNCH((on_chip_kernel<S, A, Policy, true>), dim3(blocks), dim3(Policy::kBlock), 0, stream, p);
  } else {
    SIMT_LAUNCH((on_chip_kernel<S, A, Policy, false>), dim3(blocks), dim3(Policy::kBlock), 0, stream, p);
  }
}

template <class S>
unsigned forward_parts(const Args& args) {
  return args.scratch ? parts_of_row<S>(args, kWholeRows) : 1;
}

// The losses of streamed rows, of the forward divergence; what the backward reads.
template <class S, class A>
void launch_stream_forward(const Args& args, const Params<A>& p, cudaStream_t stream) {
  if constexpr (sizeof(A) == sizeof(float)) {
    const unsigned parts = forward_parts<S>(args), groups = groups_of(args.teachers);
    float* scratch = static_cast<float*>(args.scratch);
    const auto in_vectors = [&]<int K, AtOne One>() {
      SIMT_LAUNCH((stream_rows_kernel<S, K, One>), dim3(unsigned(p.rows) * parts * groups), dim3(kVectorThreads), 0, stream, p,
                  parts, groups, scratch);
      if (parts * groups == 1) return;
      SIMT_LAUNCH((stream_parts_kernel<S, K, One>), dim3(unsigned((p.rows + kMergeRows - 1) / kMergeRows)), dim3(kMergeThreads),
                  0, stream, p, parts, groups, static_cast<const float*>(scratch));
    };
    if (with_vectors<S>(args, in_vectors)) return;
  }
  const int bytes = int(TeacherStates<A>::bytes(p.combine == Combine::logits ? 1 : p.teachers));
  allow_dynamic_shared(stream_forward_kernel<S, A>, bytes);
  SIMT_LAUNCH((stream_forward_kernel<S, A>), dim3(unsigned(p.rows)), dim3(kStreamThreads<A>), bytes, stream, p);
}

// The other divergences need each row's sums first. Of the forward divergence nothing is kept but these, nor of a mixture of
// probabilities, which a second read makes from them.
template <class S, class A>
void launch_stream(const Args& args, const Params<A>& p, cudaStream_t stream) {
  if (p.divergence == Divergence::forward) return launch_stream_forward<S>(args, p, stream);
  Args states = args;
  Params<A> of_states = p;
  states.divergence = Divergence::forward;
  if (p.combine == Combine::probs) states.combine = of_states.combine = Combine::losses;
  of_states.kd_weight = 0;
  of_states.need_grad = true;
  launch_stream_forward<S>(states, of_states, stream);
  SIMT_LAUNCH((stream_divergence_kernel<S, A>), dim3(unsigned(p.rows)), dim3(kStreamThreads<A>), 0, stream, p);
}

template <class S>
void forward_rows(const Args& args, cudaStream_t stream) {
  using A = accumulate_t<S>;
  using Sizes = Policies<A>;
  const Params<A> p = make_params<S, A>(args);
  if (args.stream) return launch_stream<S>(args, p, stream);
  if (p.classes <= Sizes::Warp::kTile) return launch_on_chip<S, A, typename Sizes::Warp>(p, stream);
  if (p.classes <= Sizes::Small::kTile) return launch_on_chip<S, A, typename Sizes::Small>(p, stream);
  if (p.classes <= Sizes::Medium::kTile) return launch_on_chip<S, A, typename Sizes::Medium>(p, stream);
  if constexpr (sizeof(A) == sizeof(float)) {
    if (p.classes <= Sizes::Large::kTile) return launch_on_chip<S, A, typename Sizes::Large>(p, stream);
  }
  launch_stream<S>(args, p, stream);  // asked for nothing to be saved: without gradient
}

template <class S>
void stream_backward_rows(const Args& args, const void* grad_loss_, cudaStream_t stream) {
  using A = accumulate_t<S>;
  const A* grad_loss = static_cast<const A*>(grad_loss_);
  const Params<A> p = make_params<S, A>(args);
  const A* aux = static_cast<const A*>(args.aux);
  const bool per_row = args.reduction == Reduction::none;
  const int64_t tiles = (args.classes + kStreamTile<A> - 1) / kStreamTile<A>;
  if (p.divergence != Divergence::forward) {
    SIMT_LAUNCH((stream_divergence_gradient_kernel<S, A>), dim3(unsigned(args.rows * tiles)), dim3(kStreamThreads<A>), 0,
                stream, p, grad_loss, per_row, aux, tiles);
    return;
  }
  if constexpr (sizeof(A) == sizeof(float)) {
    const unsigned parts = parts_of_row<S>(args, 4096);
    const dim3 grid(unsigned(args.rows) * parts), block(kVectorThreads);
    const auto in_vectors = [&]<int K, AtOne One>() {
      if (args.teachers > K)
        SIMT_LAUNCH((stream_gradients_kernel<S, One>), grid, block, 0, stream, p, grad_loss, per_row, aux, parts);
      else
        SIMT_LAUNCH((stream_gradient_kernel<S, K, One>), grid, block, 0, stream, p, grad_loss, per_row, aux, parts);
    };
    if (with_vectors<S>(args, in_vectors)) return;
  }
  SIMT_LAUNCH((stream_backward_kernel<S, A>), dim3(unsigned(args.rows * tiles)), dim3(kStreamThreads<A>), 0, stream, p,
              grad_loss, per_row, aux, tiles);
}

}  // namespace FASTKD_TARGET
}  // namespace fastkd::multi_teacher
