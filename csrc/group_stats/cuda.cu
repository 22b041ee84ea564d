// group_stats on CUDA: which policy takes a row, the launches. No torch header.
#include "core/dispatch.h"
#include "core/launch.cuh"
#include "group_stats/row.cuh"

namespace fastkd::group_stats {
inline namespace FASTKD_TARGET {
namespace {

// The policies, smallest first; the last takes rows of any length, tile by tile.
using Warp = RowPolicy<32, 4, 8>;
using Small = RowPolicy<128, 1, 8>;
using Medium = RowPolicy<512, 1, 8>;
using Stream = RowPolicy<512, 1, 16>;

template <class T>
Params make_params(const Args& args, int first, int networks) {
  constexpr int kWidth = kVector<T, T>;
  using A = accumulate_t<T>;
  Params p{};
  p.rows = args.rows;
  p.classes = args.classes;
  p.ignore_index = args.ignore_index;
  p.target = args.target;
  for (int m = 0; m < networks; ++m) {
    p.logits[m] = args.logits[first + m];
    p.stride[m] = args.stride[first + m];
    p.vectors |= unsigned(rows_aligned<kWidth>(p.logits[m], p.stride[m], args.classes, sizeof(T))) << m;
  }
  const int64_t skip = first * args.rows;
  p.out.ce = static_cast<A*>(args.out.ce) + skip;
  p.out.confidence = static_cast<A*>(args.out.confidence) + skip;
  p.out.entropy = static_cast<A*>(args.out.entropy) + skip;
  p.out.margin = static_cast<A*>(args.out.margin) + skip;
  p.out.label_rank = args.out.label_rank + skip;
  p.out.correct = args.out.correct + skip;
  return p;
}

template <class T, class A, class P>
void launch(const Params& p, int networks, cudaStream_t stream) {
  const unsigned blocks = unsigned((p.rows + P::kRows - 1) / P::kRows);
  SIMT_LAUNCH((row_kernel<T, A, P>), dim3(blocks, unsigned(networks)), dim3(P::kBlock), 0, stream, p);
}

template <class T, class A>
void launch_for_length(const Params& p, int networks, cudaStream_t stream) {
  if (p.classes <= Warp::kTile) return launch<T, A, Warp>(p, networks, stream);
  if (p.classes <= Small::kTile) return launch<T, A, Small>(p, networks, stream);
  if (p.classes <= Medium::kTile) return launch<T, A, Medium>(p, networks, stream);
  launch<T, A, Stream>(p, networks, stream);
}

}  // namespace
}  // namespace FASTKD_TARGET

const char* forward_cuda(const Args& args, void* stream_handle) {
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  if (args.rows == 0) return nullptr;
  dispatch(args.type, [&]<class T, class A>() {
    for (int first = 0; first < args.networks; first += kMaxLaunchNetworks) {
      const int left = args.networks - first, networks = left < kMaxLaunchNetworks ? left : kMaxLaunchNetworks;
      launch_for_length<T, A>(make_params<T>(args, first, networks), networks, stream);
    }
  });
  return launch_error();
}

}  // namespace fastkd::group_stats
