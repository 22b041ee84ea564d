// mutual on the CPU: a row of all networks at a time, in scratch memory that stays in the L1 or L2 cache. Compiled once
// per instruction set; no headers of the standard library with inline functions here (core/config.h says why).
#include "core/dispatch.h"
#include "core/softmax_rows.h"
#include "mutual/math.h"

namespace fastkd::mutual {
inline namespace FASTKD_TARGET {
namespace {

constexpr int kTogether = 4;  // networks that teach a learner in one loop over the classes

// One network's row. x = (logit - max) / T, e = exp(x), both [padded]; z = sum e.
template <class A>
struct Network {
  A *x, *e, z;
};

template <class A>
struct Row {
  const Args& args;
  int64_t index, n, padded;
  Network<A>* networks;  // M + N
  A *logits, *grad;      // [padded]

  A weight(int m, int n) const {
    const int frozen = n - args.learners;
    return frozen < 0 ? weight_of<A>(args.peers, m, n, index) : weight_of<A>(args.frozen, m, frozen, index);
  }
};

template <class T>
const T* logits_row(const Args& args, int network, int64_t row) {
  return static_cast<const T*>(args.logits[network]) + row * args.stride[network];
}

// The next row that will be read, on its way while this one is worked on.
template <class S, class T>
void prefetch_next(const Args& args, int network, int64_t row) {
  if (++network == args.learners + args.teachers) {
    network = 0;
    if (++row >= args.rows) return;
  }
  if (network < args.learners)
    prefetch_row(logits_row<S>(args, network, row), args.classes);
  else
    prefetch_row(logits_row<T>(args, network, row), args.classes);
}

// A learner's cross-entropy at weight 1; e stands at T. Its gradient is written to `grad` where there is one.
template <class A>
A hard_label(const Row<A>& row, const Network<A>& learner, A max, int64_t label, A* grad) {
  const Args& args = row.args;
  const int t = integer_temperature(args.temperature);
  const A* e = t == 1 ? learner.e : grad;
  A z = learner.z, sum = 0;
  if (t > 1)
    z = powers(learner.e, row.padded, t, grad);
  else if (t == 0)
    z = exponentials(row.logits, max, A(1), row.padded, row.logits + row.padded, grad);
  const A smoothing = A(args.label_smoothing), ce_weight = A(args.ce_weight);
  if (smoothing > 0) {
#pragma omp simd reduction(+ : sum)
    for (int64_t c = 0; c < row.n; ++c) sum += row.logits[c] - max;
  }
  const A factor = ce_weight / z, uniform = ce_weight * smoothing / A(row.n);
#pragma omp simd
  for (int64_t c = 0; c < row.padded; ++c) grad[c] = factor * e[c] - uniform;
  grad[label] -= ce_weight * (1 - smoothing);
  return ce_weight * cross_entropy(z, row.logits[label] - max, sum, smoothing, row.n);
}

// Networks first .. first + K - 1 teach a learner: their sums a (math.h) to `sums`; where `Grad`, their pulls are added.
template <int K, bool Grad, class A>
void teach(const Network<A>& learner, const Network<A>* const* by, const Pull<A>* pulls, int64_t n, A* grad, A* sums) {
  const A *x_m = learner.x, *e_m = learner.e;
  const A* x[kTogether] = {by[0]->x, by[K > 1 ? 1 : 0]->x, by[K > 2 ? 2 : 0]->x, by[K > 3 ? 3 : 0]->x};
  const A* e[kTogether] = {by[0]->e, by[K > 1 ? 1 : 0]->e, by[K > 2 ? 2 : 0]->e, by[K > 3 ? 3 : 0]->e};
  const Pull<A> p0 = pulls[0], p1 = pulls[K > 1 ? 1 : 0], p2 = pulls[K > 2 ? 2 : 0], p3 = pulls[K > 3 ? 3 : 0];
  const A *x0 = x[0], *x1 = x[1], *x2 = x[2], *x3 = x[3], *e0 = e[0], *e1 = e[1], *e2 = e[2], *e3 = e[3];
  A a0 = 0, a1 = 0, a2 = 0, a3 = 0;
  // Written out: GCC turns neither arrays of sums nor an inner loop over K into registers.
#pragma omp simd reduction(+ : a0, a1, a2, a3)
  for (int64_t c = 0; c < n; ++c) {
    const A x_c = x_m[c], e_c = e_m[c];
    A g = Grad ? grad[c] : A(0);
    a0 += weighted_gap(e0[c], x0[c], x_c);
    if (Grad) g += p0.factor * (e_c - p0.ratio * e0[c]);
    if (K > 1) {
      a1 += weighted_gap(e1[c], x1[c], x_c);
      if (Grad) g += p1.factor * (e_c - p1.ratio * e1[c]);
    }
    if (K > 2) {
      a2 += weighted_gap(e2[c], x2[c], x_c);
      if (Grad) g += p2.factor * (e_c - p2.ratio * e2[c]);
    }
    if (K > 3) {
      a3 += weighted_gap(e3[c], x3[c], x_c);
      if (Grad) g += p3.factor * (e_c - p3.ratio * e3[c]);
    }
    if (Grad) grad[c] = g;
  }
  sums[0] = a0;
  sums[1] = a1;
  sums[2] = a2;
  sums[3] = a3;
}

template <bool Grad, class A>
void teach(int k, const Network<A>& learner, const Network<A>* const* by, const Pull<A>* pulls, int64_t n, A* grad, A* sums) {
  switch (k) {
    case 1: return teach<1, Grad>(learner, by, pulls, n, grad, sums);
    case 2: return teach<2, Grad>(learner, by, pulls, n, grad, sums);
    case 3: return teach<3, Grad>(learner, by, pulls, n, grad, sums);
    default: return teach<4, Grad>(learner, by, pulls, n, grad, sums);
  }
}

// What learner m learns from all others; returns the sum of its weighted divergences.
template <bool Grad, class A>
A learn(const Row<A>& row, int m, A* grad) {
  const Scale<A> scale = temperature_scale<A>(row.args.temperature, row.args.scale_by_t2);
  const Network<A>& learner = row.networks[m];
  const int networks = row.args.learners + row.args.teachers;
  A loss = 0;
  for (int next = 0; next < networks;) {
    const Network<A>* by[kTogether];
    Pull<A> pulls[kTogether];
    A weights[kTogether], sums[kTogether];
    int k = 0;
    for (; next < networks && k < kTogether; ++next) {
      if (next == m) continue;
      by[k] = &row.networks[next];
      weights[k] = row.weight(m, next);
      pulls[k] = pull(weights[k], scale.grad, learner.z, by[k]->z);
      ++k;
    }
    if (k == 0) break;
    teach<Grad>(k, learner, by, pulls, row.padded, grad, sums);
    for (int i = 0; i < k; ++i) loss += weighted(weights[i], scale.loss, divergence(sums[i], by[i]->z, learner.z));
  }
  return loss;
}

// The gradient of a learner's row as it is stored, and for float16 the inverse of its scale (half_scale).
template <class S, class A>
void store_gradient(const Row<A>& row, int m, const A* grad) {
  const Args& args = row.args;
  const int64_t at = args.slot[m] * args.rows + row.index;
  A scale = A(args.row_factor);
  if (args.type == DType::f16) {
    A bound = 0;
    for (int n = 0; n < args.learners + args.teachers; ++n)
      if (n != m) bound += magnitude(row.weight(m, n));
    bound *= temperature_scale<A>(args.temperature, args.scale_by_t2).grad;
    scale = A(half_scale(float(bound + magnitude(A(args.ce_weight)))));
    static_cast<A*>(args.saved)[at] = 1 / scale;
  }
  store_row(grad, row.n, scale, static_cast<S*>(args.grad) + at * row.n);
}

// A row that counts nowhere, or whose target is out of range.
template <class S, class A>
void leave_out(const Args& args, int64_t index, A nothing) {
  for (int m = 0; m < args.learners; ++m) {
    static_cast<A*>(args.row_loss)[m * args.rows + index] = nothing;
    if (args.slot[m] < 0) continue;
    const int64_t at = args.slot[m] * args.rows + index;
    fill_row(static_cast<S*>(args.grad) + at * args.classes, args.classes, nothing);
    if (args.type == DType::f16) static_cast<A*>(args.saved)[at] = 1;
  }
}

template <class S, class T, class A>
void forward_row(Row<A>& row) {
  const Args& args = row.args;
  const Label kind = label_kind(args.target, row.index, args.ignore_index, row.n);
  if (kind == Label::ignored) return leave_out<S>(args, row.index, A(0));
  if (kind == Label::outside) return leave_out<S>(args, row.index, A(__builtin_nanf("")));
  const A inv_t = A(1 / args.temperature);
  const bool hard = args.ce_weight != 0;
  A* losses = static_cast<A*>(args.row_loss) + row.index;
  for (int n = 0; n < args.learners + args.teachers; ++n) {
    Network<A>& network = row.networks[n];
    const bool learns = n < args.learners;
    prefetch_next<S, T>(args, n, row.index);
    const A max = learns ? load_row(logits_row<S>(args, n, row.index), row.n, row.padded, row.logits)
                         : load_row(logits_row<T>(args, n, row.index), row.n, row.padded, row.logits);
    network.z = exponentials(row.logits, max, inv_t, row.padded, network.x, network.e);
    if (!learns) continue;
    losses[n * args.rows] =
        hard ? hard_label(row, network, max, args.target[row.index], row.grad + n * row.padded) : A(0);
  }
  for (int m = 0; m < args.learners; ++m) {
    A* grad = row.grad + m * row.padded;
    if (args.slot[m] < 0) {
      losses[m * args.rows] += learn<false>(row, m, grad);
      continue;
    }
    if (!hard)
      for (int64_t c = 0; c < row.padded; ++c) grad[c] = 0;
    losses[m * args.rows] += learn<true>(row, m, grad);
    store_gradient<S>(row, m, grad);
  }
}

// Rows of scratch: x and e of each network, a gradient of each learner, logits and x of the one being loaded.
int64_t scratch_rows(const Args& args) { return 2 * (args.learners + args.teachers) + args.learners + 2; }

int64_t scratch_bytes(const Args& args) {
  constexpr int64_t kAlignment = 64;
  return scratch_rows(args) * padded_length(args.classes) * int64_t(sizeof(double)) +
         (args.learners + args.teachers) * int64_t(sizeof(Network<double>)) + kAlignment;
}

template <class S, class T, class A>
void forward_typed(const Args& args, int64_t begin, int64_t end, void* memory) {
  const int64_t padded = padded_length(args.classes);
  const int networks = args.learners + args.teachers;
  A* p = aligned_scratch<A>(memory);
  A* const grad = p + 2 * networks * padded;
  A* const logits = grad + args.learners * padded;
  auto* const table = reinterpret_cast<Network<A>*>(logits + 2 * padded);
  for (int n = 0; n < networks; ++n, p += 2 * padded) table[n] = {p, p + padded, A(0)};
  for (int64_t r = begin; r < end; ++r) {
    Row<A> row{args, r, args.classes, padded, table, logits, grad};
    forward_row<S, T>(row);
  }
}

template <class S, class A>
void backward_typed(const BackwardArgs& args, int64_t begin, int64_t end) {
  const A* grad_loss = static_cast<const A*>(args.grad_loss);
  const A* saved = static_cast<const A*>(args.saved);
  const A missing = static_cast<const A*>(args.aux)[0];
  for (int64_t i = begin; i < end; ++i) {
    const int64_t learner = args.learner[i / args.rows], row = i % args.rows;
    const A upstream = grad_loss[args.reduction == Reduction::none ? learner * args.rows + row : learner];
    const A factor = upstream * missing * (saved ? saved[i] : A(1));
    const S* from = static_cast<const S*>(args.stored) + i * args.classes;
    S* to = static_cast<S*>(args.grad) + i * args.classes;
#pragma omp simd
    for (int64_t c = 0; c < args.classes; ++c) store_as(to[c], A(load_as(from[c])) * factor);
  }
}

void forward_rows(const Args& args, int64_t begin, int64_t end, void* scratch) {
  dispatch_pair(args.type, args.teacher_type,
                [&]<class S, class T, class A>() { forward_typed<S, T, A>(args, begin, end, scratch); });
}

void backward_rows(const BackwardArgs& args, int64_t begin, int64_t end) {
  dispatch(args.type, [&]<class S, class A>() { backward_typed<S, A>(args, begin, end); });
}

}  // namespace
}  // namespace FASTKD_TARGET

const CpuKernels FASTKD_CPU_KERNELS = {scratch_bytes, forward_rows, backward_rows};

}  // namespace fastkd::mutual
