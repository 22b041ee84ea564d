// What a backend of multi_label receives: sizes, options, pointers. See README.md here for the mathematics.
#pragma once

#include <cstdint>

#include "core/network.h"
#include "core/reduction.h"

namespace fastkd::multi_label {

enum class Combine : int { losses, probs, logits };

constexpr int kMaxLaunchTeachers = 16;  // of one CUDA launch; the CPU takes any number

// A = double where the student is float64, else float. Every network has a dtype and a layout of its own.
struct Args {
  int64_t rows = 0, classes = 0;
  int teachers = 0;                  // K >= 0
  Network student;                   // [R, C]
  const Network* teacher = nullptr;  // K x [R, C]
  Network labels;                    // [R, C] or data null: below 0 where the element counts nowhere, NaN of a wrong label
  bool labelled = false;             // they are labels, else they only say which elements count
  const int64_t* target = nullptr;   // [R] or null: ignore_index where no element of the row counts, else 0
  int64_t ignore_index = -100;
  const void* pos_weight = nullptr;  // A [C + 1] or null: of each class's positive labels; the largest, at least 1

  // A teacher of weight 0 is not read, in that row; a row whose weights are all 0 has no KD, whatever `combine`.
  const double* host_weight = nullptr;  // K, or null: then
  const void* weight = nullptr;         // A [K] or [K, R]
  int64_t weight_stride_teacher = 0, weight_stride_row = 0;
  bool uniform = false;                 // every weight is 1/K: mixtures are running means, exact for equal networks
  const double* temperature = nullptr;  // max(1, K), all alike unless several temperatures were given

  Combine combine = Combine::losses;
  Reduction reduction = Reduction::mean;
  double items = 0;  // > 0: what the sum of the rows is divided by, instead of those that count
  double kd_weight = 1, ce_weight = 0, class_factor = 1;  // class_factor: of a row's sum over its classes
  bool cross_entropy = false;  // CE is wanted: ce_weight is not 0, or `terms`, and there are labels
  bool terms = false;  // KD and CE are wanted beside the loss
  bool scale_by_t2 = true;
  bool need_grad = false;

  // L = losses_of(args): the loss kd_weight * KD + ce_weight * CE and, with `terms`, KD and CE without these weights.
  void* row_loss = nullptr;  // A [L, R]
  void* loss = nullptr;  // A [L], null for Reduction::none
  void* grad = nullptr;  // student's type [R, C], contiguous; as multi_teacher's: see its README.md for its scale
  void* saved = nullptr;  // A [R], inverse scales of float16 gradients
  void* aux = nullptr;  // A [2]: factor that the stored gradient still lacks, 0
  double row_factor = 1;  // what the stored gradient is multiplied by, 1 / max(1, rows that count) for the mean
  bool counted = false;  // CUDA: aux[0] holds this factor before the rows are run
};

inline namespace FASTKD_TARGET {

FASTKD_HD int losses_of(const Args& args) { return args.terms ? 3 : 1; }

}  // namespace FASTKD_TARGET

// cpu.cpp defines one of these per instruction set: rows [begin, end), with scratch of scratch_bytes(args).
struct CpuKernels {
  int64_t (*scratch_bytes)(const Args&);
  void (*forward)(const Args&, int64_t begin, int64_t end, void* scratch);
};
extern const CpuKernels cpu_kernels_level1, cpu_kernels_level3, cpu_kernels_level4;

// CUDA: enqueue on a stream; an error string, or null.
const char* forward_cuda(const Args&, void* stream);

}  // namespace fastkd::multi_label
