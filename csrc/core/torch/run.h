// How op.cpp runs its kernels: rows over the threads of a CPU, or launches on the current stream of a GPU.
#pragma once

#include <memory>

#include "core/reduction.h"
#include "core/torch/tensors.h"

#if defined(FASTKD_BACKEND_CPU)
#include "core/cpu/cpu_level.h"
#elif defined(FASTKD_BACKEND_CUDA)
#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>
#endif

namespace fastkd {

// Checks that grad_loss has one element per loss, or with Reduction::none per row, of the dtype that the forward left
// (`like`).
inline void check_grad_loss(const Tensor& grad_loss, int64_t losses, int64_t rows, Reduction reduction, const Tensor& like) {
  const int64_t expected = losses * (reduction == Reduction::none ? rows : 1);
  STD_TORCH_CHECK(grad_loss.numel() == expected && grad_loss.scalar_type() == like.scalar_type() && grad_loss.is_contiguous(),
                  "fastkd: grad_output must be contiguous, of the losses' shape and dtype");
  check_devices(like, {&grad_loss});
}

// What a forward stored for its backward: gradients [..., R, C], the inverse scales of float16 [..., R] or nothing, aux [2].
inline void check_stored(const Tensor& stored, const Tensor& saved, const Tensor& aux, int64_t rows) {
  const ScalarType type = accumulate_type(dtype_of(stored));
  STD_TORCH_CHECK(stored.is_contiguous() && saved.is_contiguous() && aux.is_contiguous() && aux.numel() == 2 &&
                      aux.scalar_type() == type && saved.scalar_type() == type && (saved.numel() == 0 || saved.numel() == rows),
                  "fastkd: expected the gradients that the forward stored");
  check_devices(stored, {&saved, &aux});
}

#if defined(FASTKD_BACKEND_CPU)

// Rows of about 2^15 elements a chunk, whatever the number of threads: small batches stay on one thread.
inline int64_t grain(int64_t row_elements) { return 1 + (int64_t(1) << 15) / (row_elements + 1); }

// run(args, begin, end, scratch) over [0, tasks), each chunk with kernels.scratch_bytes(args) of its own.
template <class Kernels, class Args, class F>
void run_with_scratch(const Kernels& kernels, const Args& args, int64_t tasks, int64_t grain, const F& run) {
  torch::stable::parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<char[]> scratch(new char[kernels.scratch_bytes(args)]);
    run(args, begin, end, scratch.get());
  });
}

struct Counts {
  int64_t valid = 0, outside = 0;

  // What the reduction multiplies the sum of the rows' losses by. `items` > 0 divides instead of the rows that count.
  double factor(Reduction reduction, double items = 0) const {
    if (items > 0) return 1. / items;
    return reduction == Reduction::mean ? 1. / double(valid > 1 ? valid : 1) : 1.;
  }
};

inline Counts count_rows(const int64_t* target, int64_t rows, int64_t classes, int64_t ignore_index) {
  if (!target) return {rows, 0};
  Counts counts;
  for (int64_t r = 0; r < rows; ++r) {
    const bool counted = target[r] != ignore_index;
    counts.valid += counted;
    counts.outside += counted && (target[r] < 0 || target[r] >= classes);
  }
  return counts;
}

// loss[l] = factor * sum of row_loss[l, :], in the order of the rows and in double: the same bits for any number of threads.
template <class A>
void reduce_rows(const void* row_loss, int learners, int64_t rows, double factor, void* loss) {
  const A* row = static_cast<const A*>(row_loss);
  for (int l = 0; l < learners; ++l) {
    double sum = 0;
    for (int64_t r = 0; r < rows; ++r) sum += double(*row++);
    static_cast<A*>(loss)[l] = A(sum * factor);
  }
}

// aux [2], as core/cuda/row_kernels.cuh writes it on a GPU.
inline void write_aux(DType type, double missing_factor, int64_t outside, void* aux) {
  for (int i = 0; i < 2; ++i) {
    const double value = i == 0 ? missing_factor : double(outside);
    if (type == DType::f64)
      static_cast<double*>(aux)[i] = value;
    else
      static_cast<float*>(aux)[i] = float(value);
  }
}

// The forward of a loss over rows with stored gradients: the rows, then their reduction. `type` is that of the learners,
// `losses` how many there are of a row (row_loss A [losses, R], loss A [losses]), `work` the elements that a row costs.
// Returns what the sums of the rows were multiplied by.
template <class Kernels, class Args>
double forward_over_rows(const Kernels& kernels, Args& args, DType type, int losses, int64_t work) {
  const Counts counts = count_rows(args.target, args.rows, args.classes, args.ignore_index);
  const double factor = counts.factor(args.reduction, args.items);
  // The mean's factor goes into the stored gradients, so that a backward with grad_output 1 has nothing left to do; not in
  // float16, where it would underflow.
  args.row_factor = type == DType::f16 ? 1. : factor;
  run_with_scratch(kernels, args, args.rows, grain(work), kernels.forward);
  write_aux(type, factor / args.row_factor, counts.outside, args.aux);
  if (!args.loss) return factor;
  if (type == DType::f64)
    reduce_rows<double>(args.row_loss, losses, args.rows, factor, args.loss);
  else
    reduce_rows<float>(args.row_loss, losses, args.rows, factor, args.loss);
  return factor;
}

#else

// launch(stream) enqueues kernels on the stream of the tensor's device and returns an error, or null.
template <class F>
void on_stream(const char* op, const Tensor& like, const F& launch) {
#if defined(FASTKD_BACKEND_CUDA)
  torch::stable::accelerator::DeviceGuard guard(like.get_device_index());
  // The kernels' CUDA runtime is another copy than torch's: it has a current device of its own.
  STD_TORCH_CHECK(cudaSetDevice(like.get_device_index()) == cudaSuccess, "fastkd: ", op, ": the device cannot be chosen");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(like.get_device_index(), &stream));
  const char* error = launch(stream);
#else
  const char* error = launch(nullptr);
  (void)like;
#endif
  STD_TORCH_CHECK(error == nullptr, "fastkd: ", op, ": ", error);
}

#endif

}  // namespace fastkd
