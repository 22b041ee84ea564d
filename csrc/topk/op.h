// What the CPU backend of topk receives: sizes and pointers. See README.md here for the mathematics.
#pragma once

#include <cstdint>

#include "core/network.h"

namespace fastkd::topk {

// As MODES of fastkd/ops/topk.py.
enum class Mode : int { tail, truncate, teacher, both, sampled };

struct Args {
  int64_t rows = 0, classes = 0, k = 0;
  Network student;                    // [R, C]
  const int64_t* ids = nullptr;       // [R, k]; below 0: no entry
  const double* log_probs = nullptr;  // [R, k]; at most kAbsent: no entry. Null: a row's entries count alike
  const double* log_tail = nullptr;   // [R] or null
  const double* weight = nullptr;     // [R]; a row of weight 0 is not read
  Mode mode = Mode::tail;
  double temperature = 1, row_factor = 1;  // the latter multiplies stored gradients, but for float16's
  bool need_grad = false;
  void* row_loss = nullptr;  // A [R]; A = double for a float64 student, else float
  void* grad = nullptr;      // [R, C] in the student's dtype
  void* saved = nullptr;     // A [R]: what float16 rows are to be multiplied by
};

constexpr double kAbsent = -1e3;

// cpu.cpp defines one of these per instruction set: rows [begin, end), with scratch of scratch_bytes(args).
struct CpuKernels {
  int64_t (*scratch_bytes)(const Args&);
  void (*forward)(const Args&, int64_t begin, int64_t end, void* scratch);
};
extern const CpuKernels cpu_kernels_level1, cpu_kernels_level3, cpu_kernels_level4;

}  // namespace fastkd::topk
