// What the CUDA kernels of multi_teacher receive: Args in the accumulation type, by value, so that it lies in constant
// memory and a loop over the teachers indexes it without a copy.
#pragma once

#include "core/cuda/vec.cuh"
#include "group_stats/op.h"
#include "multi_teacher/divergence.h"

namespace fastkd::multi_teacher {
inline namespace FASTKD_TARGET {

template <class A>
struct Params {
  int64_t rows, classes, columns;
  int teachers;
  Network network[kMaxLaunchTeachers + 1];  // the student, then the teachers
  Network soft;
  unsigned vectors;  // a bit per network: its rows allow vector accesses
  bool soft_vectors, grad_vectors, capped;
  A cap[kMaxLaunchTeachers + 1], cap_inner[kMaxLaunchTeachers + 1];  // 0: none; what a logit is multiplied by before it
  A logit_scale;                                                     // of the student
  const int64_t* target;
  int64_t ignore_index;
  bool labels;

  const A* weight;  // null: host_weight
  int64_t weight_stride_teacher, weight_stride_row;
  A host_weight[kMaxLaunchTeachers], inv_t[kMaxLaunchTeachers];
  Scale<A> scale[kMaxLaunchTeachers];  // grad with kd_weight in it
  unsigned host_reads;                 // teachers whose host_weight is not 0
  A host_total;                        // the sum of host_weight
  bool uniform;
  int integer_t;  // 0 where the temperature is no small integer
  bool several_temperatures;
  Combine combine;
  Divergence divergence;
  DivergenceNumbers<A> numbers;
  const A* share;  // in the place of the numbers of a pair, or null
  int64_t share_stride_kind, share_stride_row;
  A kd_weight, ce_weight, smoothing;
  bool cross_entropy, terms, need_grad, half_student;

  StoredFactor<A> factor;  // of the stored gradient
  A *row_loss, *saved, *kl;
  int64_t saved_columns;
  void* grad;
  group_stats::Output stats;

  FASTKD_HD A weight_of(int k, int64_t row) const {
    return weight ? weight[k * weight_stride_teacher + row * weight_stride_row] : host_weight[k];
  }
  // A bit per teacher: those whose weight in this row is not 0, which are read.
  FASTKD_HD unsigned reads_of(int64_t row) const {
    if (!weight) return host_reads;
    unsigned reads = 0;
#pragma unroll 1
    for (int k = 0; k < teachers; ++k) reads |= unsigned(weight_of(k, row) != 0) << k;
    return reads;
  }
  FASTKD_HD A total_of(int64_t row) const {
    if (!weight) return host_total;
    A total = 0;
#pragma unroll 1
    for (int k = 0; k < teachers; ++k) total += weight_of(k, row);
    return total;
  }
  template <class S>
  FASTKD_HD S* grad_row(int64_t row) const {
    return static_cast<S*>(grad) + row * columns;
  }
  FASTKD_HD DivergenceNumbers<A> numbers_at(int64_t row) const {
    if (!share) return numbers;
    const A* at = share + row * share_stride_row;
    return {at[0], at[share_stride_kind]};
  }
  FASTKD_HD bool in_vectors(int slot) const { return vectors >> slot & 1u; }

  // KD and CE without their weights, of one row.
  FASTKD_HD void store_losses(int64_t row, A kd, A ce) const {
    row_loss[row] = (kd_weight != 0 ? kd_weight * kd : A(0)) + (ce_weight != 0 ? ce_weight * ce : A(0));
    if (!terms) return;
    row_loss[rows + row] = kd;
    row_loss[2 * rows + row] = ce;
  }
};

constexpr int kNoTeacher = 32;

// The first teacher after `k` (or of all, after -1) in a set of bits.
__device__ __forceinline__ int next_teacher(unsigned set, int k) {
  const unsigned rest = set & (~0u << (k + 1));
  return rest ? __ffs(int(rest)) - 1 : kNoTeacher;
}

// The sum of smoothed label probabilities, from the sum of those given.
template <class A>
FASTKD_HD A smoothed_mass(A mass, A smoothing) {
  return (1 - smoothing) * mass + smoothing;
}

// A teacher that counts in a mixture of logits: a running mean where the weights are alike, so that equal teachers' is
// exactly theirs. -inf where a teacher is.
template <class A>
FASTKD_HD A mix_logit(A mixed, A t, bool uniform, A weight_or_step) {
  const A sum = uniform ? mixed + (t - mixed) * weight_or_step : mixed + weight_or_step * t;
  return t == -A(kInf) || mixed == -A(kInf) ? -A(kInf) : sum;
}

template <class A>
void fill_weights(Params<A>& p, const Args& args) {
  p.weight = args.host_weight ? nullptr : static_cast<const A*>(args.weight);
  p.weight_stride_teacher = args.weight_stride_teacher;
  p.weight_stride_row = args.weight_stride_row;
  p.uniform = args.uniform;
  double total = 0;
  for (int k = 0; k < args.teachers; ++k) {
    p.host_weight[k] = args.host_weight ? A(args.host_weight[k]) : A(0);
    p.host_reads |= unsigned(p.host_weight[k] != 0) << k;
    total += args.host_weight ? args.host_weight[k] : 0;
  }
  p.host_total = args.uniform ? A(1) : A(total);
}

template <class A>
void fill_temperatures(Params<A>& p, const Args& args) {
  p.inv_t[0] = A(1 / args.temperature[0]);  // also without a teacher
  for (int k = 0; k < args.teachers; ++k) {
    p.inv_t[k] = A(1 / args.temperature[k]);
    p.scale[k] = temperature_scale<A>(args.temperature[k], args.scale_by_t2);
    p.scale[k].grad = A(double(p.scale[k].grad) * args.kd_weight);
  }
  p.integer_t = integer_temperature(args.temperature[0]);
  p.several_temperatures = args.several_temperatures;
}

template <class A>
void fill_divergence(Params<A>& p, const Args& args) {
  p.divergence = args.divergence;
  p.numbers = numbers_of<A>(args.divergence, args.divergence_number);
  p.share = static_cast<const A*>(args.share);
  p.share_stride_kind = args.share_stride_kind;
  p.share_stride_row = args.share_stride_row;
}

template <class A>
void fill_caps(Params<A>& p, const Args& args) {
  p.capped = args.softcap != nullptr;
  for (int slot = 0; p.capped && slot <= args.teachers; ++slot) {
    const double cap = args.softcap[slot], scale = args.logit_scale[slot];
    p.cap[slot] = A(cap);
    p.cap_inner[slot] = A(cap > 0 ? scale / cap : scale);
  }
  p.logit_scale = p.capped ? A(args.logit_scale[0]) : A(1);
}

template <class S, class A>
Params<A> make_params(const Args& args) {
  constexpr int kWidth = kVector<S, S>;
  Params<A> p{};
  p.rows = args.rows;
  p.classes = args.classes;
  p.columns = args.columns;
  p.teachers = args.teachers;
  for (int slot = 0; slot <= args.teachers; ++slot) {
    p.network[slot] = slot == 0 ? args.student : args.teacher[slot - 1];
    p.vectors |= unsigned(rows_aligned<kWidth>(p.network[slot], args.classes)) << slot;
  }
  p.soft = args.soft;
  p.soft_vectors = rows_aligned<kWidth>(args.soft, args.classes);
  p.grad_vectors = rows_aligned<kWidth>(args.grad, args.columns, args.classes, sizeof(S));
  p.target = args.target;
  p.ignore_index = args.ignore_index;
  p.labels = args.labels;
  fill_weights(p, args);
  fill_temperatures(p, args);
  fill_divergence(p, args);
  fill_caps(p, args);
  p.combine = args.combine;
  p.kd_weight = A(args.kd_weight);
  p.ce_weight = A(args.ce_weight);
  p.smoothing = A(args.label_smoothing);
  p.cross_entropy = args.cross_entropy;
  p.terms = args.terms;
  p.need_grad = args.need_grad;
  p.half_student = args.student.type == DType::f16;
  p.factor = stored_factor<A>(args);
  p.row_loss = static_cast<A*>(args.row_loss);
  p.saved = static_cast<A*>(args.saved);
  p.saved_columns = saved_columns(args);
  p.grad = args.grad;
  p.kl = static_cast<A*>(args.kl);
  p.stats = args.stats;
  return p;
}

}  // namespace FASTKD_TARGET
}  // namespace fastkd::multi_teacher
