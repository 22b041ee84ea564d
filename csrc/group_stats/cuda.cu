// group_stats on CUDA: which policy takes a row, the launches. No torch header.
#include "core/dispatch.h"
#include "core/cuda/launch.cuh"
#include "group_stats/vectors.cuh"

namespace fastkd::group_stats {
inline namespace FASTKD_TARGET {
namespace {

// The policies, smallest first; the last takes rows of any length, tile by tile.
using Warp = RowPolicy<32, 4, 8>;
using Small = RowPolicy<128, 1, 8>;
using Medium = RowPolicy<512, 1, 8>;
using Stream = RowPolicy<512, 1, 16>;

constexpr int kLabelThreads = 256, kLabelRows = kLabelThreads / 32;

// A warp per row of soft labels: its largest class, the first of equal ones.
__global__ void __launch_bounds__(kLabelThreads)
    soft_labels_kernel(const __grid_constant__ Args p, const __grid_constant__ Network soft) {
  const int64_t r = int64_t(blockIdx.x) * kLabelRows + threadIdx.x / 32;
  if (r >= p.rows) return;  // whole warps
  Numbers<double, 2> top{{-double(kInf), double(p.classes - 1)}};  // probability, class
  for (int64_t c = threadIdx.x % 32; c < p.classes; c += 32) {
    const double probability = soft_at<double>(soft, r, c);
    if (probability > top.v[0]) top = {{probability, double(c)}};
  }
  top = reduce_warp(top, [](const Numbers<double, 2>& a, const Numbers<double, 2>& b) {
    return b.v[0] > a.v[0] || (b.v[0] == a.v[0] && b.v[1] < a.v[1]) ? b : a;
  });
  if (threadIdx.x % 32 == 0) p.labels[r] = label_of_soft(p, r, int64_t(top.v[1]));
}

// Whether rows of T may be read in vectors, wherever they lie.
template <class T>
bool in_vectors(const Network& network, int64_t classes) {
  constexpr int kWidth = kVector<T, T>;
  bool aligned = true;
  for (int d = 0; d < network.rows.dims; ++d)
    aligned &= rows_aligned<kWidth>(network.data, network.rows.stride[d], classes, sizeof(T));
  return aligned;
}

// From network `m` on those of its type that a launch takes; `m` becomes where the next launch of the type begins.
template <class T>
Params make_params(const Args& args, DType type, int& m, int& networks) {
  Params p{};
  p.rows = args.rows;
  p.classes = args.classes;
  p.ignore_index = args.ignore_index;
  p.target = args.target;
  if (args.soft) p.soft = *args.soft;
  p.wide = args.wide;
  p.out = args.out;
  networks = 0;
  for (; m < args.networks && networks < kMaxLaunchNetworks; ++m) {
    if (args.network[m].type != type) continue;
    p.network[networks] = args.network[m];
    p.index[networks] = m;
    p.vectors |= unsigned(in_vectors<T>(args.network[m], args.classes)) << networks;
    ++networks;
  }
  return p;
}

template <class T, class A, class P>
void launch(const Params& p, int networks, bool soft, cudaStream_t stream) {
  const dim3 grid(unsigned((p.rows + P::kRows - 1) / P::kRows), unsigned(networks)), block(P::kBlock);
  if (soft)
    SIMT_LAUNCH((row_kernel<T, A, P, true>), grid, block, 0, stream, p);
  else
    SIMT_LAUNCH((row_kernel<T, A, P, false>), grid, block, 0, stream, p);
}

template <class T, class A>
void launch_for_length(const Params& p, int networks, bool soft, cudaStream_t stream) {
  if (p.classes <= Warp::kTile) return launch<T, A, Warp>(p, networks, soft, stream);
  if (p.classes <= Small::kTile) return launch<T, A, Small>(p, networks, soft, stream);
  if (p.classes <= Medium::kTile) return launch<T, A, Medium>(p, networks, soft, stream);
  if constexpr (sizeof(A) == sizeof(float)) {
    if (!soft && p.vectors == (1u << networks) - 1) {
      SIMT_LAUNCH(long_row_kernel<T>, dim3(unsigned(p.rows), unsigned(networks)), dim3(kLongThreads), 0, stream, p);
      return;
    }
  }
  launch<T, A, Stream>(p, networks, soft, stream);
}

void launch_type(const Args& args, DType type, cudaStream_t stream) {
  dispatch(type, [&]<class T, class A>() {
    for (int m = 0; m < args.networks;) {
      int networks;
      const Params p = make_params<T>(args, type, m, networks);
      if (networks > 0) launch_for_length<T, A>(p, networks, args.soft, stream);
    }
  });
}

}  // namespace
}  // namespace FASTKD_TARGET

const char* forward_cuda(const Args& given, void* stream_handle) {
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  Args args = given;
  if (args.rows == 0) return nullptr;
  if (args.soft) {
    SIMT_LAUNCH(soft_labels_kernel, dim3(unsigned((args.rows + kLabelRows - 1) / kLabelRows)), dim3(kLabelThreads), 0, stream,
                args, *args.soft);
    args.target = args.labels;
    args.ignore_index = -1;
  }
  for (DType type : {DType::f32, DType::f64, DType::f16, DType::bf16}) launch_type(args, type, stream);
  return launch_error();
}

}  // namespace fastkd::group_stats
