// multi_label on CUDA: how many threads share a row, the launches. No torch header.
#include "core/cuda/launch.cuh"
#include "core/cuda/row_kernels.cuh"
#include "multi_label/elements.cuh"

namespace fastkd::multi_label {
inline namespace FASTKD_TARGET {
namespace {

// Elements of a thread: a vector of 16 bytes, of 16-bit types 8 bytes; with 8 elements a kernel would need 174 registers.
template <class S>
constexpr int kVectorItems = sizeof(S) == 8 ? 2 : 4;

// A thread for a row of few classes, one by one; a warp; a block, tile by tile.
using Single = RowPolicy<1, 256, 1>;
template <class S>
using Warp = RowPolicy<32, 4, kVectorItems<S>>;
template <class S>
using Block = RowPolicy<256, 1, kVectorItems<S>>;
constexpr int64_t kSingleClasses = 4, kWarpTiles = 4;

template <int Items, class A>
Params<A> make_params(const Args& args) {
  Params<A> p{};
  p.rows = args.rows;
  p.classes = args.classes;
  p.ignore_index = args.ignore_index;
  p.teachers = args.teachers;
  p.student = args.student;
  p.labels = args.labels;
  const bool stored = !args.need_grad || reinterpret_cast<uintptr_t>(args.grad) % 16 == 0;
  p.vectors = unsigned(stored && rows_aligned<Items>(args.student, args.classes)) << kStudentBit;
  if (args.labels.data) p.vectors |= unsigned(rows_aligned<Items>(args.labels, args.classes)) << kLabelsBit;
  for (int k = 0; k < args.teachers; ++k) {
    p.teacher[k] = args.teacher[k];
    p.vectors |= unsigned(rows_aligned<Items>(args.teacher[k], args.classes)) << k;
    p.host_weight[k] = args.host_weight ? A(args.host_weight[k]) : A(0);
  }
  for (int k = 0; k < args.teachers || k == 0; ++k) {
    const Scale<A> scale = temperature_scale<A>(args.temperature[k], args.scale_by_t2);
    p.inv_t[k] = A(1 / args.temperature[k]);
    p.scale_loss[k] = scale.loss;
    p.scale_grad[k] = scale.grad;
  }
  p.target = args.target;
  p.pos_weight = static_cast<const A*>(args.pos_weight);
  p.weight = args.host_weight ? nullptr : static_cast<const A*>(args.weight);
  p.weight_stride_teacher = args.weight_stride_teacher;
  p.weight_stride_row = args.weight_stride_row;
  p.temperature = A(args.temperature[0]);
  p.kd_weight = A(args.kd_weight);
  p.ce_weight = A(args.ce_weight);
  p.class_factor = A(args.class_factor);
  p.probs = args.combine == Combine::probs;
  p.uniform = args.uniform;
  p.cross_entropy = args.cross_entropy;
  p.terms = args.terms;
  p.need_grad = args.need_grad;
  p.row_loss = static_cast<A*>(args.row_loss);
  p.grad = args.grad;
  p.saved = static_cast<A*>(args.saved);
  p.factor = stored_factor<A>(args);
  return p;
}

template <class S, class A, class P>
void launch(const Args& args, cudaStream_t stream) {
  const Params<A> p = make_params<P::kItems, A>(args);
  const dim3 grid(unsigned((args.rows + P::kRows - 1) / P::kRows)), block(P::kBlock);
  if (args.combine == Combine::losses)
    SIMT_LAUNCH((elements_kernel<S, A, P, false>), grid, block, 0, stream, p);
  else
    SIMT_LAUNCH((elements_kernel<S, A, P, true>), grid, block, 0, stream, p);
}

template <class S, class A>
void launch_for_length(const Args& args, cudaStream_t stream) {
  if (args.classes <= kSingleClasses) return launch<S, A, Single>(args, stream);
  if (args.classes <= kWarpTiles * Warp<S>::kTile) return launch<S, A, Warp<S>>(args, stream);
  launch<S, A, Block<S>>(args, stream);
}

}  // namespace
}  // namespace FASTKD_TARGET

const char* forward_cuda(const Args& given, void* stream_handle) {
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  Args args = given;
  const DType type = args.student.type;
  const int64_t bytes = args.need_grad ? args.rows * args.classes * bytes_of(type) : 0;
  const RowFactor factor = launch_factor(args, type, bytes, stream);
  args.row_factor = factor.known;
  args.counted = factor.counted;
  if (args.rows > 0) dispatch(type, [&]<class S, class A>() { launch_for_length<S, A>(args, stream); });
  launch_reduce(args, type, losses_of(args), factor.whole, stream);
  return launch_error();
}

}  // namespace fastkd::multi_label
