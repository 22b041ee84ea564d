// mutual on the CPU: a row of all networks at a time, in scratch memory that stays in the L1 or L2 cache. Compiled once
// per instruction set; no headers of the standard library with inline functions here (core/config.h says why).
#include "core/cpu/row_losses.h"
#include "mutual/math.h"

namespace fastkd::mutual {
inline namespace FASTKD_TARGET {
namespace {

constexpr int kTogether = 4;  // networks that teach a learner in one loop over the classes

// One network's row. x = (logit - max) / T, e = exp(x), both [padded]; z = sum e.
template <class A>
struct Softmax {
  A *x, *e, z;
  bool read;  // whether the row is: by a learner, or for its own cross-entropy
};

template <class A>
struct Row {
  const Args& args;
  int64_t index, n, padded;
  Softmax<A>* networks;     // M + N
  A *logits, *soft, *grad;  // [padded], the soft target smoothed; [M, padded]
  A* weights;               // [M, M + N], 0 on the diagonal
  A inv_t;
  Scale<A> scale;
  int integer_t;
  A mass = 0;  // sum of `soft`

  int total() const { return args.learners + args.teachers; }
  A weight(int m, int n) const { return weights[m * total() + n]; }
};

// The weights of a row and which networks they read. A kd_weight of 0 reads none.
template <class A>
void load_weights(const Row<A>& row) {
  const Args& args = row.args;
  const int total = row.total();
  for (int n = 0; n < total; ++n) row.networks[n].read = n < args.learners && args.cross_entropy;
  for (int m = 0; m < args.learners; ++m)
    for (int n = 0; n < total; ++n) {
      const int frozen = n - args.learners;
      A w = 0;
      if (m != n && args.kd_weight != 0)
        w = frozen < 0 ? weight_of<A>(args.peers, m, n, row.index) : weight_of<A>(args.frozen, m, frozen, row.index);
      row.weights[m * total + n] = w;
      if (w == 0) continue;
      row.networks[m].read = row.networks[n].read = true;
    }
}

// The next row that will be read, on its way while this one is worked on.
template <class A>
void prefetch_next(const Row<A>& row, int network) {
  int64_t index = row.index;
  int next = network;
  do {
    if (++next == row.total()) {
      next = 0;
      ++index;
    }
  } while (next != network && !row.networks[next].read);
  if (index < row.args.rows) prefetch_row(row.args.networks[next], index, row.n);
}

// The soft target, smoothed, 0 past the end.
template <class A>
void load_soft(Row<A>& row) {
  const A smoothing = A(row.args.label_smoothing);
  load_row(*row.args.soft, row.index, row.n, row.padded, row.soft);
  A mass = 0;
#pragma omp simd reduction(+ : mass)
  for (int64_t c = 0; c < row.n; ++c) {
    row.soft[c] = smoothed(row.soft[c], smoothing, row.n);
    mass += row.soft[c];
  }
  for (int64_t c = row.n; c < row.padded; ++c) row.soft[c] = 0;
  row.mass = mass;
}

// The cross-entropy with the probabilities row.soft; the gradient of ce_weight times it to `grad`, which may be labelled.e.
template <class A>
A soft_label_loss(const Row<A>& row, const LabelledRow<A>& labelled, A* grad) {
  const A ce_weight = A(row.args.ce_weight), factor = ce_weight * row.mass / labelled.z, max = labelled.max;
  const A* e = labelled.e;
  A sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t c = 0; c < row.padded; ++c) {
    sum += soft_part(row.soft[c], row.logits[c] - max);
    grad[c] = factor * e[c] - ce_weight * row.soft[c];
  }
  return row.mass * natural_log(labelled.z) - sum;
}

// A learner's cross-entropy; the gradient of ce_weight times it to `grad`.
template <class A>
A label_loss(const Row<A>& row, const Softmax<A>& learner, A max, A* grad) {
  const Args& args = row.args;
  const LabelledRow<A> labelled =
      row.integer_t == 1 ? LabelledRow<A>{row.logits, learner.e, max, learner.z, row.n, row.padded}
                         : at_one(row.logits, max, learner.e, row.integer_t, row.n, row.padded, row.logits + row.padded, grad);
  if (args.soft) return soft_label_loss(row, labelled, grad);
  return hard_label_loss(labelled, args.target[row.index], A(args.label_smoothing), A(args.ce_weight), grad);
}

// Networks first .. first + K - 1 teach a learner: their sums a (math.h) to `sums`; where `Grad`, their pulls are added.
template <int K, bool Grad, class A>
void teach(const Softmax<A>& learner, const Softmax<A>* const* by, const Pull<A>* pulls, int64_t n, A* grad, A* sums) {
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
void teach(int k, const Softmax<A>& learner, const Softmax<A>* const* by, const Pull<A>* pulls, int64_t n, A* grad, A* sums) {
  switch (k) {
    case 1: return teach<1, Grad>(learner, by, pulls, n, grad, sums);
    case 2: return teach<2, Grad>(learner, by, pulls, n, grad, sums);
    case 3: return teach<3, Grad>(learner, by, pulls, n, grad, sums);
    default: return teach<4, Grad>(learner, by, pulls, n, grad, sums);
  }
}

// What learner m learns from those that it reads: the sum of its weighted divergences.
template <bool Grad, class A>
A learn(const Row<A>& row, int m, A* grad) {
  const Scale<A>& scale = row.scale;
  const Softmax<A>& learner = row.networks[m];
  const int networks = row.total();
  const A factor = A(row.args.kd_weight) * scale.grad;
  A loss = 0;
  for (int next = 0; next < networks;) {
    const Softmax<A>* by[kTogether];
    Pull<A> pulls[kTogether];
    A weights[kTogether], sums[kTogether];
    int k = 0;
    for (; next < networks && k < kTogether; ++next) {
      weights[k] = row.weight(m, next);
      if (weights[k] == 0) continue;
      by[k] = &row.networks[next];
      pulls[k] = pull(weights[k], factor, learner.z, by[k]->z);
      ++k;
    }
    if (k == 0) break;
    teach<Grad>(k, learner, by, pulls, row.padded, grad, sums);
    for (int i = 0; i < k; ++i) {
      const A near = divergence(sums[i], by[i]->z, learner.z);
      const A kl = exact_divergence(near, by[i]->x, by[i]->e, by[i]->z, learner.x, learner.e, learner.z, row.padded);
      loss += weights[i] * scale.loss * kl;
    }
  }
  return loss;
}

// No value of the learner's gradient is above it.
template <class A>
A gradient_bound(const Row<A>& row, int m) {
  A bound = 0;
  for (int n = 0; n < row.total(); ++n) bound += magnitude(row.weight(m, n));
  bound *= row.scale.grad * magnitude(A(row.args.kd_weight));
  return bound + magnitude(A(row.args.ce_weight)) * (row.mass > 1 ? row.mass : A(1));
}

// Where the row's gradient of learner m goes, and the inverse of its scale.
template <class S, class A>
struct Slot {
  S* grad;
  A* inverse;

  Slot(const Args& args, int m, int64_t row) {
    const int64_t at = args.slot[m] * args.rows + row;
    grad = static_cast<S*>(args.grad) + at * args.classes;
    inverse = static_cast<A*>(args.saved) + at;
  }
};

// The loss of learner m from its divergences and its cross-entropy.
template <class A>
void store_loss(const Args& args, int m, int64_t row, A kd, A ce) {
  const int64_t at = m * args.rows + row;
  static_cast<A*>(args.row_loss)[at] = weigh(A(args.kd_weight), kd, A(args.ce_weight), ce);
  if (!args.row_terms) return;
  A* terms = static_cast<A*>(args.row_terms);
  terms[at] = kd;
  terms[args.learners * args.rows + at] = ce;
}

// A row that counts nowhere, or whose target is out of range.
template <class S, class A>
void leave_out(const Args& args, int64_t index, A nothing) {
  for (int m = 0; m < args.learners; ++m) {
    static_cast<A*>(args.row_loss)[m * args.rows + index] = nothing;
    for (int i = 0; args.row_terms && i < 2; ++i)
      static_cast<A*>(args.row_terms)[(i * args.learners + m) * args.rows + index] = nothing;
    if (args.slot[m] < 0) continue;
    const Slot<S, A> to(args, m, index);
    store_no_gradient(nothing, args.classes, to.grad, to.inverse);
  }
}

// Loads network n and what every pair needs of it; a learner's cross-entropy, whose gradient goes to `grad`.
template <class S, class A>
A read_network(const Row<A>& row, int n, A* grad) {
  const Args& args = row.args;
  Softmax<A>& network = row.networks[n];
  prefetch_next(row, n);
  const bool like_learners = args.networks[n].type == args.type;
  const A max = like_learners ? load_row(row_of<S>(args.networks[n], row.index), row.n, row.padded, row.logits)
                              : load_row(args.networks[n], row.index, row.n, row.padded, row.logits);
  network.z = exponentials(row.logits, max, row.inv_t, row.padded, network.x, network.e);
  if (n >= args.learners || !args.cross_entropy) return 0;
  return label_loss(row, network, max, grad);
}

template <class S, class A>
void forward_row(Row<A>& row, A* entropies) {
  const Args& args = row.args;
  const Label kind = label_kind(args.target, row.index, args.ignore_index, row.n);
  if (kind == Label::ignored) return leave_out<S>(args, row.index, A(0));
  if (kind == Label::outside) return leave_out<S>(args, row.index, A(__builtin_nanf("")));
  if (args.soft && args.cross_entropy) load_soft(row);
  for (int n = 0; n < row.total(); ++n) {
    const A entropy = row.networks[n].read ? read_network<S>(row, n, row.grad + n * row.padded) : A(0);
    if (n < args.learners) entropies[n] = entropy;
  }
  for (int m = 0; m < args.learners; ++m) {
    A* grad = row.grad + m * row.padded;
    const bool learns = args.slot[m] >= 0;
    if (learns && args.ce_weight == 0)
      for (int64_t c = 0; c < row.padded; ++c) grad[c] = 0;
    const A kd = learns ? learn<true>(row, m, grad) : learn<false>(row, m, grad);
    store_loss(args, m, row.index, kd, entropies[m]);
    if (!learns) continue;
    const Slot<S, A> to(args, m, row.index);
    store_gradient(grad, row.n, A(args.row_factor), is_half<S> ? gradient_bound(row, m) : A(0), to.grad, to.inverse);
  }
}

// Numbers of scratch: x and e of each network, a gradient of each learner, logits and x of the one being loaded, the soft
// target; a learner's weights and cross-entropy.
int64_t scratch_numbers(const Args& args) {
  const int64_t networks = args.learners + args.teachers;
  return (2 * networks + args.learners + 3) * padded_length(args.classes) + args.learners * (networks + 1);
}

int64_t scratch_bytes(const Args& args) {
  constexpr int64_t kAlignment = 64;
  return scratch_numbers(args) * int64_t(sizeof(double)) + (args.learners + args.teachers) * int64_t(sizeof(Softmax<double>)) +
         2 * kAlignment;
}

template <class S, class A>
void forward_typed(const Args& args, int64_t begin, int64_t end, void* memory) {
  const int64_t padded = padded_length(args.classes);
  const int networks = args.learners + args.teachers;
  A* p = aligned_scratch<A>(memory);
  auto* const table = reinterpret_cast<Softmax<A>*>(p + (scratch_numbers(args) + 1) / 2 * 2);
  A* const logits = p + 2 * networks * padded;
  A* const weights = logits + (3 + args.learners) * padded;
  for (int n = 0; n < networks; ++n, p += 2 * padded) table[n] = {p, p + padded, A(0), false};
  Row<A> row{args,
             begin,
             args.classes,
             padded,
             table,
             logits,
             logits + 2 * padded,
             logits + 3 * padded,
             weights,
             A(1 / args.temperature),
             temperature_scale<A>(args.temperature, args.scale_by_t2),
             integer_temperature(args.temperature)};
  const bool each_row = args.peers.stride_row != 0 || args.frozen.stride_row != 0;
  for (; row.index < end; ++row.index) {
    if (each_row || row.index == begin) load_weights(row);
    forward_row<S>(row, weights + args.learners * networks);
  }
}

void forward_rows(const Args& args, int64_t begin, int64_t end, void* scratch) {
  dispatch(args.type, [&]<class S, class A>() { forward_typed<S, A>(args, begin, end, scratch); });
}

void backward_rows(const BackwardArgs& args, int64_t begin, int64_t end) {
  const bool per_row = args.reduction == Reduction::none;
  dispatch(args.type, [&]<class S, class A>() {
    scale_stored<S, A>(args, begin, end, [&](int64_t i) {
      const int64_t learner = args.learner[i / args.rows];
      return per_row ? learner * args.rows + i % args.rows : learner;
    });
  });
}

}  // namespace
}  // namespace FASTKD_TARGET

const CpuKernels FASTKD_CPU_KERNELS = {scratch_bytes, forward_rows, backward_rows};

}  // namespace fastkd::mutual
