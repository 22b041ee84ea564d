// Memory for the statistics, in op.cpp of group_stats and of operations that return them beside a loss.
#pragma once

#include <tuple>

#include "core/torch/tensors.h"
#include "group_stats/op.h"

namespace fastkd::group_stats {

struct OutputTensors {
  Tensor ce, correct, label_rank, confidence, entropy, margin;  // each [M, R]

  OutputTensors(const Tensor& like, int64_t networks, int64_t rows, ScalarType type)
      : ce(empty_like_device(like, {networks, rows}, type)),
        correct(empty_like_device(like, {networks, rows}, ScalarType::Bool)),
        label_rank(empty_like_device(like, {networks, rows}, ScalarType::Long)),
        confidence(empty_like_device(like, {networks, rows}, type)),
        entropy(empty_like_device(like, {networks, rows}, type)),
        margin(empty_like_device(like, {networks, rows}, type)) {}

  Output pointers() const {
    Output out;
    out.ce = ce.data_ptr();
    out.correct = static_cast<bool*>(correct.data_ptr());
    out.label_rank = static_cast<int64_t*>(label_rank.data_ptr());
    out.confidence = confidence.data_ptr();
    out.entropy = entropy.data_ptr();
    out.margin = margin.data_ptr();
    return out;
  }

  // In the order in which operations return them.
  std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> all() const {
    return {ce, correct, label_rank, confidence, entropy, margin};
  }
};

}  // namespace fastkd::group_stats
