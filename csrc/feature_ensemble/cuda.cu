// feature_ensemble on CUDA: groups, then samples, then the loss; and the gradient. No torch header.
#include "core/dispatch.h"
#include "core/cuda/launch.cuh"
#include "feature_ensemble/forward.cuh"

namespace fastkd::feature_ensemble {
inline namespace FASTKD_TARGET {
namespace {

// The policies, smallest first.
template <class A>
struct Policies {
  static constexpr int kItems = sizeof(A) == 8 ? 4 : 16;
  using Warp = RowPolicy<32, 4, 8>;
  using Small = RowPolicy<128, 1, kItems>;
  using Large = RowPolicy<512, 1, kItems / 2>;
};
constexpr unsigned kWarpMost = 1024, kSmallMost = 4096;  // elements of a row
constexpr int kReduceThreads = 512, kSampleThreads = 128, kGradThreads = 256;
template <class A>
constexpr int kGradItems = sizeof(A) == 8 ? 4 : 8;
template <class A>
constexpr unsigned kGradTile = unsigned(kGradThreads * kGradItems<A>);

// A pair's distances of one sample, summed over its groups.
template <class A>
__global__ void __launch_bounds__(kSampleThreads) samples_kernel(const __grid_constant__ Params<A> p) {
  using Threads = RowThreads<double, kSampleThreads>;
  SIMT_SHARED(double, buffer, 2 * Threads::kWarps * Threads::kMost);
  Threads threads{int(threadIdx.x), 0, buffer};
  const int64_t k = blockIdx.x / p.samples, b = blockIdx.x % p.samples;
  const PairParams<A>& pair = p.pair[k];
  const A* distance = p.distance + pair.first_group + b * pair.groups;
  Numbers<double, 1> sum{{0}};
  for (unsigned g = threadIdx.x; g < pair.groups; g += kSampleThreads) sum.v[0] += double(distance[g]);
  sum = threads.sum(sum);
  if (threadIdx.x == 0) p.sample_distance[k * p.samples + b] = A(sum.v[0]);
}

// One block: the weighted sum over the pairs, per sample or over all samples, in double.
template <class A>
__global__ void __launch_bounds__(kReduceThreads, 1) reduce_kernel(const __grid_constant__ Params<A> p) {
  using Threads = RowThreads<double, kReduceThreads>;
  SIMT_SHARED(double, buffer, 2 * Threads::kWarps * Threads::kMost);
  Threads threads{int(threadIdx.x), 0, buffer};
  Numbers<double, 1> total{{0}};
  for (int64_t b = threadIdx.x; b < p.samples; b += kReduceThreads) {
    double sum = 0;
    for (int k = 0; k < p.pairs; ++k) sum += double(p.weight_of(k, b)) * double(p.sample_distance[k * p.samples + b]);
    total.v[0] += sum;
    if (p.reduction == Reduction::none) p.loss[b] = A(sum);
  }
  total = threads.sum(total);
  if (threadIdx.x != 0 || p.reduction == Reduction::none) return;
  *p.loss = A(total.v[0] / p.divisor);
}

// One thread's elements of a teacher's tile.
template <class S, class T, class A>
__device__ __forceinline__ void load_teacher(const PairParams<A>& pair, const Source<T>& teacher, unsigned first,
                                             unsigned length, A (&b)[kGradItems<A>]) {
  constexpr int kWidth = kVector<S, T>, kItems = kGradItems<A>;
  if (!pair.transposed) {
    teacher.template items<kItems, kWidth>(first, length, kGradThreads, int(threadIdx.x), pair.teacher_vectors, b);
    return;
  }
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const unsigned c = item_class<kWidth>(first, i, kGradThreads, threadIdx.x);
    b[i] = c < length ? teacher.template load<A>(teacher_index(pair, c)) : A(0);
  }
}

// A tile of one sample of a student's map: the sum of its pairs' gradients.
template <class S, class T, class A>
__global__ void __launch_bounds__(kGradThreads, 2) gradient_kernel(const __grid_constant__ Params<A> p) {
  constexpr int kWidth = kVector<S, T>, kItems = kGradItems<A>;
  constexpr unsigned kTile = kGradTile<A>;
  const Work work = p.shared ? Work{0, int64_t(blockIdx.x)} : work_of(p);
  const PairParams<A>& shape = p.pair[work.pair];
  const unsigned length = shape.outer * shape.inner, tiles = (length - 1) / kTile + 1;
  const int64_t sample = work.block / tiles;
  const unsigned first = unsigned(work.block % tiles) * kTile;
  A a[kItems], b[kItems], grad[kItems];
  const S* student = static_cast<const S*>(shape.student) + sample * shape.student_stride;
  const int end = p.shared ? p.pairs : work.pair + 1;
  bool skipped = true;
  for (int k = work.pair; k < end; ++k) skipped &= p.skips(k, sample);
  load_items<kItems, kWidth>(student, first, skipped ? 0 : length, kGradThreads, int(threadIdx.x), shape.student_vectors, A(0),
                             a);
#pragma unroll
  for (int i = 0; i < kItems; ++i) grad[i] = 0;
  const A upstream = p.grad_loss[p.reduction == Reduction::none ? sample : 0] / A(p.divisor);
#pragma unroll 1
  for (int k = work.pair; k < end; ++k) {
    const PairParams<A>& pair = p.pair[k];
    if (p.skips(k, sample)) continue;
    load_teacher<S>(pair, Source<T>(pair.teacher, pair.teacher_type, sample * pair.teacher_stride), first, length, b);
    const A factor = upstream * p.weight_of(k, sample);
    const int64_t group = pair.first_group + sample * pair.groups;
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const unsigned c = item_class<kWidth>(first, i, kGradThreads, threadIdx.x);
      const unsigned at = c < length ? c : 0;
      const unsigned g = pair.group == Group::all ? 0 : pair.group == Group::row ? at / pair.inner : at % pair.inner;
      const Factors<A> f = load_factors(p.state, p.total_groups, group + g);
      const A inner = load_inner(p.state, p.total_groups, group + g);
      grad[i] += p.p == 1 ? gradient<1>(f, inner, factor, a[i], b[i]) : gradient<2>(f, inner, factor, a[i], b[i]);
    }
  }
  store_items<kItems, kWidth>(static_cast<S*>(shape.grad) + sample * int64_t(length), first, length, kGradThreads,
                              int(threadIdx.x), shape.grad_vectors, grad);
}

template <class S, class T, class A, class Policy>
void launch_rows(Params<A>& p, cudaStream_t stream) {
  const int64_t blocks =
      deal_blocks(p, [&](const PairParams<A>& pair) { return (p.samples * pair.groups + Policy::kRows - 1) / Policy::kRows; });
  SIMT_LAUNCH((rows_kernel<S, T, A, Policy>), dim3(unsigned(blocks)), dim3(Policy::kBlock), 0, stream, p);
}

template <class S, class T, class A>
void launch_columns(Params<A>& p, cudaStream_t stream) {
  const int64_t blocks =
      deal_blocks(p, [&](const PairParams<A>& pair) { return (p.samples * pair.inner + kColumns - 1) / kColumns; });
  SIMT_LAUNCH((columns_kernel<S, T, A>), dim3(unsigned(blocks)), dim3(kColumns * kSlices), 0, stream, p);
}

// The pairs for which `chosen` holds, in one launch.
template <class A, class F>
Params<A> select(const Params<A>& p, const F& chosen) {
  Params<A> some = p;
  some.pairs = 0;
  for (int k = 0; k < p.pairs; ++k)
    if (chosen(p.pair[k])) some.pair[some.pairs++] = p.pair[k];
  return some;
}

template <class S, class T, class A>
void launch_groups(const Params<A>& p, cudaStream_t stream) {
  using Sizes = Policies<A>;
  Params<A> columns = select(p, [](const PairParams<A>& pair) { return pair.group == Group::column; });
  Params<A> rows = select(p, [](const PairParams<A>& pair) { return pair.group != Group::column; });
  if (columns.pairs > 0) launch_columns<S, T>(columns, stream);
  if (rows.pairs == 0) return;
  unsigned longest = 0;
  for (int k = 0; k < rows.pairs; ++k) {
    const PairParams<A>& pair = rows.pair[k];
    const unsigned length = pair.group == Group::all ? pair.outer * pair.inner : pair.inner;
    longest = length > longest ? length : longest;
  }
  if (longest <= kWarpMost) return launch_rows<S, T, A, typename Sizes::Warp>(rows, stream);
  if (longest <= kSmallMost) return launch_rows<S, T, A, typename Sizes::Small>(rows, stream);
  launch_rows<S, T, A, typename Sizes::Large>(rows, stream);
}

template <class A>
void launch_sums(const Params<A>& p, bool groups, cudaStream_t stream) {
  if (groups && p.samples > 0)
    SIMT_LAUNCH((samples_kernel<A>), dim3(unsigned(p.samples * p.pairs)), dim3(kSampleThreads), 0, stream, p);
  SIMT_LAUNCH((reduce_kernel<A>), dim3(1), dim3(kReduceThreads), 0, stream, p);
}

// f<S, T, A>(): T the teachers' type where all have the students' or all float32 beside halves, else AnyType.
template <class F>
void dispatch_types(const Args& args, const F& f) {
  bool same = true, single = true;
  for (int k = 0; k < args.pairs; ++k) {
    same &= args.pair[k].teacher_type == args.student_type;
    single &= args.pair[k].teacher_type == DType::f32;
  }
  dispatch(args.student_type, [&]<class S, class A>() {
    if (same) return f.template operator()<S, S, A>();
    if constexpr (sizeof(S) < sizeof(A))
      if (single) return f.template operator()<S, float, A>();
    f.template operator()<S, AnyType, A>();
  });
}

// More blocks than a grid has are refused, not cut off.
bool fits(const Args& args) {
  int64_t groups = args.total_groups, tiles = 0;
  for (int k = 0; k < args.pairs; ++k) tiles += args.samples * (args.pair[k].elements() / kGradTile<double> + 1);
  return groups < (int64_t(1) << 31) && tiles < (int64_t(1) << 31);
}

}  // namespace
}  // namespace FASTKD_TARGET

const char* forward_cuda(const Args& args, void* stream_handle) {
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  if (!fits(args)) return "more blocks than a launch takes; split the batch";
  dispatch_types(args, [&]<class S, class T, class A>() {
    const Params<A> p = make_params<S, T, A>(args);
    if (p.samples > 0) launch_groups<S, T>(p, stream);
    launch_sums(p, args.norm != Norm::sample, stream);
  });
  return launch_error();
}

const char* backward_cuda(const Args& args, void* stream_handle) {
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  if (!fits(args)) return "more blocks than a launch takes; split the batch";
  if (args.samples == 0) return nullptr;
  dispatch_types(args, [&]<class S, class T, class A>() {
    Params<A> p = make_params<S, T, A>(args);
    const int64_t all = deal_blocks(
        p, [&](const PairParams<A>& pair) { return p.samples * ((pair.outer * pair.inner - 1) / kGradTile<A> + 1); });
    const unsigned blocks = unsigned(p.shared ? all / p.pairs : all);
    SIMT_LAUNCH((gradient_kernel<S, T, A>), dim3(blocks), dim3(kGradThreads), 0, stream, p);
  });
  return launch_error();
}

}  // namespace fastkd::feature_ensemble
