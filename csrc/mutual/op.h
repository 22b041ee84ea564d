// What a backend of mutual receives: sizes, options, pointers. See README.md here for the mathematics.
#pragma once

#include <cstdint>

#include "core/network.h"
#include "core/reduction.h"

namespace fastkd::mutual {

// Of one CUDA launch; the CPU takes any number. Networks: the learners and the frozen teachers.
constexpr int kMaxLaunchLearners = 16, kMaxLaunchNetworks = 32;

// w[m, n] of learner m and network n, on the host or on the device. Where it is 0, m does not read n.
struct Weights {
  const double* host = nullptr;  // element m * stride_learner + n * stride_network; null: then
  const void* data = nullptr;    // A, the same with + r * stride_row
  int64_t stride_learner = 0, stride_network = 0, stride_row = 0;
};

// A = double where the learners' logits are float64, else float. Networks lie anywhere in memory; teachers are of any dtype.
struct Args {
  int64_t rows = 0, classes = 0;
  int learners = 0, teachers = 0;
  DType type{};  // of the learners and their gradients

  const Network* networks = nullptr;  // M + N x [R, C]: the learners, then the frozen teachers
  const int64_t* target = nullptr;    // [R] or null
  const Network* soft = nullptr;      // [R, C], probabilities instead of labels, or null; `target` then only ignores rows
  Weights peers, frozen;              // [M, M], diagonal never read, and [M, N]

  double temperature = 1, kd_weight = 1, ce_weight = 0, label_smoothing = 0;
  bool cross_entropy = false;  // whether rows have one: for the loss, or for the terms alone
  int64_t ignore_index = -100;
  bool scale_by_t2 = true;
  Reduction reduction = Reduction::mean;
  double items = 0;  // > 0: what the sum of the rows is divided by, instead of those that count
  const int* slot = nullptr;  // M: which of the S gradients is the learner's, or -1
  int slots = 0;
  bool stream = false;  // CUDA: as if the row did not fit on chip

  void* row_loss = nullptr;   // A [M, R]
  void* row_terms = nullptr;  // A [2, M, R], KD and CE without their weights, or null
  void* loss = nullptr;       // A [M], null for Reduction::none
  void* terms = nullptr;      // A [2, M], null where row_terms or loss is
  void* grad = nullptr;       // [S, R, C], contiguous: see README.md for its scale
  void* saved = nullptr;      // A [S, R] inverse scale of float16 gradients
  void* scratch = nullptr;    // CUDA: float [scratch_numbers_cuda()], or null
  void* aux = nullptr;        // A [2]: factor that the stored gradients still lack, targets out of range
  double row_factor = 1;      // what the stored gradients are multiplied by, 1 / max(1, rows that count) for the mean
  bool counted = false;       // CUDA: aux[0] holds this factor before the rows are run
};

struct BackwardArgs {
  int64_t rows = 0, classes = 0;
  int slots = 0;
  const int64_t* learner = nullptr;  // S: whose gradient it is
  DType type{};
  Reduction reduction = Reduction::mean;
  const void* grad_loss = nullptr;  // A [M] or [M, R]
  const void* stored = nullptr;     // [S, R, C], as forward wrote it
  const void* saved = nullptr;      // A [S, R] or null
  const void* aux = nullptr;        // A [2], as forward wrote it
  void* grad = nullptr;             // [S, R, C], or `stored`
};

// cpu.cpp defines one of these per instruction set: rows [begin, end), with scratch of scratch_bytes(args).
struct CpuKernels {
  int64_t (*scratch_bytes)(const Args&);
  void (*forward)(const Args&, int64_t begin, int64_t end, void* scratch);
  void (*backward)(const BackwardArgs&, int64_t begin, int64_t end);  // of S * R rows
};
extern const CpuKernels cpu_kernels_level1, cpu_kernels_level3, cpu_kernels_level4;

// CUDA: enqueue on a stream; an error string, or null.
const char* forward_cuda(const Args&, void* stream);
int64_t scratch_numbers_cuda(const Args&);
const char* backward_cuda(const BackwardArgs&, void* stream);

}  // namespace fastkd::mutual
