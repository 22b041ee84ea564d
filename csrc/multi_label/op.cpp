// multi_label: schema, allocation, tensors to Args. Compiled into the CPU library, the CUDA library and the tests' host build
// of the CUDA kernels. The backward of what is stored here is multi_teacher's.
#include "multi_label/op.h"

#include <tuple>
#include <vector>

#include "core/constants.h"
#include "core/torch/run.h"
#include "core/torch/teachers.h"

namespace fastkd::multi_label {
namespace {

// What Args points into, kept alive for the call.
struct Inputs {
  Networks networks;  // the student, the teachers, the labels
  std::optional<Tensor> target, pos_weight, weights;
  std::vector<double> temperatures, host_weights;
  Args args;
};

void add_networks(Inputs& in, const Tensor& student, const std::vector<Tensor>& teachers, const std::optional<Tensor>& labels) {
  Args& args = in.args;
  args.classes = student.size(student.dim() - 1);
  STD_TORCH_CHECK(args.classes > 0, "fastkd: logits without classes");
  args.rows = student.numel() / args.classes;
  args.teachers = int(teachers.size());
  in.networks.add(student, args.rows, args.classes);
  in.networks.add(teachers, args.rows, args.classes);
  if (labels) args.labels = in.networks.add(*labels, args.rows, args.classes);
  args.student = in.networks.list[0];
  args.teacher = in.networks.list.data() + 1;
}

void add_pos_weight(Inputs& in, const std::optional<Tensor>& pos_weight) {
  if (!pos_weight) return;
  STD_TORCH_CHECK(
      pos_weight->scalar_type() == accumulate_type(in.args.student.type) && pos_weight->numel() == in.args.classes + 1,
      "fastkd: pos_weight [C + 1] in the dtype that is computed in");
  in.pos_weight = torch::stable::contiguous(*pos_weight);
  in.args.pos_weight = in.pos_weight->data_ptr();
}

#if defined(FASTKD_BACKEND_CPU)

void run_forward(Args& args, const Tensor&) {
  const int64_t work = args.classes * (args.teachers + 1);
  forward_over_rows(FASTKD_KERNELS_OF(multi_label), args, args.student.type, losses_of(args), work);
}

#else

void run_forward(Args& args, const Tensor& like) {
  STD_TORCH_CHECK(args.teachers <= kMaxLaunchTeachers, "fastkd: too many teachers for one launch");
  on_stream("multi_label", like, [&](void* stream) { return forward_cuda(args, stream); });
}

#endif

// Losses [R], [] or, with terms, 3 of them.
Tensor empty_losses(const Args& args, const Tensor& like, bool of_rows, ScalarType type) {
  if (of_rows) return args.terms ? empty_like_device(like, {3, args.rows}, type) : empty_like_device(like, {args.rows}, type);
  return args.terms ? empty_like_device(like, {3}, type) : empty_like_device(like, {}, type);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> run(Args& args, const Tensor& student) {
  const ScalarType type = accumulate_type(args.student.type);
  const bool scaled = args.need_grad && args.student.type == DType::f16;
  Tensor rows = empty_losses(args, student, true, type);
  Tensor loss = args.reduction == Reduction::none ? rows : empty_losses(args, student, false, type);
  Tensor grad = args.need_grad ? empty_like_device(student, {args.rows, args.classes}, student.scalar_type())
                               : empty_like_device(student, {0}, student.scalar_type());
  Tensor saved = empty_like_device(student, {scaled ? args.rows : 0}, type);
  Tensor aux = empty_like_device(student, {2}, type);
  args.row_loss = rows.data_ptr();
  args.loss = args.reduction == Reduction::none ? nullptr : loss.data_ptr();
  args.grad = grad.data_ptr();
  args.saved = saved.data_ptr();
  args.aux = aux.data_ptr();
  run_forward(args, student);
  return {loss, grad, saved, aux};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(
    const Tensor& student, const std::vector<Tensor>& teachers, const std::optional<Tensor>& target,
    const std::optional<Tensor>& labels, const std::optional<Tensor>& pos_weight, const std::optional<Tensor>& weights,
    const std::optional<Tensor>& scalars, const std::vector<double>& host_weights, const std::vector<double>& temperatures,
    int64_t combine, double kd_weight, double ce_weight, bool scale_by_t2, int64_t reduction, double num_items, bool uniform,
    bool labelled, bool terms, double class_factor, bool need_grad) {
  Inputs in;
  Args& args = in.args;
  add_networks(in, student, teachers, labels);
  check_devices(student, {pointer_to(target), pointer_to(pos_weight), pointer_to(weights)});
  args.kd_weight = kd_weight;
  args.ce_weight = ce_weight;
  args.items = num_items;
  in.temperatures = temperatures;
  add_weights(in, weights, host_weights);
  add_pos_weight(in, pos_weight);
  add_scalars(in, "multi_label_kd", scalars);
  add_temperatures(in);
  in.target = contiguous_target(target, args.rows);
  args.target = optional_data<int64_t>(in.target);
  args.combine = Combine(combine);
  args.scale_by_t2 = scale_by_t2;
  args.reduction = Reduction(reduction);
  args.uniform = uniform && args.teachers > 0;
  args.labelled = labelled;
  args.terms = terms;
  args.class_factor = class_factor;
  args.need_grad = need_grad;
  STD_TORCH_CHECK(args.ce_weight == 0 || (args.labelled && labels), "fastkd: ce_weight without a target");
  args.cross_entropy = (args.ce_weight != 0 || args.terms) && args.labelled && labels;
  if (args.kd_weight == 0) args.teachers = 0;
  return run(args, student);
}

}  // namespace
}  // namespace fastkd::multi_label

#if !defined(FASTKD_BACKEND_CUDA)  // the CUDA library implements what the CPU library declares
STABLE_TORCH_LIBRARY_FRAGMENT(FASTKD_LIBRARY, m) {
  m.def(
      "multi_label_forward(Tensor student, Tensor[] teachers, Tensor? target, Tensor? labels, Tensor? pos_weight, "
      "Tensor? weights, Tensor? scalars, float[] host_weights, float[] temperatures, int combine, float kd_weight, "
      "float ce_weight, bool scale_by_t2, int reduction, float num_items, bool uniform, bool labelled, bool terms, "
      "float class_factor, bool need_grad) -> (Tensor, Tensor, Tensor, Tensor)");
}
#endif

STABLE_TORCH_LIBRARY_IMPL(FASTKD_LIBRARY, FASTKD_KEY, m) {
  m.impl("multi_label_forward", TORCH_BOX(&fastkd::multi_label::forward));
}

using fastkd::multi_label::Combine, fastkd::Reduction;
FASTKD_CONSTANTS(multi_label, {"launch_teachers", fastkd::multi_label::kMaxLaunchTeachers}, {"losses", int(Combine::losses)},
                 {"probs", int(Combine::probs)}, {"logits", int(Combine::logits)}, {"none", int(Reduction::none)},
                 {"sum", int(Reduction::sum)}, {"mean", int(Reduction::mean)})
