// multi_teacher: schema, allocation, tensors to Args. Compiled into the CPU library, the CUDA library and the tests' host
// build of the CUDA kernels.
#include "multi_teacher/op.h"

#include <tuple>
#include <vector>

#include "core/run.h"
#include "group_stats/tensors.h"

namespace fastkd::multi_teacher {
namespace {

// What Args points into, kept alive for the call.
struct Inputs {
  Tensor student;
  NetworkRows teachers;
  std::optional<Tensor> target, weights;
  std::vector<double> temperatures, host_weights;
  Args args;
};

struct Options {
  int64_t combine;
  double ce_weight, label_smoothing;
  int64_t ignore_index;
  bool scale_by_t2;
  int64_t reduction;
};

void add_weights(Inputs& in, const std::optional<Tensor>& weights, const std::vector<double>& host) {
  Args& args = in.args;
  if (!weights) {
    STD_TORCH_CHECK(int(host.size()) == args.teachers, "fastkd: one weight per teacher");
    in.host_weights = host;
    return;
  }
  in.weights = contiguous_weights(*weights, args.teachers, args.rows, args.student_type);
  const bool per_row = in.weights->dim() == 2;
  args.weight_stride_teacher = per_row ? args.rows : 1;
  args.weight_stride_row = per_row ? 1 : 0;
}

void fill_inputs(Inputs& in, const Tensor& student, const std::vector<Tensor>& teachers,
                 const std::optional<Tensor>& target, const std::optional<Tensor>& weights,
                 const std::vector<double>& host_weights, const std::vector<double>& temperatures, const Options& o) {
  Args& args = in.args;
  in.student = with_contiguous_rows(student);
  args.rows = student.size(0);
  args.classes = student.size(1);
  args.student_type = dtype_of(student);
  args.teacher_type = in.teachers.add(teachers, args.rows, args.classes);
  check_teacher_type(args.teacher_type, args.student_type);
  args.teachers = int(teachers.size());
  add_weights(in, weights, host_weights);
  in.target = contiguous_target(target, args.rows);
  const bool several = temperatures.size() > 1;
  STD_TORCH_CHECK(temperatures.size() == (several ? teachers.size() : 1), "fastkd: one temperature, or one per teacher");
  in.temperatures = several ? temperatures : std::vector<double>(teachers.size(), temperatures[0]);
  args.several_temperatures = several;

  args.student = in.student.data_ptr();
  args.student_stride = in.student.stride(0);
  args.teacher = in.teachers.data.data();
  args.teacher_stride = in.teachers.strides.data();
  args.target = optional_data<int64_t>(in.target);
  args.weight = optional_data<void>(in.weights);
  args.host_weight = in.weights ? nullptr : in.host_weights.data();
  args.temperature = in.temperatures.data();
  args.combine = Combine(o.combine);
  args.ce_weight = o.ce_weight;
  args.label_smoothing = o.label_smoothing;
  args.ignore_index = o.ignore_index;
  args.scale_by_t2 = o.scale_by_t2;
  args.reduction = Reduction(o.reduction);
  STD_TORCH_CHECK(args.ce_weight == 0 || in.target, "fastkd: ce_weight without a target");
}

#if defined(FASTKD_BACKEND_CPU)

void run_forward(Args& args, const Tensor&) {
  const int64_t work = args.classes * (args.teachers + 1);
  forward_over_rows(FASTKD_KERNELS_OF(multi_teacher), args, args.student_type, 1, work);
}

void run_backward(const BackwardArgs& args, const Tensor&) {
  const CpuKernels& kernels = FASTKD_KERNELS_OF(multi_teacher);
  torch::stable::parallel_for(0, args.rows, grain(args.classes),
                              [&](int64_t begin, int64_t end) { kernels.backward(args, begin, end); });
}

void run_stream_backward(const Args&, const Tensor&, const Tensor&) {
  STD_TORCH_CHECK(false, "fastkd: the CPU stores gradients and streams nothing");
}

#else

void run_forward(Args& args, const Tensor& like) {
  STD_TORCH_CHECK(args.teachers <= kMaxLaunchTeachers, "fastkd: too many teachers for one launch");
  on_stream("multi_teacher", like, [&](void* stream) { return forward_cuda(args, stream); });
}

void run_backward(const BackwardArgs& args, const Tensor& like) {
  on_stream("multi_teacher", like, [&](void* stream) { return backward_cuda(args, stream); });
}

void run_stream_backward(const Args& args, const Tensor& grad, const Tensor& like) {
  on_stream("multi_teacher", like, [&](void* stream) { return stream_backward_cuda(args, grad.data_ptr(), stream); });
}

#endif

int64_t saved_columns(const Args& args) { return 3 * int64_t(args.teachers) + 2; }

using Results = std::tuple<Tensor, Tensor, Tensor, Tensor>;

Results forward_of(Inputs& in, const Tensor& student, bool need_grad, bool stream) {
  Args& args = in.args;
  args.need_grad = need_grad;
  args.stream = stream;
  const ScalarType type = accumulate_type(args.student_type);
  const bool stored = need_grad && !stream, streamed = need_grad && stream;
  const bool scaled = stored && args.student_type == DType::f16;

  Tensor rows = empty_like_device(student, {args.rows}, type);
  Tensor loss = args.reduction == Reduction::none ? rows : empty_like_device(student, {}, type);
  Tensor grad = stored ? empty_like_device(student, {args.rows, args.classes}, student.scalar_type())
                       : empty_like_device(student, {0}, student.scalar_type());
  Tensor saved = streamed ? empty_like_device(student, {args.rows, saved_columns(args)}, type)
                          : empty_like_device(student, {scaled ? args.rows : 0}, type);
  Tensor aux = empty_like_device(student, {2}, type);
  args.row_loss = rows.data_ptr();
  args.loss = args.reduction == Reduction::none ? nullptr : loss.data_ptr();
  args.grad = grad.data_ptr();
  args.saved = saved.data_ptr();
  args.aux = aux.data_ptr();
  run_forward(args, student);
  return {loss, grad, saved, aux};
}

Results forward(const Tensor& student, const std::vector<Tensor>& teachers, const std::optional<Tensor>& target,
                const std::optional<Tensor>& weights, const std::vector<double>& host_weights,
                const std::vector<double>& temperatures, int64_t combine, double ce_weight, double label_smoothing,
                int64_t ignore_index, bool scale_by_t2, int64_t reduction, bool need_grad, bool stream) {
  Inputs in;
  fill_inputs(in, student, teachers, target, weights, host_weights, temperatures,
              {combine, ce_weight, label_smoothing, ignore_index, scale_by_t2, reduction});
  return forward_of(in, student, need_grad, stream);
}

// Also each teacher's divergence [K, R] and the statistics of student and teachers, each [K + 1, R].
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> forward_stats(
    const Tensor& student, const std::vector<Tensor>& teachers, const std::optional<Tensor>& target,
    const std::optional<Tensor>& weights, const std::vector<double>& host_weights,
    const std::vector<double>& temperatures, int64_t combine, double ce_weight, double label_smoothing,
    int64_t ignore_index, bool scale_by_t2, int64_t reduction, bool need_grad) {
  Inputs in;
  fill_inputs(in, student, teachers, target, weights, host_weights, temperatures,
              {combine, ce_weight, label_smoothing, ignore_index, scale_by_t2, reduction});
  Args& args = in.args;
  const ScalarType type = accumulate_type(args.student_type);
  Tensor kl = empty_like_device(student, {args.teachers, args.rows}, type);
  const group_stats::OutputTensors stats(student, args.teachers + 1, args.rows, type);
  args.kl = kl.data_ptr();
  args.stats = stats.pointers();
  return std::tuple_cat(forward_of(in, student, need_grad, false), std::make_tuple(kl), stats.all());
}

Tensor backward(const Tensor& grad_loss, const Tensor& grad_rows, const Tensor& saved, const Tensor& aux, int64_t reduction) {
  BackwardArgs args;
  args.rows = grad_rows.size(0);
  args.classes = grad_rows.size(1);
  args.type = dtype_of(grad_rows);
  args.reduction = Reduction(reduction);
  check_grad_loss(grad_loss, 1, args.rows, args.reduction, aux.scalar_type());
  Tensor grad = empty_like_device(grad_rows, {args.rows, args.classes}, grad_rows.scalar_type());
  args.grad_loss = grad_loss.data_ptr();
  args.grad_rows = grad_rows.data_ptr();
  args.saved = saved.numel() > 0 ? saved.data_ptr() : nullptr;
  args.aux = aux.data_ptr();
  args.grad = grad.data_ptr();
  run_backward(args, grad_rows);
  return grad;
}

Tensor stream_backward(const Tensor& grad_loss, const Tensor& student, const std::vector<Tensor>& teachers,
                       const std::optional<Tensor>& target, const std::optional<Tensor>& weights, const Tensor& saved,
                       const Tensor& aux, const std::vector<double>& host_weights,
                       const std::vector<double>& temperatures, int64_t combine, double ce_weight,
                       double label_smoothing, int64_t ignore_index, bool scale_by_t2, int64_t reduction) {
  Inputs in;
  fill_inputs(in, student, teachers, target, weights, host_weights, temperatures,
              {combine, ce_weight, label_smoothing, ignore_index, scale_by_t2, reduction});
  Args& args = in.args;
  check_grad_loss(grad_loss, 1, args.rows, args.reduction, aux.scalar_type());
  STD_TORCH_CHECK(saved.numel() == args.rows * saved_columns(args), "fastkd: the saved states are not streamed ones");
  Tensor grad = empty_like_device(student, {args.rows, args.classes}, student.scalar_type());
  args.grad = grad.data_ptr();
  args.saved = saved.data_ptr();
  args.aux = aux.data_ptr();
  run_stream_backward(args, grad_loss, student);
  return grad;
}

}  // namespace
}  // namespace fastkd::multi_teacher

#if !defined(FASTKD_BACKEND_CUDA)  // the CUDA library implements what the CPU library declares
STABLE_TORCH_LIBRARY_FRAGMENT(FASTKD_LIBRARY, m) {
  m.def(
      "multi_teacher_forward(Tensor student, Tensor[] teachers, Tensor? target, Tensor? weights, float[] host_weights, "
      "float[] temperatures, int combine, float ce_weight, float label_smoothing, int ignore_index, bool scale_by_t2, "
      "int reduction, bool need_grad, bool stream) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "multi_teacher_forward_stats(Tensor student, Tensor[] teachers, Tensor? target, Tensor? weights, "
      "float[] host_weights, float[] temperatures, int combine, float ce_weight, float label_smoothing, "
      "int ignore_index, bool scale_by_t2, int reduction, bool need_grad) -> (Tensor, Tensor, Tensor, Tensor, Tensor, "
      "Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("multi_teacher_backward(Tensor grad, Tensor rows, Tensor saved, Tensor aux, int reduction) -> Tensor");
  m.def(
      "multi_teacher_stream_backward(Tensor grad, Tensor student, Tensor[] teachers, Tensor? target, Tensor? weights, "
      "Tensor saved, Tensor aux, float[] host_weights, float[] temperatures, int combine, float ce_weight, "
      "float label_smoothing, int ignore_index, bool scale_by_t2, int reduction) -> Tensor");
}
#endif

STABLE_TORCH_LIBRARY_IMPL(FASTKD_LIBRARY, FASTKD_KEY, m) {
  m.impl("multi_teacher_forward", TORCH_BOX(&fastkd::multi_teacher::forward));
  m.impl("multi_teacher_forward_stats", TORCH_BOX(&fastkd::multi_teacher::forward_stats));
  m.impl("multi_teacher_backward", TORCH_BOX(&fastkd::multi_teacher::backward));
  m.impl("multi_teacher_stream_backward", TORCH_BOX(&fastkd::multi_teacher::stream_backward));
}
