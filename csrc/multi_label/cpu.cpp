// multi_label on the CPU: a row, or several short ones, at a time through scratch memory that stays in the L1 or L2 cache.
// Compiled once per instruction set; no headers of the standard library with inline functions here (core/config.h says why).
#include "core/cpu/row_losses.h"
#include "core/dispatch.h"
#include "multi_label/math.h"

namespace fastkd::multi_label {
inline namespace FASTKD_TARGET {
namespace {

constexpr int64_t kGroup = 1024;  // elements that rows are gathered to where nothing differs from row to row

template <class A>
struct Scratch {  // each [padded]
  A *student, *labels, *e, *c, *teacher, *mixture, *p, *rest, *kd, *ce, *grad, *pos_weight;
};
constexpr int64_t kArrays = sizeof(Scratch<double>) / sizeof(double*);

bool packed(const Network& network, int64_t classes) {
  return network.data == nullptr ||
         (network.rows.dims == 1 && (network.rows.stride[0] == classes || network.rows.size[0] == 1));
}

// Rows that are one piece of memory in every network go several at a time: one logit a row is then no row of its own.
int64_t rows_at_a_time(const Args& args) {
  bool alike = args.weight_stride_row == 0 && packed(args.student, args.classes) && packed(args.labels, args.classes);
  for (int k = 0; k < args.teachers; ++k) alike = alike && packed(args.teacher[k], args.classes);
  return alike && args.classes < kGroup ? kGroup / args.classes : 1;
}

// `count` rows from `first` on, `n` elements.
template <class A>
struct Rows {
  const Args& args;
  Scratch<A> s;
  int64_t first, count, n, padded;

  A weight(int k) const {
    if (args.host_weight) return A(args.host_weight[k]);
    return static_cast<const A*>(args.weight)[k * args.weight_stride_teacher + first * args.weight_stride_row];
  }
  void load(const Network& network, A* to) const {
    load_row(network, first, n, padded, to);
    if (first + count < args.rows) prefetch_row(network, first + count, args.classes);
  }
  bool has_labels() const { return args.labels.data || args.target; }
};

template <class A>
void fill(A* to, int64_t n, A value) {
  for (int64_t i = 0; i < n; ++i) to[i] = value;
}

template <class A>
void student_at(const Rows<A>& rows, A inv_t) {
  const A* student = rows.s.student;
  A *e = rows.s.e, *c = rows.s.c;
  const int64_t n = rows.padded;  // loaded in the loop, all these would keep it scalar
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    e[i] = odds_of(student[i], inv_t);
    c[i] = likelier(e[i]);
  }
}

// kd += value KL(p || q), grad += factor (q - p), of a teacher in scratch memory.
template <bool Grad, class A>
void teach(const Rows<A>& rows, const A* teacher, A inv_t, A value, A factor) {
  const Scratch<A>& s = rows.s;
  const A *student = s.student, *e = s.e, *c = s.c;
  A *kd = s.kd, *grad = s.grad;
  const int64_t n = rows.padded;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const A p_e = odds_of(teacher[i], inv_t);
    const auto element = element_of(student[i], e[i], c[i], teacher[i], p_e, likelier(p_e), inv_t);
    kd[i] += value * element.kl;
    if (Grad) grad[i] += factor * element.push;
  }
}

template <class A>
void teach(const Rows<A>& rows, const A* teacher, double temperature, A weight) {
  const Args& args = rows.args;
  const Scale<A> scale = temperature_scale<A>(temperature, args.scale_by_t2);
  const A factor = A(args.kd_weight * args.class_factor) * weight * scale.grad, inv_t = A(1 / temperature);
  if (args.need_grad)
    teach<true>(rows, teacher, inv_t, weight * scale.loss, factor);
  else
    teach<false>(rows, teacher, inv_t, weight * scale.loss, factor);
}

template <class A>
void kd_losses(const Rows<A>& rows) {
  double at = rows.args.temperature[0];  // where e and c stand
  for (int k = 0; k < rows.args.teachers; ++k) {
    const A w = rows.weight(k);
    if (w == 0) continue;
    const double t = rows.args.temperature[k];
    if (t != at) student_at(rows, A(1 / (at = t)));
    rows.load(rows.args.teacher[k], rows.s.teacher);
    teach(rows, rows.s.teacher, t, w);
  }
}

// The weighted sum of logits, of equal weights the running mean; infinite where one of them is.
template <class A>
void add_logits(A* mean, const A* t, A w, int number, bool uniform, int64_t n) {
  const A share = uniform ? A(1) / A(number) : w, old = uniform ? A(1) : A(0);
  if (number == 1) {
    const A one = uniform ? A(1) : w;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) mean[i] = one * t[i];
    return;
  }
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const A next = mean[i] + share * (t[i] - old * mean[i]);
    mean[i] = magnitude(mean[i]) == A(kInf) ? mean[i] + share * t[i] : next;
  }
}

template <class A>
void kd_logits(const Rows<A>& rows) {
  int number = 0;
  for (int k = 0; k < rows.args.teachers; ++k) {
    const A w = rows.weight(k);
    if (w == 0) continue;
    rows.load(rows.args.teacher[k], rows.s.teacher);
    add_logits(rows.s.mixture, rows.s.teacher, w, ++number, rows.args.uniform, rows.padded);
  }
  if (number > 0) teach(rows, rows.s.mixture, rows.args.temperature[0], A(1));
}

// Both probabilities of a teacher, to scratch: a product fused with the mixture's sum would not be the first one's.
template <class A>
void probabilities_of(const A* t, A inv_t, int64_t n, A* p, A* rest) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const A z = t[i], e = odds_of(z, inv_t), c = likelier(e);
    p[i] = probability(z, e, c);
    rest[i] = probability(-z, e, c);
  }
}

template <class A>
void add_share(A* mean, const A* x, A share, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) mean[i] += share * (x[i] - mean[i]);
}

// The logits of the mixture, whose probabilities are in p and rest: those of its first teacher where all are that one.
template <class A>
void mixture_logits(const Rows<A>& rows, A temperature, A inv_t) {
  const Scratch<A>& s = rows.s;
  const A *p = s.p, *rest = s.rest, *first_p = s.teacher, *first_rest = s.ce;
  A* mixture = s.mixture;
  probabilities_of(s.mixture, inv_t, rows.padded, s.teacher, s.ce);
  const int64_t n = rows.padded;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const A first = mixture[i], logit = logit_of(p[i], rest[i], temperature);
    const A moved = magnitude(p[i] - first_p[i]) + magnitude(rest[i] - first_rest[i]);
    mixture[i] = moved == 0 ? first : logit;
  }
}

template <class A>
void kd_probs(const Rows<A>& rows) {
  const Args& args = rows.args;
  const Scratch<A>& s = rows.s;
  const A inv_t = A(1 / args.temperature[0]);
  A total = 0;
  for (int k = 0; k < args.teachers; ++k) {
    const A w = args.uniform ? A(1) : rows.weight(k);
    if (w == 0) continue;
    rows.load(args.teacher[k], total == 0 ? s.mixture : s.teacher);
    if (total == 0) {
      probabilities_of(s.mixture, inv_t, rows.padded, s.p, s.rest);
    } else {
      const A share = w / (total + w);  // of equal weights 1/2, 1/3, ...
      probabilities_of(s.teacher, inv_t, rows.padded, s.ce, s.teacher);  // which it reads before
      add_share(s.p, s.ce, share, rows.padded);
      add_share(s.rest, s.teacher, share, rows.padded);
    }
    total += w;
  }
  if (total == 0) return;
  mixture_logits(rows, A(args.temperature[0]), inv_t);
  if (args.uniform) return teach(rows, s.mixture, args.temperature[0], A(1));
  teach(rows, s.mixture, args.temperature[0], total);
  const A mass = total * natural_log(total) * temperature_scale<A>(args.temperature[0], args.scale_by_t2).loss;
  for (int64_t i = 0; i < rows.padded; ++i) s.kd[i] += mass;
}

template <class A>
void cross_entropies(const Rows<A>& rows) {
  const Args& args = rows.args;
  const A *student = rows.s.student, *labels = rows.s.labels, *pos_weight = rows.s.pos_weight, *e = rows.s.e, *c = rows.s.c;
  A *ce = rows.s.ce, *grad = rows.s.grad;
  const A factor = A(args.ce_weight * args.class_factor);
  bool at_one = true;
  for (int k = 0; k < args.teachers || k == 0; ++k) at_one = at_one && args.temperature[k] == 1;
  if (!at_one) student_at(rows, A(1));
  const int64_t n = rows.padded;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const auto part = label_loss(student[i], e[i], c[i], labels[i], pos_weight[i]);
    ce[i] = part.ce;
    grad[i] += factor * part.push;
  }
}

// Without the elements that count nowhere; NaN where a label is.
template <class A>
void sift(const A* labels, int64_t n, A* values) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const A value = labels[i] == labels[i] ? values[i] : labels[i];
    values[i] = labels[i] < 0 ? A(0) : value;
  }
}

template <class A>
void load_labels(const Rows<A>& rows) {
  const Args& args = rows.args;
  A* labels = rows.s.labels;
  if (args.labels.data)
    rows.load(args.labels, labels);
  else
    fill(labels, rows.padded, A(0));
  for (int64_t r = 0; args.target && r < rows.count; ++r)
    if (args.target[rows.first + r] == args.ignore_index) fill(labels + r * args.classes, args.classes, A(-1));
}

// In blocks, so that no sum has more than a few dozen terms a SIMD lane.
template <class A>
A sum_of(const A* x, int64_t n) {
  constexpr int64_t kBlock = 256;
  A total = 0;
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t end = begin + kBlock < n ? begin + kBlock : n;
    A sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = begin; i < end; ++i) sum += x[i];
    total += sum;
  }
  return total;
}

template <class A>
void store_losses(const Rows<A>& rows) {
  const Args& args = rows.args;
  const A class_factor = A(args.class_factor);
  for (int64_t r = 0; r < rows.count; ++r) {
    const A kd = class_factor * sum_of(rows.s.kd + r * args.classes, args.classes);
    const A ce = args.cross_entropy ? class_factor * sum_of(rows.s.ce + r * args.classes, args.classes) : A(0);
    A* to = static_cast<A*>(args.row_loss) + rows.first + r;
    *to = (args.ce_weight != 0 ? A(args.ce_weight) * ce : A(0)) + A(args.kd_weight) * kd;
    if (!args.terms) continue;
    to[args.rows] = kd;
    to[2 * args.rows] = ce;
  }
}

// All rows at hand have one bound, and so one scale in float16.
template <class S, class A>
void store_gradients(const Rows<A>& rows) {
  const Args& args = rows.args;
  A factor = A(args.row_factor);
  if (is_half<S>) {
    A weights = 0;
    for (int k = 0; k < args.teachers; ++k)
      weights += magnitude(rows.weight(k)) * temperature_scale<A>(args.temperature[k], args.scale_by_t2).grad;
    if (args.combine == Combine::logits) weights = temperature_scale<A>(args.temperature[0], args.scale_by_t2).grad;
    const A largest = args.pos_weight ? static_cast<const A*>(args.pos_weight)[args.classes] : A(1);
    factor = A(half_scale(float(gradient_bound(args, weights, largest))));
    for (int64_t r = 0; r < rows.count; ++r) static_cast<A*>(args.saved)[rows.first + r] = 1 / factor;
  }
  store_row(rows.s.grad, rows.n, factor, static_cast<S*>(args.grad) + rows.first * args.classes);
}

template <class S, class A>
void forward_of(const Rows<A>& rows) {
  const Args& args = rows.args;
  const Scratch<A>& s = rows.s;
  rows.load(args.student, s.student);
  if (rows.has_labels()) load_labels(rows);
  fill(s.kd, rows.padded, A(0));
  fill(s.grad, rows.padded, A(0));
  student_at(rows, A(1 / args.temperature[0]));
  switch (args.combine) {
    case Combine::losses: kd_losses(rows); break;
    case Combine::probs: kd_probs(rows); break;
    default: kd_logits(rows);
  }
  if (args.cross_entropy) cross_entropies(rows);
  if (rows.has_labels()) {
    sift(s.labels, rows.padded, s.kd);
    if (args.cross_entropy) sift(s.labels, rows.padded, s.ce);
    if (args.need_grad) sift(s.labels, rows.padded, s.grad);
  }
  store_losses(rows);
  if (args.need_grad) store_gradients<S>(rows);
}

int64_t padded_of(const Args& args) { return padded_length(rows_at_a_time(args) * args.classes); }

template <class S, class A>
void forward_typed(const Args& args, int64_t begin, int64_t end, void* memory) {
  const int64_t most = rows_at_a_time(args), padded = padded_of(args);
  A* p = aligned_scratch<A>(memory);
  const auto at = [=](int64_t i) { return p + i * padded; };
  const Scratch<A> scratch{at(0), at(1), at(2), at(3), at(4), at(5), at(6), at(7), at(8), at(9), at(10), at(11)};
  const A* pos_weight = static_cast<const A*>(args.pos_weight);
  for (int64_t i = 0; i < padded; ++i) scratch.pos_weight[i] = pos_weight ? pos_weight[i % args.classes] : A(1);
  for (int64_t r = begin; r < end; r += most) {
    const int64_t count = end - r < most ? end - r : most, n = count * args.classes;
    forward_of<S>(Rows<A>{args, scratch, r, count, n, padded_length(n)});
  }
}

int64_t scratch_bytes(const Args& args) {
  constexpr int64_t kAlignment = 64;
  return kArrays * padded_of(args) * int64_t(sizeof(double)) + kAlignment;
}

void forward_rows(const Args& args, int64_t begin, int64_t end, void* scratch) {
  dispatch(args.student.type, [&]<class S, class A>() { forward_typed<S, A>(args, begin, end, scratch); });
}

}  // namespace
}  // namespace FASTKD_TARGET

const CpuKernels FASTKD_CPU_KERNELS = {scratch_bytes, forward_rows};

}  // namespace fastkd::multi_label
