// mutual: schema, allocation, tensors to Args. Compiled into the CPU library, the CUDA library and the tests' host build
// of the CUDA kernels.
#include "mutual/op.h"

#include <limits>
#include <tuple>
#include <vector>

#include "core/constants.h"
#include "core/torch/run.h"

namespace fastkd::mutual {
namespace {

// What Args points into, kept alive for the call.
struct Inputs {
  Networks networks, soft;
  std::optional<Tensor> target, peers, frozen;
  std::vector<double> host_weights;
  std::vector<int> slots;
  Args args;
};

// From the device tensor [M, n] or [M, n, R], or where there is none from the columns [first, first + n) of the host's.
Weights make_weights(const Args& args, std::optional<Tensor>& tensor, const std::vector<double>& host, int first, int n) {
  Weights w;
  const int64_t networks = args.learners + args.teachers;
  if (!tensor) {
    STD_TORCH_CHECK(int64_t(host.size()) == args.learners * networks, "fastkd: one weight per learner and network");
    w.host = host.data() + first;
    w.stride_learner = networks;
    w.stride_network = 1;
    return w;
  }
  tensor = torch::stable::contiguous(*tensor);
  STD_TORCH_CHECK(tensor->scalar_type() == accumulate_type(args.type), "fastkd: dtype of the weights");
  const bool per_row = tensor->dim() == 3;
  STD_TORCH_CHECK(tensor->dim() >= 2 && tensor->size(0) == args.learners && tensor->size(1) == n,
                  "fastkd: one weight per learner and network");
  STD_TORCH_CHECK(!per_row || tensor->size(2) == args.rows, "fastkd: one weight per row");
  w.data = tensor->data_ptr();
  w.stride_network = per_row ? args.rows : 1;
  w.stride_learner = n * w.stride_network;
  w.stride_row = per_row ? 1 : 0;
  return w;
}

#if defined(FASTKD_BACKEND_CPU)

void run_forward(Args& args, const Tensor&) {
  const int64_t networks = args.learners + args.teachers;
  const int64_t work = networks + args.learners * (networks - 1) / 4;  // a pair costs a fourth of an exponential
  const double factor = forward_over_rows(FASTKD_KERNELS_OF(mutual), args, args.type, args.learners, args.classes * work);
  if (!args.terms) return;
  if (args.type == DType::f64)
    reduce_rows<double>(args.row_terms, 2 * args.learners, args.rows, factor, args.terms);
  else
    reduce_rows<float>(args.row_terms, 2 * args.learners, args.rows, factor, args.terms);
}

void run_backward(const BackwardArgs& args, const Tensor&) {
  const CpuKernels& kernels = FASTKD_KERNELS_OF(mutual);
  torch::stable::parallel_for(0, args.slots * args.rows, grain(args.classes),
                              [&](int64_t begin, int64_t end) { kernels.backward(args, begin, end); });
}

#else

void run_forward(Args& args, const Tensor& like) {
  STD_TORCH_CHECK(args.learners <= kMaxLaunchLearners && args.learners + args.teachers <= kMaxLaunchNetworks,
                  "fastkd: too many networks for one launch");
  std::optional<Tensor> scratch;
  if (const int64_t numbers = scratch_numbers_cuda(args)) {
    scratch = empty_like_device(like, {numbers}, ScalarType::Float);
    args.scratch = scratch->data_ptr();
  }
  on_stream("mutual", like, [&](void* stream) { return forward_cuda(args, stream); });
}

void run_backward(const BackwardArgs& args, const Tensor& like) {
  on_stream("mutual", like, [&](void* stream) { return backward_cuda(args, stream); });
}

#endif

// The numbers that a schedule changes: as arguments, or float64 [4] on the host (fastkd/ops/mutual.py: SCALARS).
void set_scalars(Args& args, double temperature, double kd_weight, double ce_weight, double num_items,
                 const std::optional<Tensor>& scalars) {
  double numbers[4] = {temperature, kd_weight, ce_weight, num_items};
  if (scalars) {
    STD_TORCH_CHECK(
        scalars->is_cpu() && scalars->scalar_type() == ScalarType::Double && scalars->is_contiguous() && scalars->numel() == 4,
        "fastkd: scalars must be float64 on the CPU");
    for (int i = 0; i < 4; ++i) numbers[i] = static_cast<const double*>(scalars->data_ptr())[i];
  }
  constexpr double kLargest = std::numeric_limits<double>::max();
  STD_TORCH_CHECK(numbers[0] > 0 && numbers[0] <= kLargest, "mutual_kd: temperature must be a finite number > 0, got ",
                  numbers[0]);
  STD_TORCH_CHECK(numbers[3] >= 0 && numbers[3] <= kLargest, "mutual_kd: num_items must be > 0, got ", numbers[3]);
  for (int i = 1; i < 3; ++i)
    STD_TORCH_CHECK(numbers[i] >= -kLargest && numbers[i] <= kLargest, "mutual_kd: ", i == 1 ? "kd_weight" : "ce_weight",
                    " must be a finite number, got ", numbers[i]);
  args.temperature = numbers[0];
  args.kd_weight = numbers[1];
  args.ce_weight = numbers[2];
  args.items = numbers[3];
}

void set_networks(Inputs& in, const std::vector<Tensor>& logits, const std::vector<Tensor>& teachers) {
  STD_TORCH_CHECK(!logits.empty(), "fastkd: no network");
  const Tensor& like = logits.front();
  Args& args = in.args;
  args.classes = like.size(like.dim() - 1);
  args.rows = args.classes > 0 ? like.numel() / args.classes : 0;
  args.learners = int(logits.size());
  args.teachers = int(teachers.size());
  args.type = dtype_of(like);
  in.networks.add(logits, args.rows, args.classes);
  in.networks.add(teachers, args.rows, args.classes);
  for (const Tensor& z : logits) STD_TORCH_CHECK(dtype_of(z) == args.type, "fastkd: the learners' dtypes differ");
  args.networks = in.networks.list.data();
}

void set_target(Inputs& in, const std::optional<Tensor>& target, const std::optional<Tensor>& soft, bool cross_entropy) {
  Args& args = in.args;
  in.target = contiguous_target(target, args.rows);
  args.target = optional_data<int64_t>(in.target);
  if (soft) args.soft = &in.soft.add(*soft, args.rows, args.classes);
  STD_TORCH_CHECK(!cross_entropy || target || soft, "fastkd: a cross-entropy without a target");
  args.cross_entropy = cross_entropy;
}

void set_slots(Inputs& in, const std::vector<int64_t>& learners) {
  Args& args = in.args;
  in.slots.assign(size_t(args.learners), -1);
  for (const int64_t m : learners) {
    STD_TORCH_CHECK(m >= 0 && m < args.learners && in.slots[m] < 0, "fastkd: a learner out of range or twice");
    in.slots[m] = args.slots++;
  }
  args.slot = in.slots.data();
}

using Results = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// Allocates what the kernels write, and runs them: loss, terms, gradients, their scales, aux.
Results run(Args& args, const Tensor& like, bool with_terms) {
  const ScalarType type = accumulate_type(args.type);
  const bool each_row = args.reduction == Reduction::none, scaled = args.type == DType::f16;
  const int64_t planes = with_terms ? 2 : 0;
  Tensor rows = empty_like_device(like, {args.learners, args.rows}, type);
  Tensor loss = each_row ? rows : empty_like_device(like, {args.learners}, type);
  Tensor row_terms = with_terms || each_row ? empty_like_device(like, {planes, args.learners, args.rows}, type) : loss;
  Tensor terms = each_row ? row_terms : empty_like_device(like, {planes, args.learners}, type);
  Tensor grad = empty_like_device(like, {args.slots, args.rows, args.classes}, like.scalar_type());
  Tensor saved = empty_like_device(like, {scaled ? args.slots : 0, args.rows}, type);
  Tensor aux = empty_like_device(like, {2}, type);
  args.row_loss = rows.data_ptr();
  args.loss = each_row ? nullptr : loss.data_ptr();
  if (with_terms) {
    args.row_terms = row_terms.data_ptr();
    args.terms = each_row ? nullptr : terms.data_ptr();
  }
  args.grad = grad.data_ptr();
  args.saved = saved.data_ptr();
  args.aux = aux.data_ptr();
  run_forward(args, like);
  return {loss, terms, grad, saved, aux};
}

Results forward(const std::vector<Tensor>& logits, const std::vector<Tensor>& teachers, const std::optional<Tensor>& target,
                const std::optional<Tensor>& soft, const std::optional<Tensor>& weights,
                const std::optional<Tensor>& teacher_weights, const std::optional<Tensor>& scalars,
                const std::vector<double>& host_weights, double temperature, double kd_weight, double ce_weight,
                double num_items, bool cross_entropy, double label_smoothing, int64_t ignore_index, bool scale_by_t2,
                int64_t reduction, bool with_terms, const std::vector<int64_t>& learners, bool stream) {
  Inputs in;
  Args& args = in.args;
  set_networks(in, logits, teachers);
  check_devices(logits.front(), {pointer_to(target), pointer_to(soft), pointer_to(weights), pointer_to(teacher_weights)});
  in.host_weights = host_weights;
  in.peers = weights;
  in.frozen = teacher_weights;
  args.peers = make_weights(args, in.peers, in.host_weights, 0, args.learners);
  if (args.teachers > 0) args.frozen = make_weights(args, in.frozen, in.host_weights, args.learners, args.teachers);
  set_target(in, target, soft, cross_entropy);
  set_scalars(args, temperature, kd_weight, ce_weight, num_items, scalars);
  if (!cross_entropy) args.ce_weight = 0;
  args.label_smoothing = label_smoothing;
  args.ignore_index = ignore_index;
  args.scale_by_t2 = scale_by_t2;
  args.reduction = Reduction(reduction);
  args.stream = stream;
  set_slots(in, learners);
  return run(args, logits.front(), with_terms);
}

void backward_into(const Tensor& grad_loss, const Tensor& stored, const Tensor& saved, const Tensor& aux,
                   const std::vector<int64_t>& learners, int64_t reduction, const Tensor& grad) {
  BackwardArgs args;
  args.slots = int(stored.size(0));
  args.rows = stored.size(1);
  args.classes = stored.size(2);
  args.type = dtype_of(stored);
  args.reduction = Reduction(reduction);
  args.learner = learners.data();
  STD_TORCH_CHECK(int(learners.size()) == args.slots && args.slots <= grad_loss.size(0), "fastkd: one gradient per learner");
  for (const int64_t m : learners) STD_TORCH_CHECK(m >= 0 && m < grad_loss.size(0), "fastkd: a learner out of range");
  check_stored(stored, saved, aux, args.slots * args.rows);
  check_grad_loss(grad_loss, grad_loss.size(0), args.rows, args.reduction, aux);
  args.grad_loss = grad_loss.data_ptr();
  args.stored = stored.data_ptr();
  args.saved = saved.size(0) > 0 ? saved.data_ptr() : nullptr;
  args.aux = aux.data_ptr();
  args.grad = grad.data_ptr();
  run_backward(args, stored);
}

Tensor backward(const Tensor& grad_loss, const Tensor& stored, const Tensor& saved, const Tensor& aux,
                const std::vector<int64_t>& learners, int64_t reduction) {
  Tensor grad = empty_like_device(stored, {stored.size(0), stored.size(1), stored.size(2)}, stored.scalar_type());
  backward_into(grad_loss, stored, saved, aux, learners, reduction, grad);
  return grad;
}

void backward_in_place(const Tensor& grad_loss, const Tensor& stored, const Tensor& saved, const Tensor& aux,
                       const std::vector<int64_t>& learners, int64_t reduction) {
  backward_into(grad_loss, stored, saved, aux, learners, reduction, stored);
}

}  // namespace
}  // namespace fastkd::mutual

#if !defined(FASTKD_BACKEND_CUDA)  // the CUDA library implements what the CPU library declares
STABLE_TORCH_LIBRARY_FRAGMENT(FASTKD_LIBRARY, m) {
  m.def(
      "mutual_forward(Tensor[] logits, Tensor[] teachers, Tensor? target, Tensor? soft, Tensor? weights, "
      "Tensor? teacher_weights, Tensor? scalars, float[] host_weights, float temperature, float kd_weight, "
      "float ce_weight, float num_items, bool cross_entropy, float label_smoothing, int ignore_index, bool scale_by_t2, "
      "int reduction, bool with_terms, int[] learners, bool stream) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("mutual_backward(Tensor grad, Tensor rows, Tensor saved, Tensor aux, int[] learners, int reduction) -> Tensor");
  m.def("mutual_backward_(Tensor grad, Tensor(a!) rows, Tensor saved, Tensor aux, int[] learners, int reduction) -> ()");
}
#endif

STABLE_TORCH_LIBRARY_IMPL(FASTKD_LIBRARY, FASTKD_KEY, m) {
  m.impl("mutual_forward", TORCH_BOX(&fastkd::mutual::forward));
  m.impl("mutual_backward", TORCH_BOX(&fastkd::mutual::backward));
  m.impl("mutual_backward_", TORCH_BOX(&fastkd::mutual::backward_in_place));
}

FASTKD_CONSTANTS(mutual, {"launch_learners", fastkd::mutual::kMaxLaunchLearners},
                 {"launch_networks", fastkd::mutual::kMaxLaunchNetworks})
