// topk on the CPU: a row of the student at a time through scratch memory that stays in the cache; the k classes in double.
// Compiled once per instruction set; no headers of the standard library with inline functions (core/config.h says why).
#include "core/cpu/row_losses.h"
#include "topk/op.h"

namespace fastkd::topk {
inline namespace FASTKD_TARGET {
namespace {

constexpr double kNothing = -__builtin_inf();  // the logarithm of 0

// The classes of a row, each once.
struct Entries {
  int64_t* id;
  double *log_p, *p, *x;  // x: the student's logit over T
  int64_t count = 0;
  double log_tail = kNothing;
  bool outside = false;  // whether an id is no class

  int64_t find(int64_t wanted) const {
    int64_t at = -1;
#pragma omp simd reduction(max : at)
    for (int64_t j = 0; j < count; ++j) at = id[j] == wanted ? j : at;
    return at;
  }
};

double log_add(double a, double b) {
  const double top = a > b ? a : b, least = a > b ? b : a;
  return least == kNothing ? top : top + ::log1p(::exp(least - top));
}

double log_sum(const double* x, int64_t n, double start = kNothing) {
  double top = start;
  for (int64_t j = 0; j < n; ++j) top = x[j] > top ? x[j] : top;
  if (top == kNothing) top = 0;
  double sum = ::exp(start - top);
  for (int64_t j = 0; j < n; ++j) sum += ::exp(x[j] - top);
  return sum == 0 ? kNothing : top + ::log(sum);
}

// log p_t: given, or what the entries leave; nothing where they sum to more than 1, which is rounding.
double log_tail_of(const Args& args, int64_t row, const Entries& entries) {
  if (args.mode != Mode::tail || entries.count == 0) return kNothing;
  if (args.log_tail) return args.log_tail[row] <= kAbsent ? kNothing : args.log_tail[row];
  const double inside = log_sum(entries.log_p, entries.count);
  return inside < 0 ? ::log(-::expm1(inside)) : kNothing;
}

void collect(const Args& args, int64_t row, Entries& entries) {
  int64_t present = 0;
  entries.count = 0;
  entries.outside = false;
  for (int64_t j = row * args.k; j < (row + 1) * args.k; ++j) {
    const int64_t id = args.ids[j];
    const double log_p = args.log_probs ? args.log_probs[j] : 0;
    if (id < 0 || log_p <= kAbsent) continue;
    ++present;
    entries.outside |= id >= args.classes;
    const int64_t at = entries.find(id);
    if (at >= 0) {
      entries.log_p[at] = log_add(entries.log_p[at], log_p);
      continue;
    }
    entries.id[entries.count] = id;
    entries.log_p[entries.count++] = log_p;
  }
  entries.log_tail = log_tail_of(args, row, entries);
  double shift = args.log_probs || present == 0 ? 0 : ::log(double(present)), inv_t = 1;
  if (args.mode == Mode::teacher || args.mode == Mode::both) {
    inv_t = 1 / args.temperature;
    for (int64_t j = 0; j < entries.count; ++j) entries.log_p[j] *= inv_t;
    shift = log_sum(entries.log_p, entries.count);
  }
  for (int64_t j = 0; j < entries.count; ++j) {
    entries.log_p[j] -= shift;
    entries.p[j] = ::exp(entries.log_p[j]);
  }
}

// The sum of x = exp((x - top) / T), in place; in double every few registers.
template <class A>
double exponentials_in_place(A* x, A top, A inv_t, int64_t n) {
  constexpr int64_t kBlock = 2048;
  double total = 0;
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t end = begin + kBlock < n ? begin + kBlock : n;
    A sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t c = begin; c < end; ++c) {
      x[c] = exp_negative((x[c] - top) * inv_t);
      sum += x[c];
    }
    total += double(sum);
  }
  return total;
}

// The classes outside the entries: e [padded] = exp((logit - top) / T), 0 for the entries, and their sum.
struct Outside {
  double top, sum;  // top: the logit over T

  double log() const { return sum == 0 ? kNothing : top + ::log(sum); }
};

template <class S, class A>
Outside read_outside(const Args& args, const S* from, Entries& entries, A* e) {
  const int64_t padded = padded_length(args.classes);
  const A inv_t = A(1 / args.temperature);
  A top = load_row(from, args.classes, padded, e);
  for (bool again = false;; again = true) {
    for (int64_t j = 0; j < entries.count; ++j) {
      A& x = e[entries.id[j]];
      if (!again) entries.x[j] = double(x) / args.temperature;
      x = -kInf;
    }
    if (again) {
      top = -kInf;
#pragma omp simd reduction(max : top)
      for (int64_t c = 0; c < padded; ++c) top = e[c] > top ? e[c] : top;
    }
    if (top == -A(kInf)) top = 0;
    const double sum = exponentials_in_place(e, top, inv_t, padded);
    // Where they are so far below an entry that their exponentials have no digits, they have a maximum of their own.
    constexpr double kLeast = sizeof(A) == 4 ? 1e-30 : 1e-290;
    if (again || sum == 0 || !(sum < kLeast)) return {double(top) / args.temperature, sum};
    load_row(from, args.classes, padded, e);
  }
}

struct Divergence {
  double value, mass;     // mass: sum p, with p_t
  double log_z, p_tail;
};

double expected(Mode mode, const Entries& entries, double log_z) {
  double sum = 0;
  for (int64_t j = 0; j < entries.count; ++j) {
    const double log_p = mode == Mode::sampled ? 0 : entries.log_p[j];
    sum += entries.p[j] * (log_p - (entries.x[j] - log_z));
  }
  return sum;
}

Divergence diverge(Mode mode, const Entries& entries, double log_rest) {
  Divergence d{0, 0, log_sum(entries.x, entries.count, log_rest), 0};
  d.value = expected(mode, entries, d.log_z);
  for (int64_t j = 0; j < entries.count; ++j) d.mass += entries.p[j];
  if (entries.log_tail != kNothing && log_rest != kNothing) {
    d.p_tail = ::exp(entries.log_tail);
    d.value += d.p_tail * (entries.log_tail - (log_rest - d.log_z));
    d.mass += d.p_tail;
  }
  return d;
}

// The factor of a row's stored gradient; of float16 a power of two that its values leave room for, its inverse to `saved`.
template <class S, class A>
double stored_factor(const Args& args, int64_t row, double mass) {
  const double weight = args.weight[row] / args.temperature;
  if (!is_half<S>) return weight * args.row_factor;
  const A scale = A(half_scale(float(magnitude(weight) * mass)));
  static_cast<A*>(args.saved)[row] = 1 / scale;
  return weight * double(scale);
}

template <class S>
void store_entries(const Entries& entries, const Divergence& d, double factor, S* to) {
  using A = accumulate_t<S>;
  for (int64_t j = 0; j < entries.count; ++j)
    store_as(to[entries.id[j]], A(factor * (d.mass * ::exp(entries.x[j] - d.log_z) - entries.p[j])));
}

template <class S, class A>
double row_of_all(const Args& args, int64_t row, const S* from, Entries& entries, A* e, S* to) {
  const Outside rest = read_outside(args, from, entries, e);
  const Divergence d = diverge(args.mode, entries, rest.log());
  if (!args.need_grad) return d.value;
  const double factor = stored_factor<S, A>(args, row, d.mass);
  const double others = d.mass * ::exp(rest.top - d.log_z) - (d.p_tail == 0 ? 0 : d.p_tail / rest.sum);
  store_row(e, args.classes, A(factor * others), to);
  store_entries(entries, d, factor, to);
  return d.value;
}

// Mode::both: no other class is read.
template <class S, class A>
double row_of_entries(const Args& args, int64_t row, const S* from, Entries& entries, S* to) {
  for (int64_t j = 0; j < entries.count; ++j) entries.x[j] = double(load_as(from[entries.id[j]])) / args.temperature;
  const Divergence d = diverge(args.mode, entries, kNothing);
  if (!args.need_grad) return d.value;
  fill_row(to, args.classes, A(0));
  store_entries(entries, d, stored_factor<S, A>(args, row, d.mass), to);
  return d.value;
}

template <class S, class A>
void store_nothing(const Args& args, int64_t row, A value, S* to) {
  static_cast<A*>(args.row_loss)[row] = value;
  if (args.need_grad) store_no_gradient(value, args.classes, to, static_cast<A*>(args.saved) + row);
}

template <class S, class A>
void forward_typed(const Args& args, int64_t begin, int64_t end, void* memory) {
  A* e = aligned_scratch<A>(memory);
  double* numbers = reinterpret_cast<double*>(e + padded_length(args.classes));
  Entries entries{reinterpret_cast<int64_t*>(numbers), numbers + args.k, numbers + 2 * args.k, numbers + 3 * args.k};
  for (int64_t r = begin; r < end; ++r) {
    const S* from = row_of<S>(args.student, r);
    S* to = static_cast<S*>(args.grad) + (args.need_grad ? r * args.classes : 0);
    if (args.weight[r] == 0) {
      store_nothing(args, r, A(0), to);
      continue;
    }
    collect(args, r, entries);
    if (entries.outside) {
      store_nothing(args, r, A(__builtin_nanf("")), to);
      continue;
    }
    if (r + 1 < end && args.mode != Mode::both) prefetch_row(row_of<S>(args.student, r + 1), args.classes);
    const double value = args.mode == Mode::both ? row_of_entries<S, A>(args, r, from, entries, to)
                                                 : row_of_all<S, A>(args, r, from, entries, e, to);
    static_cast<A*>(args.row_loss)[r] = A(args.weight[r] * value);
  }
}

int64_t scratch_bytes(const Args& args) {
  constexpr int64_t kAlignment = 64;
  return (padded_length(args.classes) + 4 * args.k) * int64_t(sizeof(double)) + kAlignment;
}

void forward_rows(const Args& args, int64_t begin, int64_t end, void* scratch) {
  dispatch(args.student.type, [&]<class S, class A>() { forward_typed<S, A>(args, begin, end, scratch); });
}

}  // namespace
}  // namespace FASTKD_TARGET

const CpuKernels FASTKD_CPU_KERNELS = {scratch_bytes, forward_rows};

}  // namespace fastkd::topk
