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

// Matrices [R, C] as kernels read them, kept alive for the call.
struct NetworkRows {
  std::vector<Tensor> kept;
  std::vector<const void*> data;
  std::vector<int64_t> strides;

  // Networks of one dtype, which is returned.
  DType add(const std::vector<Tensor>& networks, int64_t rows, int64_t classes) {
    STD_TORCH_CHECK(!networks.empty(), "fastkd: no network");
    for (const Tensor& network : networks) {
      kept.push_back(with_contiguous_rows(network));
      const Tensor& z = kept.back();
      STD_TORCH_CHECK(z.size(0) == rows && z.size(1) == classes, "fastkd: the networks' shapes differ");
      STD_TORCH_CHECK(dtype_of(z) == dtype_of(networks.front()), "fastkd: the networks' dtypes differ");
      data.push_back(z.data_ptr());
      strides.push_back(z.stride(0));
    }
    return dtype_of(networks.front());
  }
};

// Those that dispatch_pair() of core/dispatch.h takes.
inline void check_teacher_type(DType teacher, DType learner) {
  STD_TORCH_CHECK(teacher == learner || (teacher == DType::f32 && learner != DType::f64),
                  "fastkd: teachers must be of the learners' dtype or float32");
}

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
