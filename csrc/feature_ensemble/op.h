// What a backend of feature_ensemble receives: sizes, options, pointers. See README.md here for the mathematics.
#pragma once

#include <cstdint>

#include "core/reduction.h"

namespace fastkd::feature_ensemble {

enum class Norm : int { sample, position, channel };

// A sample lies in memory as a dense matrix [outer, inner]: [C, places] when contiguous, [places, C] in channels_last. A
// group, which is what has one norm, is the whole matrix, one of its rows or one of its columns.
enum class Group : int { all, row, column };

constexpr int kMaxLaunchPairs = 16;  // of one CUDA launch; the CPU takes any number

// Per group, each in a plane of its own [groups]: what the backward needs beside the maps (math.h: Factors).
constexpr int kStatePlanes = 5;

struct Pair {
  const void *student = nullptr, *teacher = nullptr;
  void* grad = nullptr;                             // or null in the forward; of a shared student in the first pair alone
  int64_t student_stride = 0, teacher_stride = 0;   // between samples, in elements; the gradient's is outer * inner
  int64_t outer = 0, inner = 0;
  Group group = Group::all;
  DType teacher_type{};
  bool transposed = false;  // the teacher's sample lies in the other layout, [inner, outer]
  bool unpacked = false;    // on the CPU: it goes through scratch memory, into the student's layout and type A
  int64_t groups = 0;       // of a sample
  int64_t first_group = 0;  // in the planes; sample b's groups start at first_group + b * groups

  FASTKD_HD int64_t elements() const { return outer * inner; }
};

// A = double where the students are float64, else float.
struct Args {
  int64_t samples = 0, total_groups = 0;
  int pairs = 0;
  bool shared = false;  // one student's map, compared with every teacher
  DType student_type{};
  Norm norm = Norm::sample;
  const Pair* pair = nullptr;

  const double* host_weight = nullptr;  // K, or null: then
  const void* weight = nullptr;         // A [K] or [K, B]
  int64_t weight_stride_pair = 0, weight_stride_sample = 0;
  const bool* mask = nullptr;  // [B], or null: the samples that count
  int p = 1;
  bool mean_elements = true;
  Reduction reduction = Reduction::mean;
  double divisor = 1;  // of the sum over samples
  bool need_grad = false;

  void* distance = nullptr;         // A [K, B], each pair's sum over its elements; on CUDA [groups], then [K, B]
  void* sample_distance = nullptr;  // A [K, B]
  void* loss = nullptr;             // A [B] or []
  void* state = nullptr;            // A [kStatePlanes, groups], null where no gradient is needed
  const void* grad_loss = nullptr;  // A [B] or [], where a gradient is written; null: 1
  DType grad_type{};                // the student's, or f32 for gradients in float16 that grad_loss still multiplies
};

// cpu.cpp defines one of these per instruction set. Tasks [begin, end) of samples * (shared ? 1 : pairs), in scratch of
// scratch_bytes(args).
struct CpuKernels {
  int64_t (*scratch_bytes)(const Args&);
  void (*forward)(const Args&, int64_t begin, int64_t end, void* scratch);
  void (*backward)(const Args&, int64_t begin, int64_t end, void* scratch);
};
extern const CpuKernels cpu_kernels_level1, cpu_kernels_level3, cpu_kernels_level4;

// CUDA: enqueue on a stream; an error string, or null.
const char* forward_cuda(const Args&, void* stream);
const char* backward_cuda(const Args&, void* stream);

}  // namespace fastkd::feature_ensemble
