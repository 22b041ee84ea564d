// What a backend of group_stats receives: sizes and pointers. See README.md here for the mathematics.
#pragma once

#include <cstdint>

#include "core/network.h"

namespace fastkd::group_stats {

constexpr int kMaxLaunchNetworks = 16;  // of one CUDA launch; more go in several

// Where the statistics go, each [M, R]. A = double where `wide`, else float.
struct Output {
  void *ce = nullptr, *confidence = nullptr, *entropy = nullptr, *margin = nullptr;  // A
  int64_t* label_rank = nullptr;
  bool* correct = nullptr;
};

struct Args {
  int64_t rows = 0, classes = 0;
  int networks = 0;
  const Network* network = nullptr;  // M
  const int64_t* target = nullptr;   // [R] or null
  int64_t ignore_index = -100;
  // Probabilities [R, C] as labels. First soft_labels writes their largest class to `labels`, -1 where `target` is
  // ignore_index; then `labels` is the target, and -1 what is ignored.
  const Network* soft = nullptr;
  int64_t* labels = nullptr;
  bool wide = false;  // whether a network is float64: its numbers are, then those of all
  Output out;
};

// cpu.cpp defines one of these per instruction set: rows [begin, end) of the M * R, one network's after another's (of R for
// soft_labels), with scratch of scratch_bytes(args).
struct CpuKernels {
  int64_t (*scratch_bytes)(const Args&);
  void (*forward)(const Args&, int64_t begin, int64_t end, void* scratch);
  void (*soft_labels)(const Args&, int64_t begin, int64_t end, void* scratch);
};
extern const CpuKernels cpu_kernels_level1, cpu_kernels_level3, cpu_kernels_level4;

// CUDA: enqueue on a stream; an error string, or null.
const char* forward_cuda(const Args&, void* stream);

}  // namespace fastkd::group_stats
