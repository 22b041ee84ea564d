// From torch's stable tensors to pointers and back. The checks here are backstops: the messages a user reads stand in
// Python, since the stable ABI turns every C++ error into a RuntimeError.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <initializer_list>
#include <optional>
#include <vector>

#include "core/network.h"

// The namespace and dispatch key that a build of op.cpp registers its operation under.
#if defined(FASTKD_BACKEND_CUDA)
#define FASTKD_LIBRARY fastkd
#define FASTKD_KEY CUDA
#elif defined(FASTKD_BACKEND_SIMT)  // the CUDA kernels on the host, for tests
#define FASTKD_LIBRARY fastkd_simt
#define FASTKD_KEY CPU
#else
#define FASTKD_LIBRARY fastkd
#define FASTKD_KEY CPU
#endif

namespace fastkd {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::f32;
    case ScalarType::Double: return DType::f64;
    case ScalarType::Half: return DType::f16;
    case ScalarType::BFloat16: return DType::bf16;
    default: STD_TORCH_CHECK(false, "fastkd: expected a tensor of float32, float64, float16 or bfloat16");
  }
}

inline ScalarType accumulate_type(DType type) { return type == DType::f64 ? ScalarType::Double : ScalarType::Float; }

// An uninitialised tensor on the device of `like`, without the dispatcher's look-up by name.
inline Tensor empty_strided_like_device(const Tensor& like, const int64_t* sizes, const int64_t* strides, int64_t dims,
                                        ScalarType type) {
  int32_t device_type, device_index;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      dims, sizes, strides, static_cast<int32_t>(torch::stable::detail::to<int32_t>(torch::stable::detail::from(type))),
      device_type, device_index, &handle));
  return Tensor(handle);
}

// The same, contiguous.
inline Tensor empty_like_device(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType type) {
  int64_t strides[4] = {1, 1, 1, 1};
  for (int64_t d = int64_t(sizes.size()) - 2; d >= 0; --d) strides[d] = strides[d + 1] * sizes.begin()[d + 1];
  return empty_strided_like_device(like, sizes.begin(), strides, int64_t(sizes.size()), type);
}

// Whether two tensors are on one device: a kernel would follow a pointer into memory that is not its own.
inline bool same_device(const Tensor& a, const Tensor& b) {
  int32_t types[2], indices[2];
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(a.get(), &types[0]));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(b.get(), &types[1]));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(a.get(), &indices[0]));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(b.get(), &indices[1]));
  return types[0] == types[1] && indices[0] == indices[1];
}

inline const Tensor* pointer_to(const std::optional<Tensor>& t) { return t ? &*t : nullptr; }

// Those that are null are not there.
inline void check_devices(const Tensor& first, std::initializer_list<const Tensor*> others) {
  for (const Tensor* t : others)
    STD_TORCH_CHECK(!t || same_device(*t, first), "fastkd: the tensors of a call must be on one device");
}

template <class T>
T* optional_data(const std::optional<Tensor>& t) {
  return t ? static_cast<T*>(t->data_ptr()) : nullptr;
}

// How the rows of [..., C] lie, or nothing where they have no layout that kernels know: too many dimensions that do not
// merge, or classes that are not next to each other.
inline std::optional<RowLayout> row_layout(const Tensor& t) {
  const int64_t last = t.dim() - 1;
  STD_TORCH_CHECK(last >= 0, "fastkd: expected logits [..., C]");
  if (t.size(last) > 1 && t.stride(last) != 1) return std::nullopt;
  RowLayout rows;
  rows.dims = 0;
  for (int64_t d = 0; d < last; ++d) {
    const int64_t size = t.size(d), stride = t.stride(d);
    if (size == 1) continue;
    const int inner = rows.dims - 1;
    if (inner >= 0 && rows.stride[inner] == size * stride) {  // one dimension with the one before
      rows.size[inner] *= size;
      rows.stride[inner] = stride;
      continue;
    }
    if (rows.dims == kMostRowDims) return std::nullopt;
    rows.size[rows.dims] = size;
    rows.stride[rows.dims++] = stride;
  }
  if (rows.dims == 0) rows = {1, {1}, {t.size(last)}};
  return rows;
}

// Logits [..., C] of R rows as kernels read them, each of its own dtype and layout, kept alive for the call. Nothing is
// copied where row_layout() knows the rows.
struct Networks {
  std::vector<Tensor> kept;
  std::vector<Network> list;

  const Network& add(const Tensor& tensor, int64_t rows, int64_t classes) {
    std::optional<RowLayout> layout = row_layout(tensor);
    kept.push_back(layout ? tensor : torch::stable::contiguous(tensor));
    if (!layout) layout = row_layout(kept.back());
    const Tensor& z = kept.back();
    STD_TORCH_CHECK(z.size(z.dim() - 1) == classes && z.numel() == rows * classes, "fastkd: the networks' shapes differ");
    check_devices(kept.front(), {&z});
    list.push_back({z.data_ptr(), dtype_of(z), *layout});
    return list.back();
  }

  void add(const std::vector<Tensor>& tensors, int64_t rows, int64_t classes) {
    for (const Tensor& tensor : tensors) add(tensor, rows, classes);
  }
};

// The labels of rows, where there are any.
inline std::optional<Tensor> contiguous_target(const std::optional<Tensor>& target, int64_t rows) {
  if (!target) return std::nullopt;
  STD_TORCH_CHECK(target->scalar_type() == ScalarType::Long && target->numel() == rows, "fastkd: int64 target [R]");
  return torch::stable::contiguous(*target);
}

// Weights [K], or [K, R] of each row, beside learners of this type.
inline Tensor contiguous_weights(const Tensor& weights, int64_t networks, int64_t rows, DType learner) {
  STD_TORCH_CHECK(weights.scalar_type() == accumulate_type(learner), "fastkd: dtype of the weights");
  STD_TORCH_CHECK(weights.size(0) == networks, "fastkd: one weight per network");
  STD_TORCH_CHECK(weights.dim() != 2 || weights.size(1) == rows, "fastkd: one weight per row");
  return torch::stable::contiguous(weights);
}

}  // namespace fastkd
