// What a backend of multi_teacher receives: sizes, options, pointers. See README.md here for the mathematics.
#pragma once

#include <cstdint>

#include "core/reduction.h"
#include "group_stats/op.h"

namespace fastkd::multi_teacher {

enum class Combine : int { losses, probs, logits };

constexpr int kMaxLaunchTeachers = 16;  // of one CUDA launch; the CPU takes any number

// A = double where the student is float64, else float. Strides are in elements; a row's classes lie next to each other.
struct Args {
  int64_t rows = 0, classes = 0;
  int teachers = 0;
  DType student_type{}, teacher_type{};

  const void* student = nullptr;  // [R, C]
  int64_t student_stride = 0;
  const void* const* teacher = nullptr;     // K x [R, C]
  const int64_t* teacher_stride = nullptr;  // K
  const int64_t* target = nullptr;          // [R] or null

  const double* host_weight = nullptr;  // K, or null: then
  const void* weight = nullptr;         // A [K] or [K, R]
  int64_t weight_stride_teacher = 0, weight_stride_row = 0;
  const double* temperature = nullptr;  // K, all alike unless several_temperatures
  bool several_temperatures = false;

  Combine combine = Combine::losses;
  Reduction reduction = Reduction::mean;
  double items = 0;  // > 0: what the sum of the rows is divided by, instead of those that count
  double ce_weight = 0, label_smoothing = 0;
  int64_t ignore_index = -100;
  bool scale_by_t2 = true;
  bool need_grad = false;
  bool stream = false;  // CUDA: the row does not fit on chip, save states instead of the gradient

  void* row_loss = nullptr;  // A [R]
  void* loss = nullptr;      // A [], null for Reduction::none
  void* grad = nullptr;      // student's type [R, C], contiguous: see README.md for its scale
  void* saved = nullptr;     // A [R] inverse scale of float16 gradients, or A [R, 3K + 2] states of streamed rows
  void* aux = nullptr;       // A [2]: factor that the stored gradient still lacks, targets out of range
  void* kl = nullptr;        // A [K, R], each teacher's divergence, or null: no statistics are wanted
  group_stats::Output stats; // with kl: of the student, then of the teachers, each [K + 1, R]
  double row_factor = 1;     // CPU: what the stored gradient is multiplied by, 1 / max(1, rows that count) for the mean
};

struct BackwardArgs {
  int64_t rows = 0, classes = 0;
  DType type{};
  Reduction reduction = Reduction::mean;
  const void* grad_loss = nullptr;  // A [] or [R]
  const void* grad_rows = nullptr;  // [R, C], as forward stored them
  const void* saved = nullptr;      // A [R] or null
  const void* aux = nullptr;        // A [2], as forward wrote it
  void* grad = nullptr;             // [R, C]
};

// cpu.cpp defines one of these per instruction set: rows [begin, end), with scratch of scratch_bytes(args).
struct CpuKernels {
  int64_t (*scratch_bytes)(const Args&);
  void (*forward)(const Args&, int64_t begin, int64_t end, void* scratch);
  void (*backward)(const BackwardArgs&, int64_t begin, int64_t end);
};
extern const CpuKernels cpu_kernels_level1, cpu_kernels_level3, cpu_kernels_level4;

// CUDA: enqueue on a stream; an error string, or null. Statistics: not of rows that are streamed.
const char* forward_cuda(const Args&, void* stream);
const char* backward_cuda(const BackwardArgs&, void* stream);
const char* stream_backward_cuda(const Args&, const void* grad_loss, void* stream);

}  // namespace fastkd::multi_teacher
