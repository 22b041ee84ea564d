// multi_teacher: what op.cpp is given, as Args.
#pragma once

#include <algorithm>
#include <vector>

#include "core/torch/teachers.h"
#include "multi_teacher/op.h"

namespace fastkd::multi_teacher {

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

inline void add_networks(Inputs& in, const Tensor& student, const std::vector<Tensor>& teachers,
                         const std::optional<Tensor>& soft, int64_t classes) {
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

inline void add_caps(Inputs& in, const Options& o) {
  if (o.softcaps.empty()) return;
  const size_t networks = size_t(in.args.teachers) + 1;
  STD_TORCH_CHECK(o.softcaps.size() == networks && o.logit_scales.size() == networks, "fastkd: one softcap per network");
  in.args.softcap = o.softcaps.data();
  in.args.logit_scale = o.logit_scales.data();
}

inline void add_divergence(Inputs& in, const Options& o, const std::optional<Tensor>& shares) {
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

// Without a weight the distillation's teachers are not read, but for statistics.
inline void drop_teachers(Inputs& in, bool with_stats) {
  Args& args = in.args;
  in.host_weights.assign(args.teachers, 0.);
  args.host_weight = in.host_weights.data();
  args.weight = nullptr;
  args.uniform = false;
  args.kd_weight = 1;
  if (!with_stats) args.teachers = 0;
}

inline void fill_inputs(Inputs& in, const Tensor& student, const std::vector<Tensor>& teachers,
                        const std::optional<Tensor>& target, const std::optional<Tensor>& soft,
                        const std::optional<Tensor>& weights, const std::optional<Tensor>& shares,
                        const std::optional<Tensor>& scalars, const Options& o, bool with_stats = false) {
  Args& args = in.args;
  add_networks(in, student, teachers, soft, o.classes);
  check_devices(student, {pointer_to(target), pointer_to(weights), pointer_to(shares)});
  add_caps(in, o);
  add_divergence(in, o, shares);
  args.kd_weight = o.kd_weight;
  args.ce_weight = o.ce_weight;
  args.items = o.num_items;
  in.temperatures = o.temperatures;
  add_weights(in, weights, o.host_weights);
  add_scalars(in, "multi_teacher_kd", scalars);
  args.several_temperatures = add_temperatures(in);
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

}  // namespace fastkd::multi_teacher
