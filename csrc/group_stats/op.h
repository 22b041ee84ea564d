// What a backend of group_stats receives: sizes and pointers. See README.md here for the mathematics.
#pragma once

#include <cstdint>

#include "core/dtype.h"

namespace fastkd::group_stats {

constexpr int kMaxLaunchNetworks = 16;  // of one CUDA launch; more go in several

// Where the statistics go, each [M, R]. A = double where the logits are float64, else float.
struct Output {
  void *ce = nullptr, *confidence = nullptr, *entropy = nullptr, *margin = nullptr;  // A
  int64_t* label_rank = nullptr;
  bool* correct = nullptr;
};

// Strides are in elements; a row's classes lie next to each other.
struct Args {
  int64_t rows = 0, classes = 0;
  int networks = 0;
  DType type{};
  const void* const* logits = nullptr;  // M x [R, C]
  const int64_t* stride = nullptr;      // M
  const int64_t* target = nullptr;      // [R] or null
  int64_t ignore_index = -100;
  Output out;
};

// cpu.cpp defines one of these per instruction set: rows [begin, end) of the M * R, one network's after another's, with
// scratch of scratch_bytes(args).
struct CpuKernels {
  int64_t (*scratch_bytes)(const Args&);
  void (*forward)(const Args&, int64_t begin, int64_t end, void* scratch);
};
extern const CpuKernels cpu_kernels_level1, cpu_kernels_level3, cpu_kernels_level4;

// CUDA: enqueue on a stream; an error string, or null.
const char* forward_cuda(const Args&, void* stream);

}  // namespace fastkd::group_stats
