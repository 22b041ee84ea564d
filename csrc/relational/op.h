// What a backend of relational receives: sizes, pointers. See README.md here for the mathematics.
#pragma once

#include <cstdint>

#include "core/reduction.h"

namespace fastkd::relational {

// What is kept of a network's distances, all relative to their mean; [planes, N, padded].
//   distance: the distances themselves, in double.
//   single:   their squares as the sum of two floats `hi` and `lo`, and `inv`, sqrt(1/2) over the distance.
//   full:     their squares and `inv` in double.
enum class Kind : int { distance, single, full };

constexpr int64_t kPad = 32;     // rows of planes are padded with zeros to whole tiles and SIMD registers
constexpr int64_t kChunks = 16;  // parts that the vertices of angles are divided into, for any number of threads

// An odd number of kPad: at powers of two, rows would fall on the same lines of the cache.
FASTKD_HD int64_t padded_size(int64_t n) { return ((n + kPad - 1) / kPad | 1) * kPad; }
FASTKD_HD int plane_count(Kind kind) { return kind == Kind::single ? 3 : kind == Kind::full ? 2 : 1; }

// From centred rows and their Gram matrix, or from squared distances, to planes.
struct SidesArgs {
  int64_t n = 0, width = 0;
  Kind kind{};
  const bool* mask = nullptr;     // [N], or null: a row that does not count is at distance 0 from all
  double eps = 0;                 // a side shorter than eps times the mean side has inv = 0
  const double* x = nullptr;      // [N, D], centred
  const double* gram = nullptr;   // [N, N]
  double* squares = nullptr;      // [N, N] squared distances
  double* row_sums = nullptr;     // [2, N] sums of the distances, numbers of positive ones
  double* mean = nullptr;         // [2] mean of the positive distances, their number; written by CUDA, read by the CPU
  void* planes = nullptr;

  FASTKD_HD bool counts(int64_t a, int64_t b) const { return !mask || (mask[a] && mask[b]); }
};

// Distances without a Gram matrix. Rows are a network's embeddings times a power of two that brings the largest magnitude
// into [1, 2), so that float32 squares neither overflow nor underflow; padded with zeros to kWidth.
constexpr int64_t kWidth = 16;
constexpr int64_t kBlock = 32;  // rows of a task of the CPU

FASTKD_HD int64_t padded_width(int64_t width) { return (width + kWidth - 1) / kWidth * kWidth; }

struct RowsArgs {
  int64_t n = 0, columns = 0, width = 0;  // width: columns, padded
  DType type{};                           // f32, f64
  const void* from = nullptr;             // [N, columns]
  double scale = 1;                       // of the CPU
  void* rows = nullptr;                   // [N, width]
  double* squares = nullptr;              // [N, N] squared distances
  // CUDA alone:
  bool exact = false;                     // float32: squares in two floats, for angles
  double* device_scale = nullptr;
  double* magnitudes = nullptr;           // [magnitude_blocks_cuda]
  double* parts = nullptr;                // [parts_cuda, N, N] squared distances of parts of the columns
};

// grad [N, columns] = factor * sum_b -laplacian_ab (x_a - x_b)
struct PullArgs {
  int64_t n = 0, columns = 0, width = 0;
  DType type{};
  const void* rows = nullptr;
  const double* laplacian = nullptr;
  const double* factor = nullptr;
  void* grad = nullptr;
};

// From the planes of both networks to the losses of N vertices (angles) or anchors (distances), and to `laplacian`, the
// matrix whose product with the student's centred rows is their gradient.
struct LossArgs {
  int64_t n = 0;
  Kind kind{};
  Reduction reduction{};
  const void *student = nullptr, *teacher = nullptr;  // planes
  const double* mean = nullptr;                       // [2] of the student
  const double* weight = nullptr;                     // [N], factors of the N losses, or null: 1
  bool need_grad = false;
  double* row_loss = nullptr;   // [N]
  double* loss = nullptr;       // [], null for Reduction::none
  double* laplacian = nullptr;  // [N, N]
  void* partial = nullptr;      // angles: partial_elements of the planes' type
  double* row_sums = nullptr;   // distances: [N]

  FASTKD_HD double weight_of(int64_t a) const { return weight ? weight[a] : 1.; }
  // The factor of the sum of the row losses in the result, by which their gradients are multiplied as well.
  FASTKD_HD double factor() const { return reduction == Reduction::mean && n > 1 ? 1. / double(n) : 1.; }
};

// cpu.cpp defines one of these per instruction set; [begin, end) are rows, or chunks of vertices.
struct CpuKernels {
  int64_t (*partial_elements)(int64_t n);
  double (*scale)(const RowsArgs&);
  void (*copy_rows)(const RowsArgs&, int64_t begin, int64_t end);
  void (*direct_squares)(const RowsArgs&, int64_t begin, int64_t end);  // rows of one block
  void (*pull)(const PullArgs&, int64_t begin, int64_t end);
  void (*gram_squares)(const SidesArgs&, int64_t begin, int64_t end);
  void (*sums)(const SidesArgs&, int64_t begin, int64_t end);
  void (*planes)(const SidesArgs&, int64_t begin, int64_t end);
  void (*angles)(const LossArgs&, int64_t begin, int64_t end);
  void (*angle_pairs)(const LossArgs&, int64_t begin, int64_t end);
  void (*distances)(const LossArgs&, int64_t begin, int64_t end);
  void (*distance_pairs)(const LossArgs&, double correction, int64_t begin, int64_t end);
  void (*diagonal)(const LossArgs&, int64_t begin, int64_t end);
};
extern const CpuKernels cpu_kernels_level1, cpu_kernels_level3, cpu_kernels_level4;

// CUDA: enqueue on a stream; an error string, or null.
int64_t partial_elements_cuda(int64_t n);
const char* sides_cuda(const SidesArgs&, void* stream);
int64_t magnitude_blocks_cuda(const RowsArgs&);
int64_t parts_cuda(const RowsArgs&);
const char* direct_sides_cuda(const RowsArgs&, const SidesArgs&, void* stream);  // scaled rows, scale, planes, mean
const char* pull_cuda(const PullArgs&, void* stream);
const char* angles_cuda(const LossArgs&, void* stream);
const char* distances_cuda(const LossArgs&, void* stream);

}  // namespace fastkd::relational
