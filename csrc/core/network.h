// A network's logits as kernels read them: rows of any dtype that lie anywhere in memory. No torch.
#pragma once

#include "core/dtype.h"

namespace fastkd {

constexpr int kMostRowDims = 4;

// Where the rows of a tensor [..., C] lie, in elements: its leading dimensions, outermost first, merged where memory allows.
// A matrix has one; logits[:, :-1] of [B, T, V] has two.
struct RowLayout {
  int dims = 1;
  int64_t size[kMostRowDims] = {}, stride[kMostRowDims] = {};
};

struct Network {
  const void* data = nullptr;  // [R, C]; a row's classes lie next to each other
  DType type{};
  RowLayout rows;
};

inline namespace FASTKD_TARGET {

FASTKD_HD int64_t row_offset(const RowLayout& rows, int64_t row) {
  int64_t at = 0;
  for (int d = rows.dims - 1; d > 0; --d) {
    at += row % rows.size[d] * rows.stride[d];
    row /= rows.size[d];
  }
  return at + row * rows.stride[0];
}

template <class T>
FASTKD_HD const T* row_of(const Network& network, int64_t row) {
  return static_cast<const T*>(network.data) + row_offset(network.rows, row);
}

}  // namespace FASTKD_TARGET
}  // namespace fastkd
