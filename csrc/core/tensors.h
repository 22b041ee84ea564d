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

#include "core/dtype.h"

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
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dims, sizes, strides,
                                                  static_cast<int32_t>(torch::stable::detail::to<int32_t>(
                                                      torch::stable::detail::from(type))),
                                                  device_type, device_index, &handle));
  return Tensor(handle);
}

// The same, contiguous.
inline Tensor empty_like_device(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType type) {
  int64_t strides[4] = {1, 1, 1, 1};
  for (int64_t d = int64_t(sizes.size()) - 2; d >= 0; --d) strides[d] = strides[d + 1] * sizes.begin()[d + 1];
  return empty_strided_like_device(like, sizes.begin(), strides, int64_t(sizes.size()), type);
}

// A matrix whose rows are contiguous: itself, with any row stride, or a copy.
inline Tensor with_contiguous_rows(const Tensor& t) {
  STD_TORCH_CHECK(t.dim() == 2, "fastkd: expected a matrix [R, C]");
  const bool fits = t.size(1) <= 1 || t.stride(1) == 1;
  return fits ? t : torch::stable::contiguous(t);
}

template <class T>
T* optional_data(const std::optional<Tensor>& t) {
  return t ? static_cast<T*>(t->data_ptr()) : nullptr;
}

}  // namespace fastkd
