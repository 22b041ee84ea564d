// feature_ensemble: schema, layouts, allocation, tensors to Args. Compiled into the CPU library, the CUDA library and the
// tests' host build of the CUDA kernels.
#include "feature_ensemble/op.h"

#include <algorithm>
#include <tuple>
#include <vector>

#include "core/constants.h"
#include "core/torch/run.h"

#if defined(FASTKD_BACKEND_CPU)
#include "feature_ensemble/math.h"
#endif

namespace fastkd::feature_ensemble {
namespace {

struct Layout {
  bool contiguous, channels_last;  // both, one or none
};

int64_t places_of(const Tensor& t) {
  int64_t places = 1;
  for (int64_t d = 2; d < t.dim(); ++d) places *= t.size(d);
  return places;
}

// How each sample of t [B, C, ...] lies in memory; the stride between samples is free.
Layout layout_of(const Tensor& t) {
  Layout layout{true, true};
  int64_t dense = 1, dense_last = t.size(1);
  for (int64_t d = t.dim() - 1; d >= 1; --d) {
    const int64_t size = t.size(d), stride = t.stride(d);
    if (size == 1) continue;
    layout.contiguous &= stride == dense;
    layout.channels_last &= stride == (d == 1 ? 1 : dense_last);
    dense *= size;
    if (d > 1) dense_last *= size;
  }
  return layout;
}

// What Args points into, kept alive for the call.
struct Inputs {
  std::vector<Tensor> students, teachers;
  std::optional<Tensor> weights, mask;
  std::vector<double> host_weights;
  std::vector<Pair> pairs;
  std::vector<bool> channels_last;  // of the students
  Args args;
};

struct Options {
  int64_t p, norm;
  bool mean_elements;
  int64_t reduction;
  double items;  // what the sum over samples is divided by, 0 for the reduction's own
};

Tensor with_dense_samples(const Tensor& t) {
  const Layout layout = layout_of(t);
  return layout.contiguous || layout.channels_last ? t : torch::stable::contiguous(t);
}

Group group_of(Norm norm, bool channels_last) {
  if (norm == Norm::sample) return Group::all;
  return (norm == Norm::channel) == channels_last ? Group::column : Group::row;
}

void add_pair(Inputs& in, size_t k) {
  const Tensor& student = in.students[in.args.shared ? 0 : k];
  const Tensor& teacher = in.teachers[k];
  bool same = student.dim() == teacher.dim();
  for (int64_t d = 0; same && d < student.dim(); ++d) same = student.size(d) == teacher.size(d);
  STD_TORCH_CHECK(same && student.size(0) == in.args.samples, "fastkd: the shapes of a pair of maps differ");
  const int64_t channels = student.size(1), places = places_of(student);
  // A map of one place is a row of channels: [1, C], not [C, 1].
  const bool last = places == 1 || !layout_of(student).contiguous;
  const Layout its = layout_of(teacher);
  Pair pair;
  pair.student = student.data_ptr();
  pair.teacher = teacher.data_ptr();
  pair.student_stride = student.stride(0);
  pair.teacher_stride = teacher.stride(0);
  pair.outer = last ? places : channels;
  pair.inner = last ? channels : places;
  pair.transposed = !(last ? its.channels_last : its.contiguous);
  pair.teacher_type = dtype_of(teacher);
  const DType type = in.args.student_type;
  const bool half = type == DType::f16 || type == DType::bf16;
  pair.unpacked = pair.transposed || !(pair.teacher_type == type || (half && pair.teacher_type == DType::f32));
  pair.group = group_of(in.args.norm, last);
  pair.groups = pair.group == Group::all ? 1 : pair.group == Group::row ? pair.outer : pair.inner;
  pair.first_group = in.args.total_groups;
  in.args.total_groups += in.args.samples * pair.groups;
  STD_TORCH_CHECK(pair.elements() > 0 && pair.elements() < (int64_t(1) << 31), "fastkd: size of a map");
  in.pairs.push_back(pair);
  in.channels_last.push_back(last);
}

void add_weights(Inputs& in, const std::optional<Tensor>& weights, const std::vector<double>& host) {
  Args& args = in.args;
  if (!weights) {
    STD_TORCH_CHECK(int(host.size()) == args.pairs, "fastkd: one weight per pair");
    in.host_weights = host;
    args.host_weight = in.host_weights.data();
    return;
  }
  in.weights = contiguous_weights(*weights, args.pairs, args.samples, args.student_type);
  const bool per_sample = in.weights->dim() == 2;
  args.weight_stride_pair = per_sample ? args.samples : 1;
  args.weight_stride_sample = per_sample ? 1 : 0;
  args.weight = in.weights->data_ptr();
}

#if defined(FASTKD_BACKEND_CPU)
constexpr bool kOnHost = true;
#else
constexpr bool kOnHost = false;  // no value of a tensor is read here
#endif

void add_divisor(Inputs& in, const std::optional<Tensor>& mask, double items) {
  Args& args = in.args;
  int64_t counted = args.samples;
  if (mask) {
    STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool && mask->numel() == args.samples, "fastkd: bool mask [B]");
    STD_TORCH_CHECK(kOnHost || args.reduction != Reduction::mean || items > 0,
                    "fastkd: the samples of a mask are counted on the host alone");
    in.mask = torch::stable::contiguous(*mask);
    args.mask = optional_data<bool>(in.mask);
    if (kOnHost) counted = std::count(args.mask, args.mask + args.samples, true);
  }
  if (args.reduction == Reduction::none) return;
  args.divisor = items > 0 ? items : args.reduction == Reduction::mean ? double(std::max<int64_t>(1, counted)) : 1.;
}

void fill_inputs(Inputs& in, const std::vector<Tensor>& students, const std::vector<Tensor>& teachers,
                 const std::optional<Tensor>& weights, const std::optional<Tensor>& mask,
                 const std::vector<double>& host_weights, const Options& o) {
  Args& args = in.args;
  STD_TORCH_CHECK(!teachers.empty() && (students.size() == 1 || students.size() == teachers.size()),
                  "fastkd: one student's map, or one per teacher");
  for (const Tensor& t : students) {
    STD_TORCH_CHECK(t.dim() >= 2 && dtype_of(t) == dtype_of(students[0]), "fastkd: the students' maps differ");
    check_devices(students[0], {&t});
    in.students.push_back(with_dense_samples(t));
  }
  for (const Tensor& t : teachers) {
    STD_TORCH_CHECK(t.dim() >= 2, "fastkd: expected a map [B, C, ...]");
    check_devices(students[0], {&t});
    in.teachers.push_back(with_dense_samples(t));
  }
  check_devices(students[0], {pointer_to(weights), pointer_to(mask)});
  args.student_type = dtype_of(students[0]);
  args.samples = students[0].size(0);
  args.pairs = int(teachers.size());
  args.shared = students.size() == 1 && teachers.size() > 1;
  args.norm = Norm(o.norm);
  for (size_t k = 0; k < teachers.size(); ++k) add_pair(in, k);
  args.pair = in.pairs.data();
  add_weights(in, weights, host_weights);
  args.p = int(o.p);
  args.mean_elements = o.mean_elements;
  args.reduction = Reduction(o.reduction);
  add_divisor(in, mask, o.items);
  STD_TORCH_CHECK(args.p == 1 || args.p == 2, "fastkd: p is 1 or 2");
}

// Dense, in the layout that the kernels see: channels_last where the student is.
Tensor empty_gradient(const Tensor& student, bool channels_last, ScalarType type) {
  const int64_t dims = student.dim();
  std::vector<int64_t> sizes(dims), strides(dims, 1);
  for (int64_t d = 0; d < dims; ++d) sizes[d] = student.size(d);
  int64_t dense = channels_last ? sizes[1] : 1;
  for (int64_t d = dims - 1; d >= 2; --d) {
    strides[d] = dense;
    dense *= sizes[d];
  }
  strides[1] = channels_last ? 1 : dense;
  strides[0] = channels_last ? dense : dense * sizes[1];
  return empty_strided_like_device(student, sizes.data(), strides.data(), dims, type);
}

#if defined(FASTKD_BACKEND_CPU)

template <class F>
void over_tasks(const Args& args, const CpuKernels& kernels, const F& run) {
  const int64_t students = args.shared ? 1 : args.pairs;
  int64_t elements = 0;
  for (int k = 0; k < args.pairs; ++k) elements += 2 * args.pair[k].elements();
  run_with_scratch(kernels, args, args.samples * students, grain(elements / students), run);
}

// In the order of samples and pairs and in double: the same bits for any number of threads.
template <class A>
void reduce_samples(const Args& args) {
  const A* distance = static_cast<const A*>(args.distance);
  A* loss = static_cast<A*>(args.loss);
  double total = 0;
  for (int64_t b = 0; b < args.samples; ++b) {
    double sum = 0;
    for (int k = 0; k < args.pairs; ++k) sum += double(weight_of<A>(args, k, b)) * double(distance[k * args.samples + b]);
    total += sum;
    if (args.reduction == Reduction::none) loss[b] = A(sum);
  }
  if (args.reduction == Reduction::none) return;
  *loss = A(total / args.divisor);
}

void run_forward(Args& args, const Tensor&) {
  const CpuKernels& kernels = FASTKD_KERNELS_OF(feature_ensemble);
  over_tasks(args, kernels, kernels.forward);
  args.student_type == DType::f64 ? reduce_samples<double>(args) : reduce_samples<float>(args);
}

void run_backward(const Args& args, const Tensor&) {
  const CpuKernels& kernels = FASTKD_KERNELS_OF(feature_ensemble);
  over_tasks(args, kernels, kernels.backward);
}

#else

template <class F>
void launch_pairs(const Args& args, const Tensor& like, const F& launch) {
  STD_TORCH_CHECK(args.pairs <= kMaxLaunchPairs, "fastkd: too many pairs for one launch");
  on_stream("feature_ensemble", like, [&](void* stream) { return launch(args, stream); });
}

void run_forward(Args& args, const Tensor& like) {
  const ScalarType type = accumulate_type(args.student_type);
  // A group's distances first, their sums per sample after; one and the same where a sample is one group.
  Tensor groups = empty_like_device(like, {args.norm == Norm::sample ? 0 : args.total_groups}, type);
  args.sample_distance = args.distance;
  if (args.norm != Norm::sample) args.distance = groups.data_ptr();
  launch_pairs(args, like, forward_cuda);
}

void run_backward(const Args& args, const Tensor& like) { launch_pairs(args, like, backward_cuda); }

#endif

// A gradient per student's map, where the kernels will write it.
std::vector<Tensor> add_gradients(Inputs& in, const std::vector<Tensor>& students, ScalarType type) {
  std::vector<Tensor> grads;
  for (size_t k = 0; k < students.size(); ++k) {
    grads.push_back(empty_gradient(students[k], in.channels_last[k], type));
    in.args.grad_type = dtype_of(grads.back());
    in.pairs[k].grad = grads.back().data_ptr();
  }
  return grads;
}

// store: also the gradients for a grad_loss of 1; those of float16 in float32, or small ones would be lost before it.
std::tuple<Tensor, Tensor, std::vector<Tensor>> forward(const std::vector<Tensor>& students,
                                                        const std::vector<Tensor>& teachers,
                                                        const std::optional<Tensor>& weights, const std::optional<Tensor>& mask,
                                                        const std::vector<double>& host_weights, int64_t p, int64_t norm,
                                                        bool mean_elements, int64_t reduction, double items, bool need_grad,
                                                        bool store) {
  Inputs in;
  fill_inputs(in, students, teachers, weights, mask, host_weights, {p, norm, mean_elements, reduction, items});
  Args& args = in.args;
  args.need_grad = need_grad;
  const Tensor& like = students[0];
  const ScalarType type = accumulate_type(args.student_type);
  Tensor loss =
      args.reduction == Reduction::none ? empty_like_device(like, {args.samples}, type) : empty_like_device(like, {}, type);
  Tensor state = empty_like_device(like, {need_grad ? kStatePlanes : 0, args.total_groups}, type);
  Tensor distance = empty_like_device(like, {args.pairs, args.samples}, type);
  args.loss = loss.data_ptr();
  args.state = need_grad ? state.data_ptr() : nullptr;
  args.distance = distance.data_ptr();
  std::vector<Tensor> grads;
  if (store) {
    // On CUDA a block does not keep a sample between the norms and the gradient.
    STD_TORCH_CHECK(kOnHost && need_grad, "fastkd: gradients are stored on the CPU alone");
    grads = add_gradients(in, students, args.student_type == DType::f16 ? type : like.scalar_type());
  }
  run_forward(args, like);
  return {loss, state, grads};
}

std::vector<Tensor> backward(const Tensor& grad_loss, const std::vector<Tensor>& students, const std::vector<Tensor>& teachers,
                             const std::optional<Tensor>& weights, const std::optional<Tensor>& mask, const Tensor& state,
                             const std::vector<double>& host_weights, int64_t p, int64_t norm, bool mean_elements,
                             int64_t reduction, double items) {
  Inputs in;
  fill_inputs(in, students, teachers, weights, mask, host_weights, {p, norm, mean_elements, reduction, items});
  Args& args = in.args;
  check_devices(students[0], {&state});
  check_grad_loss(grad_loss, 1, args.samples, args.reduction, state);
  STD_TORCH_CHECK(state.numel() == kStatePlanes * args.total_groups && state.is_contiguous(),
                  "fastkd: the state is another call's");
  std::vector<Tensor> grads = add_gradients(in, students, students[0].scalar_type());
  args.grad_loss = grad_loss.data_ptr();
  args.state = state.data_ptr();
  run_backward(args, students[0]);
  return grads;
}

}  // namespace
}  // namespace fastkd::feature_ensemble

#if !defined(FASTKD_BACKEND_CUDA)  // the CUDA library implements what the CPU library declares
STABLE_TORCH_LIBRARY_FRAGMENT(FASTKD_LIBRARY, m) {
  m.def(
      "feature_ensemble_forward(Tensor[] students, Tensor[] teachers, Tensor? weights, Tensor? mask, float[] host_weights, "
      "int p, int norm, bool mean_elements, int reduction, float items, bool need_grad, bool store) "
      "-> (Tensor, Tensor, Tensor[])");
  m.def(
      "feature_ensemble_backward(Tensor grad, Tensor[] students, Tensor[] teachers, Tensor? weights, Tensor? mask, "
      "Tensor state, float[] host_weights, int p, int norm, bool mean_elements, int reduction, float items) -> Tensor[]");
}
#endif

STABLE_TORCH_LIBRARY_IMPL(FASTKD_LIBRARY, FASTKD_KEY, m) {
  m.impl("feature_ensemble_forward", TORCH_BOX(&fastkd::feature_ensemble::forward));
  m.impl("feature_ensemble_backward", TORCH_BOX(&fastkd::feature_ensemble::backward));
}

using fastkd::feature_ensemble::Norm;
FASTKD_CONSTANTS(feature_ensemble, {"launch_pairs", fastkd::feature_ensemble::kMaxLaunchPairs},
                 {"state_planes", fastkd::feature_ensemble::kStatePlanes}, {"sample", int(Norm::sample)},
                 {"position", int(Norm::position)}, {"channel", int(Norm::channel)})
