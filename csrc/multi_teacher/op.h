// What a backend of multi_teacher receives: sizes, options, pointers. See README.md here for the mathematics.
#pragma once

#include <cstdint>

#include "core/network.h"
#include "core/reduction.h"
#include "group_stats/op.h"

namespace fastkd::multi_teacher {

enum class Combine : int { losses, probs, logits };

// Of a teacher p and the student q. pair: w_f KL(p || q) + w_r KL(q || p). mixture: w_p KL(p || m) + w_q KL(q || m) with
// m = b p + (1 - b) q, 0 < b < 1. tvd: sum |p - q| / 2.
enum class Divergence : int { forward, pair, mixture, tvd };
constexpr int kMostDivergenceNumbers = 3;

constexpr int kMaxLaunchTeachers = 16;  // of one CUDA launch; the CPU takes any number

// The longest row that a CUDA thread block holds in registers, of A = float and of double; a longer one is streamed.
template <class A>
constexpr int64_t kMaxOnChip = 8192;
template <>
constexpr int64_t kMaxOnChip<double> = 2048;

// A = double where the student is float64, else float. Every network has a dtype and a layout of its own.
struct Args {
  int64_t rows = 0, classes = 0;
  int64_t columns = 0;                // of the student's rows and their gradient's, >= classes: the rest is padding
  int teachers = 0;                   // K >= 0
  Network student;                    // [R, columns]
  const Network* teacher = nullptr;   // K x [R, C]
  const int64_t* target = nullptr;    // [R] or null
  bool labels = false;                // the target holds classes; else it only says which rows are ignored
  Network soft;                       // probabilities [R, C] in the place of labels, or data null

  // A teacher of weight 0 is not read, in that row; a row whose weights are all 0 has no KD, whatever `combine`.
  const double* host_weight = nullptr;  // K, or null: then
  const void* weight = nullptr;         // A [K] or [K, R]
  int64_t weight_stride_teacher = 0, weight_stride_row = 0;
  bool uniform = false;  // every weight is 1/K: mixtures are running means, so that those of equal networks are exact
  const double* temperature = nullptr;  // max(1, K), all alike unless several_temperatures
  bool several_temperatures = false;

  // Of the student, then of the teachers: y = softcap tanh(logit_scale z / softcap), or logit_scale z where softcap is 0.
  // Null where no network has either.
  const double *softcap = nullptr, *logit_scale = nullptr;

  Combine combine = Combine::losses;
  Divergence divergence = Divergence::forward;
  double divergence_number[kMostDivergenceNumbers] = {};  // pair: w_f, w_r. mixture: b, w_p, w_q
  const void* share = nullptr;  // A [2] or [2, R], in the place of the numbers of pair, or null
  int64_t share_stride_kind = 0, share_stride_row = 0;
  Reduction reduction = Reduction::mean;
  double items = 0;  // > 0: what the sum of the rows is divided by, instead of those that count
  double kd_weight = 1, ce_weight = 0, label_smoothing = 0;
  bool cross_entropy = false;  // CE is wanted: ce_weight is not 0, or `terms`, and there are labels or soft targets
  bool terms = false;          // KD and CE are wanted beside the loss
  int64_t ignore_index = -100;
  bool scale_by_t2 = true;
  bool need_grad = false;
  bool stream = false;  // CUDA: the row does not fit on chip, save states instead of the gradient

  // L = losses_of(args): the loss kd_weight * KD + ce_weight * CE and, with `terms`, KD and CE without these weights.
  void* row_loss = nullptr;  // A [L, R]
  void* loss = nullptr;      // A [L], null for Reduction::none
  void* grad = nullptr;      // student's type [R, columns], contiguous: see README.md for its scale
  void* saved = nullptr;     // A [R] inverse scale of float16 gradients, or A [R, saved_columns()] states of streamed rows
  void* scratch = nullptr;   // CUDA: float [scratch_numbers_cuda()], or null
  void* aux = nullptr;       // A [2]: factor that the stored gradient still lacks, targets out of range
  void* kl = nullptr;        // A [K, R], each teacher's divergence, or null: no statistics are wanted
  group_stats::Output stats; // with kl: of the student, then of the teachers, each [K + 1, R]; not with soft targets
  double row_factor = 1;     // what the stored gradient is multiplied by, 1 / max(1, rows that count) for the mean
  bool counted = false;      // CUDA: aux[0] holds this factor before the rows are run
};

inline namespace FASTKD_TARGET {

FASTKD_HD int losses_of(const Args& args) { return args.terms ? 3 : 1; }

// Of a streamed row: max_s, Z_s(T = 1); of soft targets, smoothed, their sum; per teacher max_t, Z_t, Z_s(T_k); and behind
// these, of divergences besides forward, what q is multiplied by in the gradient of each.
FASTKD_HD int saved_per_teacher(Divergence divergence) { return divergence == Divergence::forward ? 3 : 4; }
FASTKD_HD int64_t saved_columns(const Args& args) {
  return int64_t(saved_per_teacher(args.divergence)) * args.teachers + (args.soft.data ? 3 : 2);
}

}  // namespace FASTKD_TARGET

struct BackwardArgs {
  int64_t rows = 0, classes = 0;
  DType type{};
  Reduction reduction = Reduction::mean;
  const void* grad_loss = nullptr;  // A [] or [R]
  const void* stored = nullptr;     // [R, C], as forward wrote it
  const void* saved = nullptr;      // A [R] or null
  const void* aux = nullptr;        // A [2], as forward wrote it
  void* grad = nullptr;             // [R, C], or `stored`
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
int64_t scratch_numbers_cuda(const Args&);
const char* backward_cuda(const BackwardArgs&, void* stream);
const char* stream_backward_cuda(const Args&, const void* grad_loss, void* stream);

}  // namespace fastkd::multi_teacher
