// multi_teacher on the CPU: a row at a time through scratch memory that stays in the L1 or L2 cache. Compiled once per
// instruction set; no headers of the standard library with inline functions here (core/config.h says why).
#include "multi_teacher/cpu_teacher.h"

namespace fastkd::multi_teacher {
inline namespace FASTKD_TARGET {
namespace {

// The gradient alone, of a mixture of teachers.
template <class A>
void add_difference(A* grad, A factor, const A* e_s, A ratio, const A* e_t, int64_t n) {
#pragma omp simd
  for (int64_t c = 0; c < n; ++c) grad[c] += factor * (e_s[c] - ratio * e_t[c]);
}

template <class A>
A maximum(const A* x, int64_t n) {
  A top = -kInf;
#pragma omp simd reduction(max : top)
  for (int64_t c = 0; c < n; ++c) top = x[c] > top ? x[c] : top;
  return top;
}

template <class A>
A kd_losses(Row<A>& row) {
  A loss = 0;
  double at = row.args.temperature[0];  // where student_exp stands
  for (int k = 0; k < row.args.teachers; ++k) {
    if (!row.is_read(k)) continue;
    const double t = row.args.temperature[k];
    if (t != at) student_at(row, at = t);
    const A max_teacher = load_teacher(row, k), w = row.weight(k);
    A kl;
    if (row.args.divergence == Divergence::forward) {
      kl = teach(row, row.s.teacher, max_teacher, w, t);
      row.keep_divergence(k, kl);
    } else {
      kl = teach_otherwise(row, k, row.s.teacher, max_teacher, w, t);
    }
    if (w != 0) loss += w * temperature_scale<A>(t, row.args.scale_by_t2).loss * kl;
  }
  return loss;
}

// mean += what a teacher adds to it: w t, or of equal weights (t - mean) / number, which is exact for equal teachers.
template <class A>
void add_logits(A* mean, const A* t, A w, int number, bool uniform, int64_t n) {
  const A share = uniform ? A(1) / A(number) : w, old = uniform ? A(1) : A(0);
  if (number == 1) {
    const A first = uniform ? A(1) : w;
#pragma omp simd
    for (int64_t c = 0; c < n; ++c) mean[c] = t[c] == -A(kInf) ? t[c] : first * t[c];
    return;
  }
#pragma omp simd
  for (int64_t c = 0; c < n; ++c) {
    const A next = mean[c] + share * (t[c] - old * mean[c]);
    mean[c] = t[c] == -A(kInf) || mean[c] == -A(kInf) ? -A(kInf) : next;
  }
}

template <class A>
A kd_logits(Row<A>& row) {
  A* mean = row.s.mixture;
  const double t = row.args.temperature[0];
  int number = 0;
  for (int k = 0; k < row.args.teachers; ++k) {
    if (!row.is_read(k)) continue;
    keep_divergence_alone(row, k, load_teacher(row, k), t);
    const A w = row.weight(k);
    if (w != 0) add_logits(mean, row.s.teacher, w, ++number, row.args.uniform, row.padded);
  }
  if (number == 0) return 0;
  const A top = maximum(mean, row.padded);
  const bool forward = row.args.divergence == Divergence::forward;
  const A kl = forward ? teach(row, mean, top, A(1), t) : teach_otherwise(row, -1, mean, top, A(1), t);
  return temperature_scale<A>(t, row.args.scale_by_t2).loss * kl;
}

// p = the mixture of the teachers' probabilities, divided by the sum of their weights, which is returned; 0: no teacher.
template <class A>
A mix_probabilities(Row<A>& row, double temperature) {
  const Scratch<A>& s = row.s;
  A *p = s.mixture, total = 0;
  for (int k = 0; k < row.args.teachers; ++k) {
    if (!row.is_read(k)) continue;
    const A max_teacher = load_teacher(row, k), w = row.args.uniform ? A(1) : row.weight(k);
    keep_divergence_alone(row, k, max_teacher, temperature);
    if (w == 0) continue;
    const A z = exponentials(s.teacher, max_teacher, A(1 / temperature), row.padded, s.teacher, s.teacher_exp);
    const A inv_z = 1 / z, share = w / (total + w);  // of equal weights 1, 1/2, 1/3, ...
    if (total == 0)
      for (int64_t c = 0; c < row.padded; ++c) p[c] = 0;
#pragma omp simd
    for (int64_t c = 0; c < row.padded; ++c) p[c] += share * (inv_z * s.teacher_exp[c] - p[c]);
    total += w;
  }
  return row.args.uniform && total > 0 ? A(1) : total;
}

// The same in logarithms, of a mixture that another divergence than forward is taken from.
template <class A>
A mix_log_probabilities(Row<A>& row, double temperature) {
  const Scratch<A>& s = row.s;
  A total = 0;
  for (int k = 0; k < row.args.teachers; ++k) {
    if (!row.is_read(k)) continue;
    const A max_teacher = load_teacher(row, k), w = row.args.uniform ? A(1) : row.weight(k);
    keep_divergence_alone(row, k, max_teacher, temperature);
    if (w == 0) continue;
    const A log_z = natural_log(teacher_at(row, s.teacher, max_teacher, temperature));
    if (total == 0)
      for (int64_t c = 0; c < row.padded; ++c) s.mixture[c] = s.teacher[c] - log_z;
    else
      mix_logs(s.mixture, s.teacher, log_z, w / (total + w), row.padded);
    total += w;
  }
  return row.args.uniform && total > 0 ? A(1) : total;
}

template <class A>
A kd_probs_otherwise(Row<A>& row) {
  const double t = row.args.temperature[0];
  const A total = mix_log_probabilities(row, t);
  if (total == 0) return 0;
  const Scale<A> scale = temperature_scale<A>(t, row.args.scale_by_t2);
  return scale.loss * diverge_from_mixture(row, total, scale.grad);
}

template <class A>
A kd_probs(Row<A>& row) {
  const Scratch<A>& s = row.s;
  const double t = row.args.temperature[0];
  const A total = mix_probabilities(row, t);
  if (total == 0) return 0;
  const A *p = s.mixture, *x = s.student_x, *e = s.student_exp;  // loaded in the loop, they would keep it scalar
  const A z = row.z_student, inv_z = 1 / z;
  A gap = 0;
#pragma omp simd reduction(+ : gap)
  for (int64_t c = 0; c < row.padded; ++c) gap += mixture_gap(p[c], x[c], e[c], z, inv_z);
  const Scale<A> scale = temperature_scale<A>(t, row.args.scale_by_t2);
  if (row.args.need_grad)
    add_difference(s.grad, A(row.args.kd_weight) * scale.grad * total / z, s.student_exp, z, p, row.padded);
  return scale.loss * mixture_divergence(gap, total);
}

template <class A>
A kd(Row<A>& row) {
  switch (row.args.combine) {
    case Combine::losses: return kd_losses(row);
    case Combine::probs: return row.args.divergence == Divergence::forward ? kd_probs(row) : kd_probs_otherwise(row);
    default: return kd_logits(row);
  }
}

// No value of the row's gradient is above it.
template <class A>
A gradient_bound(const Row<A>& row) {
  const Args& args = row.args;
  A bound = 0;
  for (int k = 0; k < args.teachers; ++k)
    bound += magnitude(row.weight(k)) * temperature_scale<A>(args.temperature[k], args.scale_by_t2).grad;
  if (args.combine == Combine::logits) bound = temperature_scale<A>(args.temperature[0], args.scale_by_t2).grad;
  if (args.divergence != Divergence::forward) bound = row.bound;
  const A kd = A(args.kd_weight) * bound, ce = A(args.ce_weight) * row.labels;
  return (magnitude(kd) + magnitude(ce)) * (args.softcap ? A(args.logit_scale[0]) : A(1));
}

template <class S, class A>
S* gradient_of(const Row<A>& row) {
  return static_cast<S*>(row.args.grad) + row.index * row.args.columns;
}

// A row without a loss: ignored, or with a label out of range. It has statistics all the same; its divergences are 0 or NaN.
template <class S, class A>
void keep_nothing(Row<A>& row, A nothing) {
  const Args& args = row.args;
  for (int i = 0; i < losses_of(args); ++i) static_cast<A*>(args.row_loss)[i * args.rows + row.index] = nothing;
  if (args.need_grad) store_no_gradient(nothing, row.n, gradient_of<S>(row), static_cast<A*>(args.saved) + row.index);
  if (!args.kl) return;
  keep_stats(row, 0, row.s.student, row.load(0, row.s.student));
  for (int k = 0; k < args.teachers; ++k) {
    load_teacher(row, k);
    row.keep_divergence(k, nothing);
  }
}

template <class A>
void store_losses(const Row<A>& row, A kd, A ce) {
  const Args& args = row.args;
  A* to = static_cast<A*>(args.row_loss) + row.index;
  *to = (args.ce_weight != 0 ? A(args.ce_weight) * ce : A(0)) + A(args.kd_weight) * kd;
  if (!args.terms) return;
  to[args.rows] = kd;
  to[2 * args.rows] = ce;
}

template <class S, class A>
void forward_row(Row<A>& row) {
  const Args& args = row.args;
  const Label kind = label_kind(args.target, row.index, args.ignore_index, row.n);
  if (kind == Label::ignored) return keep_nothing<S>(row, A(0));
  if (kind == Label::outside && args.labels) return keep_nothing<S>(row, A(__builtin_nanf("")));
  row.max_student = load_row(row_of<S>(args.student, row.index), row.n, row.padded, row.s.student);
  if (args.softcap) row.max_student = cap_row(row.s.student, row.padded, args.softcap[0], args.logit_scale[0]);
  if (row.index + 1 < args.rows) prefetch_row(args.student, row.index + 1, row.n);
  if (args.need_grad) prefetch_row(gradient_of<S>(row), row.n);
  if (args.kl) keep_stats(row, 0, row.s.student, row.max_student);
  student_at(row, args.temperature[0]);
  const A ce = args.cross_entropy ? label_loss(row, args.labels ? args.target[row.index] : 0) : A(0);
  if (args.need_grad && args.ce_weight == 0)
    for (int64_t c = 0; c < row.padded; ++c) row.s.grad[c] = 0;
  store_losses(row, kd(row), ce);
  if (args.need_grad && args.softcap)
    uncap_gradient(row.s.grad, row.s.student, row.padded, args.softcap[0], args.logit_scale[0]);
  if (args.need_grad)
    store_gradient(row.s.grad, row.n, A(args.row_factor), is_half<S> ? gradient_bound(row) : A(0), gradient_of<S>(row),
                   static_cast<A*>(args.saved) + row.index);
}

template <class S, class A>
void forward_typed(const Args& args, int64_t begin, int64_t end, void* memory) {
  const int64_t padded = padded_length(args.classes);
  A* p = aligned_scratch<A>(memory);
  const Scratch<A> scratch{p, p + padded, p + 2 * padded, p + 3 * padded, p + 4 * padded, p + 5 * padded, p + 6 * padded};
  for (int64_t r = begin; r < end; ++r) {
    Row<A> row{args, scratch, r, args.classes, padded};
    forward_row<S>(row);
  }
}

int64_t scratch_bytes(const Args& args) {
  constexpr int64_t kRows = sizeof(Scratch<double>) / sizeof(double*), kAlignment = 64;
  return kRows * padded_length(args.classes) * int64_t(sizeof(double)) + kAlignment;
}

void forward_rows(const Args& args, int64_t begin, int64_t end, void* scratch) {
  dispatch(args.student.type, [&]<class S, class A>() { forward_typed<S, A>(args, begin, end, scratch); });
}

void backward_rows(const BackwardArgs& args, int64_t begin, int64_t end) {
  const bool per_row = args.reduction == Reduction::none;
  dispatch(args.type,
           [&]<class S, class A>() { scale_stored<S, A>(args, begin, end, [=](int64_t row) { return per_row ? row : 0; }); });
}

}  // namespace
}  // namespace FASTKD_TARGET

const CpuKernels FASTKD_CPU_KERNELS = {scratch_bytes, forward_rows, backward_rows};

}  // namespace fastkd::multi_teacher
