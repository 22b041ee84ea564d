// multi_teacher: schema, allocation. Compiled into the CPU library, the CUDA library and the tests' host
// build of the CUDA kernels.
#include "multi_teacher/tensors.h"

#include <tuple>
#include <vector>

#include "core/constants.h"
#include "core/torch/run.h"
#include "group_stats/tensors.h"

namespace fastkd::multi_teacher {
namespace {

#if defined(FASTKD_BACKEND_CPU)

void run_forward(Args& args, const Tensor&) {
  const int64_t work = args.classes * (args.teachers + 1);
  forward_over_rows(FASTKD_KERNELS_OF(multi_teacher), args, args.student.type, losses_of(args), work);
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
  const int64_t numbers = scratch_numbers_cuda(args);
  const Tensor scratch = empty_like_device(like, {numbers}, ScalarType::Float);
  args.scratch = numbers > 0 ? scratch.data_ptr() : nullptr;
  on_stream("multi_teacher", like, [&](void* stream) { return forward_cuda(args, stream); });
}

void run_backward(const BackwardArgs& args, const Tensor& like) {
  on_stream("multi_teacher", like, [&](void* stream) { return backward_cuda(args, stream); });
}

void run_stream_backward(const Args& args, const Tensor& grad, const Tensor& like) {
  on_stream("multi_teacher", like, [&](void* stream) { return stream_backward_cuda(args, grad.data_ptr(), stream); });
}

#endif

using Results = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// Losses [R], [] or, with terms, 3 of them.
Tensor empty_losses(const Args& args, const Tensor& like, bool of_rows, ScalarType type) {
  if (of_rows) return args.terms ? empty_like_device(like, {3, args.rows}, type) : empty_like_device(like, {args.rows}, type);
  return args.terms ? empty_like_device(like, {3}, type) : empty_like_device(like, {}, type);
}

// The gradient of columns that are no classes.
void clear_padding(const Args& args, Tensor& grad) {
  if (args.columns == args.classes || args.rows == 0) return;
  Tensor padding = torch::stable::narrow(grad, 1, args.classes, args.columns - args.classes);
  torch::stable::zero_(padding);
}

Results forward_of(Inputs& in, const Tensor& student, bool need_grad, bool stream, int64_t saved_width) {
  Args& args = in.args;
  args.need_grad = need_grad;
  args.stream = stream;
  const ScalarType type = accumulate_type(args.student.type);
  const bool stored = need_grad && !stream;
  const bool streamed = stream && (need_grad || args.divergence != Divergence::forward);  // whose second read needs the states
  const bool scaled = stored && args.student.type == DType::f16;

  Tensor rows = empty_losses(args, student, true, type);
  Tensor loss = args.reduction == Reduction::none ? rows : empty_losses(args, student, false, type);
  Tensor grad = stored ? empty_like_device(student, {args.rows, args.columns}, student.scalar_type())
                       : empty_like_device(student, {0}, student.scalar_type());
  Tensor saved = streamed ? empty_like_device(student, {args.rows, saved_width}, type)
                          : empty_like_device(student, {scaled ? args.rows : 0}, type);
  Tensor aux = empty_like_device(student, {2}, type);
  args.row_loss = rows.data_ptr();
  args.loss = args.reduction == Reduction::none ? nullptr : loss.data_ptr();
  args.grad = grad.data_ptr();
  args.saved = saved.data_ptr();
  args.aux = aux.data_ptr();
  run_forward(args, student);
  if (stored) clear_padding(args, grad);
  return {loss, grad, saved, aux};
}

// Of the schema: a kd_weight of 0 leaves fewer teachers to Args, but not to the fake kernel.
int64_t saved_width(const std::vector<Tensor>& teachers, const Args& args) {
  return saved_columns(args) + saved_per_teacher(args.divergence) * (int64_t(teachers.size()) - args.teachers);
}

Results forward(const Tensor& student, const std::vector<Tensor>& teachers, const std::optional<Tensor>& target,
                const std::optional<Tensor>& soft, const std::optional<Tensor>& weights, const std::optional<Tensor>& shares,
                const std::optional<Tensor>& scalars, const std::vector<double>& host_weights,
                const std::vector<double>& temperatures, int64_t combine, double kd_weight, double ce_weight,
                double label_smoothing, int64_t ignore_index, bool scale_by_t2, int64_t reduction, double num_items,
                bool uniform, bool labels, bool terms, int64_t divergence, const std::vector<double>& divergence_numbers,
                int64_t classes, const std::vector<double>& softcaps, const std::vector<double>& logit_scales, bool need_grad,
                bool stream) {
  Inputs in;
  fill_inputs(in, student, teachers, target, soft, weights, shares, scalars,
              {host_weights, temperatures, combine, kd_weight, ce_weight, label_smoothing, ignore_index, scale_by_t2, reduction,
               num_items, uniform, labels, terms, divergence, divergence_numbers, classes, softcaps, logit_scales});
  return forward_of(in, student, need_grad, stream, saved_width(teachers, in.args));
}

// Also each teacher's divergence [K, R] and the statistics of student and teachers, each [K + 1, R].
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> forward_stats(
    const Tensor& student, const std::vector<Tensor>& teachers, const std::optional<Tensor>& target,
    const std::optional<Tensor>& weights, const std::optional<Tensor>& shares, const std::optional<Tensor>& scalars,
    const std::vector<double>& host_weights, const std::vector<double>& temperatures, int64_t combine, double kd_weight,
    double ce_weight, double label_smoothing, int64_t ignore_index, bool scale_by_t2, int64_t reduction, double num_items,
    bool uniform, bool labels, bool terms, int64_t divergence, const std::vector<double>& divergence_numbers, int64_t classes,
    const std::vector<double>& softcaps, const std::vector<double>& logit_scales, bool need_grad) {
  Inputs in;
  fill_inputs(in, student, teachers, target, std::nullopt, weights, shares, scalars,
              {host_weights, temperatures, combine, kd_weight, ce_weight, label_smoothing, ignore_index, scale_by_t2, reduction,
               num_items, uniform, labels, terms, divergence, divergence_numbers, classes, softcaps, logit_scales},
              true);
  Args& args = in.args;
  const ScalarType type = accumulate_type(args.student.type);
  Tensor kl = empty_like_device(student, {args.teachers, args.rows}, type);
  const group_stats::OutputTensors stats(student, args.teachers + 1, args.rows, type);
  args.kl = kl.data_ptr();
  args.stats = stats.pointers();
  return std::tuple_cat(forward_of(in, student, need_grad, false, 0), std::make_tuple(kl), stats.all());
}

void backward_into(const Tensor& grad_loss, const Tensor& grad_rows, const Tensor& saved, const Tensor& aux, int64_t reduction,
                   const Tensor& grad) {
  BackwardArgs args;
  args.rows = grad_rows.size(0);
  args.classes = grad_rows.size(1);
  args.type = dtype_of(grad_rows);
  args.reduction = Reduction(reduction);
  check_stored(grad_rows, saved, aux, args.rows);
  check_grad_loss(grad_loss, 1, args.rows, args.reduction, aux);
  args.grad_loss = grad_loss.data_ptr();
  args.stored = grad_rows.data_ptr();
  args.saved = saved.numel() > 0 ? saved.data_ptr() : nullptr;
  args.aux = aux.data_ptr();
  args.grad = grad.data_ptr();
  run_backward(args, grad_rows);
}

Tensor backward(const Tensor& grad_loss, const Tensor& grad_rows, const Tensor& saved, const Tensor& aux, int64_t reduction) {
  Tensor grad = empty_like_device(grad_rows, {grad_rows.size(0), grad_rows.size(1)}, grad_rows.scalar_type());
  backward_into(grad_loss, grad_rows, saved, aux, reduction, grad);
  return grad;
}

void backward_in_place(const Tensor& grad_loss, const Tensor& grad_rows, const Tensor& saved, const Tensor& aux,
                       int64_t reduction) {
  backward_into(grad_loss, grad_rows, saved, aux, reduction, grad_rows);
}

Tensor stream_backward(const Tensor& grad_loss, const Tensor& student, const std::vector<Tensor>& teachers,
                       const std::optional<Tensor>& target, const std::optional<Tensor>& soft,
                       const std::optional<Tensor>& weights, const std::optional<Tensor>& shares,
                       const std::optional<Tensor>& scalars, const Tensor& saved, const Tensor& aux,
                       const std::vector<double>& host_weights, const std::vector<double>& temperatures, int64_t combine,
                       double kd_weight, double ce_weight, double label_smoothing, int64_t ignore_index, bool scale_by_t2,
                       int64_t reduction, double num_items, bool uniform, bool labels, bool terms, int64_t divergence,
                       const std::vector<double>& divergence_numbers, int64_t classes, const std::vector<double>& softcaps,
                       const std::vector<double>& logit_scales) {
  Inputs in;
  fill_inputs(in, student, teachers, target, soft, weights, shares, scalars,
              {host_weights, temperatures, combine, kd_weight, ce_weight, label_smoothing, ignore_index, scale_by_t2, reduction,
               num_items, uniform, labels, terms, divergence, divergence_numbers, classes, softcaps, logit_scales});
  Args& args = in.args;
  check_devices(student, {&saved, &aux});
  check_grad_loss(grad_loss, 1, args.rows, args.reduction, aux);
  STD_TORCH_CHECK(saved.numel() == args.rows * saved_width(teachers, args) && saved.is_contiguous() &&
                      saved.scalar_type() == accumulate_type(args.student.type) && aux.is_contiguous(),
                  "fastkd: the saved states are not streamed ones");
  Tensor grad = empty_like_device(student, {args.rows, args.columns}, student.scalar_type());
  args.grad = grad.data_ptr();
  args.saved = saved.data_ptr();
  args.aux = aux.data_ptr();
  run_stream_backward(args, grad_loss, student);
  clear_padding(args, grad);
  return grad;
}

int64_t columns_of_5(bool soft, Divergence divergence = Divergence::forward) {
  Args args;
  args.teachers = 5;
  args.divergence = divergence;
  args.soft.data = soft ? &args : nullptr;
  return saved_columns(args);
}

}  // namespace
}  // namespace fastkd::multi_teacher

#if !defined(FASTKD_BACKEND_CUDA)  // the CUDA library implements what the CPU library declares
STABLE_TORCH_LIBRARY_FRAGMENT(FASTKD_LIBRARY, m) {
  m.def(
      "multi_teacher_forward(Tensor student, Tensor[] teachers, Tensor? target, Tensor? soft, Tensor? weights, "
      "Tensor? shares, Tensor? scalars, float[] host_weights, float[] temperatures, int combine, float kd_weight, float ce_weight, "
      "float label_smoothing, int ignore_index, bool scale_by_t2, int reduction, float num_items, bool uniform, "
      "bool labels, bool terms, int divergence, float[] divergence_numbers, int classes, float[] softcaps, "
      "float[] logit_scales, bool need_grad, bool stream) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "multi_teacher_forward_stats(Tensor student, Tensor[] teachers, Tensor? target, Tensor? weights, Tensor? shares, "
      "Tensor? scalars, float[] host_weights, float[] temperatures, int combine, float kd_weight, float ce_weight, "
      "float label_smoothing, int ignore_index, bool scale_by_t2, int reduction, float num_items, bool uniform, "
      "bool labels, bool terms, int divergence, float[] divergence_numbers, int classes, float[] softcaps, "
      "float[] logit_scales, bool need_grad) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, "
      "Tensor, Tensor, Tensor)");
  m.def("multi_teacher_backward(Tensor grad, Tensor rows, Tensor saved, Tensor aux, int reduction) -> Tensor");
  m.def("multi_teacher_backward_(Tensor grad, Tensor(a!) rows, Tensor saved, Tensor aux, int reduction) -> ()");
  m.def(
      "multi_teacher_stream_backward(Tensor grad, Tensor student, Tensor[] teachers, Tensor? target, Tensor? soft, "
      "Tensor? weights, Tensor? shares, Tensor? scalars, Tensor saved, Tensor aux, float[] host_weights, float[] temperatures, "
      "int combine, float kd_weight, float ce_weight, float label_smoothing, int ignore_index, bool scale_by_t2, "
      "int reduction, float num_items, bool uniform, bool labels, bool terms, int divergence, "
      "float[] divergence_numbers, int classes, float[] softcaps, float[] logit_scales) -> Tensor");
}
#endif

STABLE_TORCH_LIBRARY_IMPL(FASTKD_LIBRARY, FASTKD_KEY, m) {
  m.impl("multi_teacher_forward", TORCH_BOX(&fastkd::multi_teacher::forward));
  m.impl("multi_teacher_forward_stats", TORCH_BOX(&fastkd::multi_teacher::forward_stats));
  m.impl("multi_teacher_backward", TORCH_BOX(&fastkd::multi_teacher::backward));
  m.impl("multi_teacher_backward_", TORCH_BOX(&fastkd::multi_teacher::backward_in_place));
  m.impl("multi_teacher_stream_backward", TORCH_BOX(&fastkd::multi_teacher::stream_backward));
}

using fastkd::multi_teacher::Combine, fastkd::multi_teacher::Divergence, fastkd::Reduction;
FASTKD_CONSTANTS(multi_teacher, {"launch_teachers", fastkd::multi_teacher::kMaxLaunchTeachers},
                 {"on_chip_classes", fastkd::multi_teacher::kMaxOnChip<float>},
                 {"on_chip_classes_float64", fastkd::multi_teacher::kMaxOnChip<double>},
                 {"saved_columns_5", fastkd::multi_teacher::columns_of_5(false)},
                 {"saved_columns_5_soft", fastkd::multi_teacher::columns_of_5(true)},
                 {"saved_columns_5_tvd", fastkd::multi_teacher::columns_of_5(false, Divergence::tvd)},
                 {"losses", int(Combine::losses)}, {"probs", int(Combine::probs)}, {"logits", int(Combine::logits)},
                 {"none", int(Reduction::none)}, {"sum", int(Reduction::sum)}, {"mean", int(Reduction::mean)},
                 {"forward", int(Divergence::forward)}, {"pair", int(Divergence::pair)}, {"mixture", int(Divergence::mixture)},
                 {"tvd", int(Divergence::tvd)})
