// What the operations with teachers make of weights, scalars and temperatures. Inputs is the operation's own struct of what
// its Args points into: weights, host_weights, temperatures, args.
#pragma once

#include <limits>
#include <optional>
#include <vector>

#include "core/torch/tensors.h"

namespace fastkd {

template <class Inputs>
void add_weights(Inputs& in, const std::optional<Tensor>& weights, const std::vector<double>& host_weights) {
  auto& args = in.args;
  if (!weights) {
    STD_TORCH_CHECK(int(host_weights.size()) == args.teachers, "fastkd: one weight per teacher");
    in.host_weights = host_weights;
    args.host_weight = in.host_weights.data();
    return;
  }
  in.weights = contiguous_weights(*weights, args.teachers, args.rows, args.student.type);
  const bool per_row = in.weights->dim() == 2;
  args.weight_stride_teacher = per_row ? args.rows : 1;
  args.weight_stride_row = per_row ? 1 : 0;
  args.weight = in.weights->data_ptr();
}

// `scalars`: kd_weight, ce_weight, num_items (0: none) and the temperatures, in the place of the numbers that stand in `in`,
// where one of them came as a tensor: a schedule's value must not be part of a compiled graph.
template <class Inputs>
void add_scalars(Inputs& in, const char* operation, const std::optional<Tensor>& scalars) {
  auto& args = in.args;
  if (scalars) {
    STD_TORCH_CHECK(scalars->is_cpu() && scalars->scalar_type() == ScalarType::Double && scalars->is_contiguous() &&
                        scalars->numel() == 3 + int64_t(in.temperatures.size()),
                    "fastkd: scalars must be float64 on the CPU");
    const double* value = static_cast<const double*>(scalars->data_ptr());
    args.kd_weight = value[0];
    args.ce_weight = value[1];
    args.items = value[2];
    in.temperatures.assign(value + 3, value + scalars->numel());
  }
  constexpr double kLargest = std::numeric_limits<double>::max();
  for (const double t : in.temperatures)
    STD_TORCH_CHECK(t > 0 && t <= kLargest, operation, ": temperature must be a finite number > 0, got ", t);
  STD_TORCH_CHECK(args.items >= 0 && args.items <= kLargest, operation, ": num_items must be > 0, got ", args.items);
  for (const double w : {args.kd_weight, args.ce_weight})
    STD_TORCH_CHECK(w >= -kLargest && w <= kLargest, operation, ": weights must be finite, got ", w);
}

// One of each teacher, where one of all is given. Whether several were.
template <class Inputs>
bool add_temperatures(Inputs& in) {
  const bool several = in.temperatures.size() > 1;
  STD_TORCH_CHECK(in.temperatures.size() == (several ? size_t(in.args.teachers) : 1),
                  "fastkd: one temperature, or one per teacher");
  if (!several && in.args.teachers > 1) in.temperatures.resize(in.args.teachers, in.temperatures[0]);
  in.args.temperature = in.temperatures.data();
  return several;
}

}  // namespace fastkd
