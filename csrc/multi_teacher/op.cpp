// multi_teacher: schema, allocation, tensors to Args. Compiled into the CPU library, the CUDA library and the tests' host
// build of the CUDA kernels.
#include "multi_teacher/op.h"

#include <algorithm>
#include <limits>
#include <tuple>
#include <vector>

#include "core/constants.h"
#include "core/torch/run.h"
#include "group_stats/tensors.h"

namespace fastkd::multi_teacher {
namespace {

// What Args points into, kept alive for the call.
struct Inputs {
  Networks networks;  // the student, the teachers, the soft targets
  std::optional<Tensor> target, weights, shares;
  std::vector<double> temperatures, host_weights;
  Args args;
};

struct Options {
  const std::vector<double>&host_weights, &temperatures;
  int64_t combine;
  double kd_weight, ce_weight, label_smoothing;
  int64_t ignore_index;
  bool scale_by_t2;
  int64_t reduction;
  double num_items;
  bool uniform, labels, terms;
  int64_t divergence;
  const std::vector<double>& divergence_numbers;
  int64_t classes;
  const std::vector<double>&softcaps, &logit_scales;
};

void add_networks(Inputs& in, const Tensor& student, const std::vector<Tensor>& teachers, const std::optional<Tensor>& soft,
                  int64_t classes) {
  Args& args = in.args;
  args.columns = student.size(student.dim() - 1);
  args.classes = classes > 0 ? classes : args.columns;
  STD_TORCH_CHECK(args.classes > 0 && args.classes <= args.columns, "fastkd: logits without classes");
  args.rows = student.numel() / args.columns;
  args.teachers = int(teachers.size());
  in.networks.add(student, args.rows, args.columns);
  in.networks.add(teachers, args.rows, args.classes);
  if (soft) args.soft = in.networks.add(*soft, args.rows, args.classes);
  args.student = in.networks.list[0];
  args.teacher = in.networks.list.data() + 1;
}

void add_weights(Inputs& in, const std::optional<Tensor>& weights) {
  Args& args = in.args;
  if (!weights) {
    STD_TORCH_CHECK(int(in.host_weights.size()) == args.teachers, "fastkd: one weight per teacher");
    args.host_weight = in.host_weights.data();
    return;
  }
  in.weights = contiguous_weights(*weights, args.teachers, args.rows, args.student.type);
  const bool per_row = in.weights->dim() == 2;
  args.weight_stride_teacher = per_row ? args.rows : 1;
  args.weight_stride_row = per_row ? 1 : 0;
  args.weight = in.weights->data_ptr();
}

void add_caps(Inputs& in, const Options& o) {
  if (o.softcaps.empty()) return;
  const size_t networks = size_t(in.args.teachers) + 1;
  STD_TORCH_CHECK(o.softcaps.size() == networks && o.logit_scales.size() == networks, "fastkd: one softcap per network");
  in.args.softcap = o.softcaps.data();
  in.args.logit_scale = o.logit_scales.data();
}

void add_divergence(Inputs& in, const Options& o, const std::optional<Tensor>& shares) {
  Args& args = in.args;
  args.divergence = Divergence(o.divergence);
  STD_TORCH_CHECK(o.divergence_numbers.size() <= size_t(kMostDivergenceNumbers), "fastkd: too many numbers of a divergence");
  std::copy(o.divergence_numbers.begin(), o.divergence_numbers.end(), args.divergence_number);
  if (!shares) return;
  in.shares = contiguous_weights(*shares, 2, args.rows, args.student.type);
  const bool per_row = in.shares->dim() == 2;
  args.share = in.shares->data_ptr();
  args.share_stride_kind = per_row ? args.rows : 1;
  args.share_stride_row = per_row ? 1 : 0;
}

// `scalars`: kd_weight, ce_weight, num_items (0: none) and the temperatures, in the place of the numbers, where one of
// them came as a tensor: a schedule's value must not be part of a compiled graph.
void add_scalars(Inputs& in, const Options& o, const std::optional<Tensor>& scalars) {
  Args& args = in.args;
  args.kd_weight = o.kd_weight;
  args.ce_weight = o.ce_weight;
  args.items = o.num_items;
  in.temperatures = o.temperatures;
  if (scalars) {
    STD_TORCH_CHECK(scalars->is_cpu() && scalars->scalar_type() == ScalarType::Double && scalars->is_contiguous() &&
                        scalars->numel() == 3 + int64_t(o.temperatures.size()),
                    "fastkd: scalars must be float64 on the CPU");
    const double* value = static_cast<const double*>(scalars->data_ptr());
    args.kd_weight = value[0];
    args.ce_weight = value[1];
    args.items = value[2];
    in.temperatures.assign(value + 3, value + scalars->numel());
  }
  constexpr double kLargest = std::numeric_limits<double>::max();
  for (const double t : in.temperatures)
    STD_TORCH_CHECK(t > 0 && t <= kLargest, "multi_teacher_kd: temperature must be a finite number > 0, got ", t);
  STD_TORCH_CHECK(args.items >= 0 && args.items <= kLargest, "multi_teacher_kd: num_items must be > 0, got ", args.items);
  for (const double w : {args.kd_weight, args.ce_weight})
    STD_TORCH_CHECK(w >= -kLargest && w <= kLargest, "multi_teacher_kd: weights must be finite, got ", w);
}

void add_temperatures(Inputs& in) {
  Args& args = in.args;
  args.several_temperatures = in.temperatures.size() > 1;
  STD_TORCH_CHECK(in.temperatures.size() == (args.several_temperatures ? size_t(args.teachers) : 1),
                  "fastkd: one temperature, or one per teacher");
  if (!args.several_temperatures && args.teachers > 1) in.temperatures.resize(args.teachers, in.temperatures[0]);
  args.temperature = in.temperatures.data();
}

// Without a weight the distillation's teachers are not read, but for statistics.
void drop_teachers(Inputs& in, bool with_stats) {
  Args& args = in.args;
  in.host_weights.assign(args.teachers, 0.);
  args.host_weight = in.host_weights.data();
  args.weight = nullptr;
  args.uniform = false;
  args.kd_weight = 1;
  if (!with_stats) args.teachers = 0;
}

void fill_inputs(Inputs& in, const Tensor& student, const std::vector<Tensor>& teachers,
                 const std::optional<Tensor>& target, const std::optional<Tensor>& soft,
                 const std::optional<Tensor>& weights, const std::optional<Tensor>& shares,
                 const std::optional<Tensor>& scalars, const Options& o, bool with_stats = false) {
  Args& args = in.args;
  add_networks(in, student, teachers, soft, o.classes);
  check_devices(student, {pointer_to(target), pointer_to(weights), pointer_to(shares)});
  add_caps(in, o);
  add_divergence(in, o, shares);
  in.host_weights = o.host_weights;
  add_weights(in, weights);
  add_scalars(in, o, scalars);
  add_temperatures(in);
  in.target = contiguous_target(target, args.rows);
  args.target = optional_data<int64_t>(in.target);
  args.labels = o.labels && in.target && !soft;
  args.combine = Combine(o.combine);
  args.label_smoothing = o.label_smoothing;
  args.ignore_index = o.ignore_index;
  args.scale_by_t2 = o.scale_by_t2;
  args.reduction = Reduction(o.reduction);
  args.uniform = o.uniform && args.teachers > 0;
  args.terms = o.terms;
  STD_TORCH_CHECK(args.ce_weight == 0 || args.labels || soft, "fastkd: ce_weight without a target");
  args.cross_entropy = (args.ce_weight != 0 || args.terms) && (args.labels || soft);
  if (args.kd_weight == 0) drop_teachers(in, with_stats);
}

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
  const bool stored = need_grad && !stream, streamed = need_grad && stream;
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
  return saved_columns(args) + 3 * (int64_t(teachers.size()) - args.teachers);
}

Results forward(const Tensor& student, const std::vector<Tensor>& teachers, const std::optional<Tensor>& target,
                const std::optional<Tensor>& soft, const std::optional<Tensor>& weights,
                const std::optional<Tensor>& shares, const std::optional<Tensor>& scalars,
                const std::vector<double>& host_weights, const std::vector<double>& temperatures, int64_t combine,
                double kd_weight, double ce_weight, double label_smoothing, int64_t ignore_index, bool scale_by_t2,
                int64_t reduction, double num_items, bool uniform, bool labels, bool terms, int64_t divergence,
                const std::vector<double>& divergence_numbers, int64_t classes, const std::vector<double>& softcaps,
                const std::vector<double>& logit_scales, bool need_grad, bool stream) {
  Inputs in;
  fill_inputs(in, student, teachers, target, soft, weights, shares, scalars,
              {host_weights, temperatures, combine, kd_weight, ce_weight, label_smoothing, ignore_index, scale_by_t2,
               reduction, num_items, uniform, labels, terms, divergence, divergence_numbers, classes, softcaps,
               logit_scales});
  return forward_of(in, student, need_grad, stream, saved_width(teachers, in.args));
}

// Also each teacher's divergence [K, R] and the statistics of student and teachers, each [K + 1, R].
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> forward_stats(
    const Tensor& student, const std::vector<Tensor>& teachers, const std::optional<Tensor>& target,
    const std::optional<Tensor>& weights, const std::optional<Tensor>& shares, const std::optional<Tensor>& scalars,
    const std::vector<double>& host_weights, const std::vector<double>& temperatures, int64_t combine, double kd_weight,
    double ce_weight, double label_smoothing, int64_t ignore_index, bool scale_by_t2, int64_t reduction, double num_items,
    bool uniform, bool labels, bool terms, int64_t divergence, const std::vector<double>& divergence_numbers,
    int64_t classes, const std::vector<double>& softcaps, const std::vector<double>& logit_scales, bool need_grad) {
  Inputs in;
  fill_inputs(in, student, teachers, target, std::nullopt, weights, shares, scalars,
              {host_weights, temperatures, combine, kd_weight, ce_weight, label_smoothing, ignore_index, scale_by_t2,
               reduction, num_items, uniform, labels, terms, divergence, divergence_numbers, classes, softcaps,
               logit_scales},
              true);
  Args& args = in.args;
  const ScalarType type = accumulate_type(args.student.type);
  Tensor kl = empty_like_device(student, {args.teachers, args.rows}, type);
  const group_stats::OutputTensors stats(student, args.teachers + 1, args.rows, type);
  args.kl = kl.data_ptr();
  args.stats = stats.pointers();
  return std::tuple_cat(forward_of(in, student, need_grad, false, 0), std::make_tuple(kl), stats.all());
}

void backward_into(const Tensor& grad_loss, const Tensor& grad_rows, const Tensor& saved, const Tensor& aux,
                   int64_t reduction, const Tensor& grad) {
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
                       const std::optional<Tensor>& scalars, const Tensor& saved,
                       const Tensor& aux, const std::vector<double>& host_weights,
                       const std::vector<double>& temperatures, int64_t combine, double kd_weight, double ce_weight,
                       double label_smoothing, int64_t ignore_index, bool scale_by_t2, int64_t reduction,
                       double num_items, bool uniform, bool labels, bool terms, int64_t divergence,
                       const std::vector<double>& divergence_numbers, int64_t classes,
                       const std::vector<double>& softcaps, const std::vector<double>& logit_scales) {
  Inputs in;
  fill_inputs(in, student, teachers, target, soft, weights, shares, scalars,
              {host_weights, temperatures, combine, kd_weight, ce_weight, label_smoothing, ignore_index, scale_by_t2,
               reduction, num_items, uniform, labels, terms, divergence, divergence_numbers, classes, softcaps,
               logit_scales});
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

int64_t columns_of_5(bool soft) {
  Args args;
  args.teachers = 5;
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
                 {"losses", int(Combine::losses)}, {"probs", int(Combine::probs)}, {"logits", int(Combine::logits)},
                 {"none", int(Reduction::none)}, {"sum", int(Reduction::sum)}, {"mean", int(Reduction::mean)},
                 {"forward", int(Divergence::forward)}, {"pair", int(Divergence::pair)},
                 {"mixture", int(Divergence::mixture)}, {"tvd", int(Divergence::tvd)})
