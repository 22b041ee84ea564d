// multi_teacher on CUDA: forward, then its reduction over rows, then backward. No torch header.
#include "core/cuda/launch.cuh"
#include "core/cuda/row_kernels.cuh"
#include "multi_teacher/rows.cuh"
#include "multi_teacher/stream_rows.cuh"

namespace fastkd::multi_teacher {

int64_t scratch_numbers_cuda(const Args& args) {
  const bool streamed = args.stream || args.classes > kMaxOnChip<float>;
  if (!streamed || args.rows == 0 || args.student.type == DType::f64) return 0;
  const int64_t parts = args.rows < kWholeRows ? kMostParts : 1, groups = groups_of(args.teachers);
  return parts * groups == 1 ? 0 : args.rows * parts * groups * kPartNumbers<kVectorTeachers>;
}

const char* forward_cuda(const Args& given, void* stream_handle) {
  Args args = given;
  const bool wide = args.student.type == DType::f64;
  const int64_t most = wide ? kMaxOnChip<double> : kMaxOnChip<float>;
  if (args.kl && args.classes > most) return "statistics of a row that is too long to be on chip";
  if (args.divergence != Divergence::forward && (args.kl || (args.classes > most && !args.stream)))
    return "other divergences than forward: without statistics, and long rows streamed";
  if (args.softcap && !args.stream) return "softcap and logit_scale: rows that are streamed";
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  const bool stored = args.need_grad && !args.stream;
  const int64_t bytes = stored ? args.rows * args.columns * bytes_of(args.student.type) : 0;
  const RowFactor factor = launch_factor(args, args.student.type, bytes, stream);
  args.row_factor = factor.known;
  args.counted = factor.counted;
  if (args.rows > 0) dispatch(args.student.type, [&]<class S, class A>() { forward_rows<S>(args, stream); });
  launch_reduce(args, args.student.type, losses_of(args), factor.whole, stream);
  return launch_error();
}

const char* backward_cuda(const BackwardArgs& args, void* stream_handle) {
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  dispatch(args.type, [&]<class S, class A>() {
    launch_scale<S, A>({args.stored,
                        args.grad,
                        static_cast<const A*>(args.grad_loss),
                        static_cast<const A*>(args.aux),
                        static_cast<const A*>(args.saved),
                        args.reduction == Reduction::none,
                        args.rows,
                        args.classes,
                        1,
                        {0}},
                       stream);
  });
  return launch_error();
}

const char* stream_backward_cuda(const Args& args, const void* grad_loss, void* stream_handle) {
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  if (args.rows == 0) return nullptr;
  dispatch(args.student.type, [&]<class S, class A>() { stream_backward_rows<S>(args, grad_loss, stream); });
  return launch_error();
}

}  // namespace fastkd::multi_teacher
