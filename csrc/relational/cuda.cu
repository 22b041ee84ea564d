// relational on CUDA: the sides of a network, then the losses of angles or distances and the matrix of their gradient. No
// torch header.
#include "core/cuda/launch.cuh"
#include "relational/angles.cuh"
#include "relational/direct.cuh"

namespace fastkd::relational {
inline namespace FASTKD_TARGET {
namespace {

constexpr int kThreads = 256;
using RowSum = RowThreads<double, kThreads>;

// The sum over [0, n) of f(index), by a whole block: the same bits in every thread and on every run.
template <class F>
__device__ __forceinline__ double block_sum(RowSum& threads, int64_t n, const F& f) {
  Numbers<double, 1> sum{{0}};
#pragma unroll 1  // unrolled, the double divisions of distance_by_square spill
  for (int64_t r = threadIdx.x; r < n; r += kThreads) sum.v[0] += f(r);
  return threads.sum(sum).v[0];
}

// A macro, because shared memory cannot be declared by a function that returns it.
#define RELATIONAL_ROW_SUM(name)                                          \
  SIMT_SHARED(double, name##_buffer, 2 * RowSum::kWarps * RowSum::kMost); \
  RowSum name { int(threadIdx.x), 0, name##_buffer }

// --- sides ----------------------------------------------------------------------------------------------------------------

// |x_a - x_b|^2 by a warp.
template <class T>
__device__ __forceinline__ double direct_square(const T* a, const T* b, int64_t width) {
  Numbers<double, 1> sum{{0}};
  for (int64_t d = threadIdx.x % 32; d < width; d += 32) {
    const double difference = double(a[d]) - double(b[d]);
    sum.v[0] += difference * difference;
  }
  return reduce_warp(sum, [](const auto& x, const auto& y) { return Numbers<double, 1>{{x.v[0] + y.v[0]}}; }).v[0];
}

// A squared distance as far as it is known, and whether it must be summed from the rows' differences in double.
struct Square {
  double value;
  bool rough;
};

// The squared distances of row a, as square_of(b) has them, and their sums, by a block; x [N, width].
template <class T, class F>
__device__ __forceinline__ void row_of_squares(const SidesArgs& p, RowSum& threads, const T* x, int64_t width,
                                               const F& square_of) {
  const int64_t n = p.n, a = blockIdx.x;
  const int lane = int(threadIdx.x) % 32;
  Numbers<double, 2> sums{{0, 0}};
  for (int64_t first = int64_t(threadIdx.x) - lane; first < n; first += kThreads) {  // of the warp
    const int64_t b = first + lane;
    Square square = b < n ? square_of(b) : Square{0, false};
    unsigned rough = __ballot_sync(kFullWarp, square.rough);
    while (rough) {
      const int which = __ffs(int(rough)) - 1;
      rough &= rough - 1;
      const double direct = direct_square(x + a * width, x + (first + which) * width, width);
      if (which == lane) square.value = direct;
    }
    if (b < n) {
      if (!p.counts(a, b)) square.value = 0;
      p.squares[a * n + b] = square.value;
      sums.v[0] += ::sqrt(square.value);
      sums.v[1] += square.value > 0 ? 1 : 0;
    }
  }
  sums = threads.sum(sums);
  if (threadIdx.x != 0) return;
  p.row_sums[a] = sums.v[0];
  p.row_sums[n + a] = sums.v[1];
}

// From the Gram matrix: a block per row a.
__global__ void __launch_bounds__(kThreads) squares_kernel(const __grid_constant__ SidesArgs p) {
  RELATIONAL_ROW_SUM(threads);
  const int64_t n = p.n, a = blockIdx.x;
  const double norm = p.gram[a * n + a];
  row_of_squares(p, threads, p.x, p.width, [&](int64_t b) {
    const double other = p.gram[b * n + b], square = norm + other - 2 * p.gram[a * n + b];
    return Square{square, is_near(square, norm + other) || a == b};
  });
}

// From the parts of direct_kernel: a block per row a.
template <class A>
__global__ void __launch_bounds__(kThreads)
    parts_kernel(const __grid_constant__ RowsArgs rows, const __grid_constant__ SidesArgs p) {
  RELATIONAL_ROW_SUM(threads);
  const int64_t n = p.n, a = blockIdx.x, parts = Parts(n, rows.width).count;
  row_of_squares(p, threads, static_cast<const A*>(rows.rows), rows.width, [&](int64_t b) {
    double square = 0;
    for (int64_t part = 0; part < parts; ++part) square += rows.parts[(part * n + a) * n + b];
    return Square{square, sizeof(A) == sizeof(float) && square < kTinySquare && a != b};
  });
}

template <class A>
__device__ __forceinline__ void store_planes(const SidesArgs& p, int64_t a, int64_t b, int64_t padded, double scale) {
  const int64_t plane = p.n * padded;
  const Plane<A> value = b < p.n ? plane_of<A>(p.squares[a * p.n + b] * scale * scale, p.eps) : Plane<A>{0, 0, 0};
  A* to = static_cast<A*>(p.planes) + a * padded + b;
  to[0] = value.hi;
  to[plane] = value.inv;
  if constexpr (sizeof(A) == sizeof(float)) to[2 * plane] = value.lo;
}

// A block per row; every block sums the rows' sums for itself, which costs less than a launch.
__global__ void __launch_bounds__(kThreads) planes_kernel(const __grid_constant__ SidesArgs p) {
  RELATIONAL_ROW_SUM(threads);
  const int64_t n = p.n, a = blockIdx.x, padded = padded_size(n);
  const double sum = block_sum(threads, n, [&](int64_t r) { return p.row_sums[r]; });
  const double positive = block_sum(threads, n, [&](int64_t r) { return p.row_sums[n + r]; });
  const double mean = sum / (positive > 1 ? positive : 1);
  if (a == 0 && threadIdx.x == 0) {
    p.mean[0] = mean;
    p.mean[1] = positive;
  }
  const double scale = inverse_mean(mean);
  for (int64_t b = threadIdx.x; b < padded; b += kThreads) {
    if (p.kind == Kind::single)
      store_planes<float>(p, a, b, padded, scale);
    else if (p.kind == Kind::full)
      store_planes<double>(p, a, b, padded, scale);
    else
      static_cast<double*>(p.planes)[a * padded + b] = b < n ? ::sqrt(p.squares[a * n + b]) * scale : 0.;
  }
}

// --- losses ---------------------------------------------------------------------------------------------------------------

// The loss of vertex a from the blocks' sums, and row a of `laplacian`: a block per row.
template <class A>
__global__ void __launch_bounds__(kThreads)
    angle_rows_kernel(const __grid_constant__ LossArgs args, const __grid_constant__ AngleParams<A> p) {
  RELATIONAL_ROW_SUM(threads);
  const Division d(p.n);
  const int64_t n = p.n, a = blockIdx.x, plane = n * d.padded, square = n * d.padded;
  const double half = block_sum(threads, d.pairs(), [&](int64_t b) { return double(p.losses[b * n + a]); });
  const double same = block_sum(threads, n, [&](int64_t i) {
    return same_side_loss(p.student[plane + a * d.padded + i], p.teacher[plane + a * d.padded + i]);
  });
  if (threadIdx.x == 0) args.row_loss[a] = (2 * half + same) * vertex_factor(n);
  if (!args.need_grad) return;
  const double factor = 2 * vertex_factor(n) * args.factor() * element_factor(args.mean[0]);
  const double sum = block_sum(threads, n, [&](int64_t b) {
    if (a == b) return 0.;
    double by_square = 0;
    for (int64_t s = 0; s < d.squares; ++s)
      by_square += double(p.by_side[s * square + a * d.padded + b]) + double(p.by_side[s * square + b * d.padded + a]);
    const int64_t i = a > b ? a : b, k = a > b ? b : a;
    const int64_t pair = Division::pair_index(i / kTile, k / kTile), at = k % kTile * kTile + i % kTile;
    for (int64_t c = 0; c < kChunks; ++c) by_square -= double(p.by_opposite[(c * d.tile_pairs() + pair) * kTile * kTile + at]);
    args.laplacian[a * n + b] = by_square * factor;
    return by_square * factor;
  });
  if (threadIdx.x == 0) args.laplacian[a * n + a] = -sum;
}

// The loss of anchor a, and its part of the derivative by the mean distance: a block per row.
__global__ void __launch_bounds__(kThreads) distance_rows_kernel(const __grid_constant__ LossArgs p) {
  RELATIONAL_ROW_SUM(threads);
  const int64_t a = blockIdx.x, padded = padded_size(p.n);
  const double* s = static_cast<const double*>(p.student) + a * padded;
  const double* t = static_cast<const double*>(p.teacher) + a * padded;
  const double loss = block_sum(threads, p.n, [&](int64_t b) { return huber(s[b] - t[b], huber_slope(s[b] - t[b])); });
  const double through_mean =
      block_sum(threads, p.n, [&](int64_t b) { return (p.weight_of(a) + p.weight_of(b)) * huber_slope(s[b] - t[b]) * s[b]; });
  if (threadIdx.x != 0) return;
  p.row_loss[a] = loss / double(p.n);
  p.row_sums[a] = through_mean;
}

// Row a of `laplacian`.
__global__ void __launch_bounds__(kThreads) distance_pairs_kernel(const __grid_constant__ LossArgs p) {
  RELATIONAL_ROW_SUM(threads);
  const int64_t n = p.n, a = blockIdx.x, padded = padded_size(n);
  const double* s = static_cast<const double*>(p.student) + a * padded;
  const double* t = static_cast<const double*>(p.teacher) + a * padded;
  const double through_mean = block_sum(threads, n, [&](int64_t r) { return p.row_sums[r]; });
  const double correction = through_mean / (p.mean[1] > 1 ? p.mean[1] : 1);
  const double factor = p.factor() / double(n) * element_factor(p.mean[0]);
  const double sum = block_sum(threads, n, [&](int64_t b) {
    if (a == b) return 0.;
    const double weights = p.weight_of(a) + p.weight_of(b);
    const double element = factor * distance_by_square(s[b], huber_slope(s[b] - t[b]), weights, correction);
    p.laplacian[a * n + b] = element;
    return element;
  });
  if (threadIdx.x == 0) p.laplacian[a * n + a] = -sum;
}

__global__ void __launch_bounds__(kThreads) reduce_kernel(const __grid_constant__ LossArgs p) {
  RELATIONAL_ROW_SUM(threads);
  const double sum = block_sum(threads, p.n, [&](int64_t a) { return p.row_loss[a]; });
  if (threadIdx.x == 0) *p.loss = sum * p.factor();
}

template <class A>
void launch_angles(const LossArgs& args, cudaStream_t stream) {
  const Division d(args.n);
  A* partial = static_cast<A*>(args.partial);
  const AngleParams<A> p{args.n,
                         static_cast<const A*>(args.student),
                         static_cast<const A*>(args.teacher),
                         args.weight,
                         partial,
                         partial + d.sides_at(),
                         partial + d.opposite_at()};
  const int64_t cleared = args.need_grad ? d.opposite_at() : d.sides_at();
  (void)cudaMemsetAsync(partial, 0, size_t(cleared) * sizeof(A), stream);  // a failure shows in launch_error
  const dim3 grid(unsigned(kChunks), unsigned(d.pairs())), rows(unsigned(args.n));
  if (args.need_grad)
    SIMT_LAUNCH((angle_kernel<true, A>), grid, dim3(kAngleThreads), 0, stream, p);
  else
    SIMT_LAUNCH((angle_kernel<false, A>), grid, dim3(kAngleThreads), 0, stream, p);
  SIMT_LAUNCH((angle_rows_kernel<A>), rows, dim3(kThreads), 0, stream, args, p);
}

template <class A, bool kExact>
void launch_direct(const RowsArgs& args, const SidesArgs& sides, cudaStream_t stream) {
  const Parts parts(args.n, args.width);
  const dim3 rows(unsigned(args.n)), grid(unsigned(parts.squares), unsigned(parts.count));
  const dim3 blocks(unsigned(magnitude_blocks(args.n * args.columns)));
  SIMT_LAUNCH(magnitude_kernel<A>, blocks, dim3(kScaleThreads), 0, stream, args);
  SIMT_LAUNCH(scaled_rows_kernel<A>, rows, dim3(kScaleThreads), 0, stream, args);
  SIMT_LAUNCH((direct_kernel<A, kExact>), grid, dim3(kDirectThreads), 0, stream, args);
  SIMT_LAUNCH(parts_kernel<A>, rows, dim3(kThreads), 0, stream, args, sides);
}

void launch_reduce(const LossArgs& args, cudaStream_t stream) {
  if (args.loss) SIMT_LAUNCH(reduce_kernel, dim3(1), dim3(kThreads), 0, stream, args);
}

}  // namespace
}  // namespace FASTKD_TARGET

int64_t partial_elements_cuda(int64_t n) { return Division(n).elements(); }

const char* sides_cuda(const SidesArgs& args, void* stream_handle) {
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  if (args.n == 0) return nullptr;
  SIMT_LAUNCH(squares_kernel, dim3(unsigned(args.n)), dim3(kThreads), 0, stream, args);
  SIMT_LAUNCH(planes_kernel, dim3(unsigned(args.n)), dim3(kThreads), 0, stream, args);
  return launch_error();
}

int64_t magnitude_blocks_cuda(const RowsArgs& args) { return magnitude_blocks(args.n * args.columns); }
int64_t parts_cuda(const RowsArgs& args) { return Parts(args.n, args.width).count; }

const char* direct_sides_cuda(const RowsArgs& args, const SidesArgs& sides, void* stream_handle) {
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  if (args.n == 0) return nullptr;
  if (args.type == DType::f64)
    launch_direct<double, false>(args, sides, stream);
  else
    args.exact ? launch_direct<float, true>(args, sides, stream) : launch_direct<float, false>(args, sides, stream);
  SIMT_LAUNCH(planes_kernel, dim3(unsigned(args.n)), dim3(kThreads), 0, stream, sides);
  return launch_error();
}

const char* pull_cuda(const PullArgs& args, void* stream_handle) {
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  if (args.n == 0) return nullptr;
  const dim3 grid(unsigned((args.width + kSide - 1) / kSide), unsigned((args.n + kSide - 1) / kSide));
  if (args.type == DType::f64)
    SIMT_LAUNCH(pull_kernel<double>, grid, dim3(kDirectThreads), 0, stream, args);
  else
    SIMT_LAUNCH(pull_kernel<float>, grid, dim3(kDirectThreads), 0, stream, args);
  return launch_error();
}

const char* angles_cuda(const LossArgs& args, void* stream_handle) {
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  if (args.n > 0) args.kind == Kind::single ? launch_angles<float>(args, stream) : launch_angles<double>(args, stream);
  launch_reduce(args, stream);
  return launch_error();
}

const char* distances_cuda(const LossArgs& args, void* stream_handle) {
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  if (args.n > 0) {
    SIMT_LAUNCH(distance_rows_kernel, dim3(unsigned(args.n)), dim3(kThreads), 0, stream, args);
    if (args.need_grad) SIMT_LAUNCH(distance_pairs_kernel, dim3(unsigned(args.n)), dim3(kThreads), 0, stream, args);
  }
  launch_reduce(args, stream);
  return launch_error();
}

}  // namespace fastkd::relational
