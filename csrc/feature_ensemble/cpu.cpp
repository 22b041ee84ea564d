// feature_ensemble on the CPU: a sample at a time, which stays in the L2 cache between its passes. Compiled once per
// instruction set; no headers of the standard library with inline functions here (core/config.h says why).
#include "core/rows.h"
#include "feature_ensemble/math.h"

namespace fastkd::feature_ensemble {
inline namespace FASTKD_TARGET {
namespace {

constexpr int64_t kPiece = 1024;  // elements in one vectorised loop: sums of pieces are added in double
constexpr int64_t kStrip = 256;   // columns that are summed side by side
constexpr int64_t kBlock = 32;    // rows of a strip between two such additions

template <class A>
struct Scratch {
  A *a, *b, *term, *sum;  // each [kPiece]
  A *columns[8];          // each [kStrip]
  A* teacher;             // samples of teachers in the other layout, each [elements]
};

template <class A>
struct Sums {
  A first, second;
};

FASTKD_HD int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// A row in the accumulation type, with zeros up to `padded`, which no sum notices.
template <class T, class A>
const A* load_padded(const T* from, int64_t n, int64_t padded, A* to) {
  for (int64_t c = padded - kLane; c < padded; ++c) to[c] = 0;
  for_blocks(n, [&](int64_t first, int64_t count) {
#pragma omp simd
    for (int64_t c = 0; c < count; ++c) to[first + c] = A(load_as(from[first + c]));
  });
  return to;
}

// The same, without a copy where the row can be read as it is.
template <class T, class A>
const A* as_row(const T* from, int64_t n, int64_t padded, A* to) {
  if constexpr (sizeof(T) == sizeof(A))
    if (n == padded) return from;
  return load_padded(from, n, padded, to);
}

template <class S, class T, class A>
Sums<A> squares(const S* a, const T* b, int64_t n, A scale_a, A scale_b) {
  A sum_a = 0, sum_b = 0;
#pragma omp simd reduction(+ : sum_a, sum_b)
  for (int64_t c = 0; c < n; ++c) {
    const A x = A(load_as(a[c])) * scale_a, y = A(load_as(b[c])) * scale_b;
    sum_a += x * x;
    sum_b += y * y;
  }
  return {sum_a, sum_b};
}

template <class T, class A>
A largest(const T* a, int64_t n, A) {
  A top = 0;
#pragma omp simd reduction(max : top)
  for (int64_t c = 0; c < n; ++c) {
    const A x = magnitude(A(load_as(a[c])));
    top = x > top ? x : top;
  }
  return top;
}

// Sums of |u|^p and of its slope times a'.
template <int P, class S, class T, class A>
Sums<A> differences(const S* a, const T* b, int64_t n, const Factors<A> f) {
  A distance = 0, inner = 0;
#pragma omp simd reduction(+ : distance, inner)
  for (int64_t c = 0; c < n; ++c) {
    const A x = A(load_as(a[c])), u = f.difference(x, A(load_as(b[c])));
    distance += power<P>(u);
    inner += slope_times<P>(u, x * f.scale_a);
  }
  return {distance, inner};
}

// Adds up `piece(first, n)` over [0, n) in double.
template <class A, class F>
Sums<A> in_pieces(int64_t n, const F& piece) {
  double first = 0, second = 0;
  for (int64_t c = 0; c < n; c += kPiece) {
    const Sums<A> s = piece(c, least(kPiece, n - c));
    first += double(s.first);
    second += double(s.second);
  }
  return {A(first), A(second)};
}

// One group that lies in one piece of memory: its distance; its state is saved.
template <int P, class S, class T, class A>
A group_distance(const Args& args, const S* a, const T* b, int64_t n, int64_t group) {
  A scale_a = 1, scale_b = 1;
  const auto both = [&](int64_t c, int64_t m) { return squares<S, T, A>(a + c, b + c, m, scale_a, scale_b); };
  Sums<A> s = in_pieces<A>(n, both);
  if (!is_safe(s.first) || !is_safe(s.second)) {
    scale_a = scale_of(largest(a, n, A()));
    scale_b = scale_of(largest(b, n, A()));
    s = in_pieces<A>(n, both);
  }
  const Factors<A> f = make_factors(scale_a, s.first, scale_b, s.second);
  const Sums<A> d = in_pieces<A>(n, [&](int64_t c, int64_t m) { return differences<P>(a + c, b + c, m, f); });
  save_state(static_cast<A*>(args.state), args.total_groups, group, f, s.first, inner_of(P, f.inverse, d.second));
  return distance_of(P, f.inverse, d.first);
}

// The rows of a sample (or all of it as one row): the sum of their distances.
template <int P, class S, class T, class A>
A rows_distance(const Args& args, const Pair& pair, const S* a, const T* b, int64_t group, const Scratch<A>& s) {
  if (pair.group == Group::all) return group_distance<P, S, T, A>(args, a, b, pair.elements(), group);
  const int64_t n = pair.inner, padded = padded_length(n);
  double total = 0;
  for (int64_t r = 0; r < pair.outer; ++r, a += n, b += n) {
    if (padded <= kPiece) {
      const A *row_a = as_row(a, n, padded, s.a), *row_b = as_row(b, n, padded, s.b);
      total += double(group_distance<P, A, A, A>(args, row_a, row_b, padded, group + r));
    } else {
      total += double(group_distance<P, S, T, A>(args, a, b, n, group + r));
    }
  }
  return A(total);
}

// Calls row(a, b) for every row of a strip, then flush() after every kBlock of them.
template <class S, class T, class A, class Row, class Flush>
void for_strip(const Pair& pair, const S* a, const T* b, int64_t n, const Scratch<A>& s, const Row& row,
               const Flush& flush) {
  const int64_t padded = padded_length(n);
  for (int64_t r = 0; r < pair.outer; ++r) {
    row(as_row(a + r * pair.inner, n, padded, s.a), as_row(b + r * pair.inner, n, padded, s.b));
    if ((r + 1) % kBlock == 0) flush();
  }
  flush();
}

template <class A>
void fill(A* to, int64_t n, A value) {
  for (int64_t c = 0; c < n; ++c) to[c] = value;
}

template <class... A>
void clear(int64_t n, A*... rows) {
  (fill(rows, n, A(0)), ...);
}

// to += part, part = 0: sums in two levels, which round less than one long one.
template <class A>
void add_part(A* to, A* part, int64_t n) {
#pragma omp simd
  for (int64_t c = 0; c < n; ++c) {
    to[c] += part[c];
    part[c] = 0;
  }
}

template <class A>
struct Strip {
  A *scale_a, *scale_b, *squares_a, *squares_b, *part_a, *part_b, *inverse, *ratio;  // each [kStrip]
};

template <class S, class T, class A>
void column_squares(const Pair& pair, const S* a, const T* b, int64_t n, const Strip<A>& w, const Scratch<A>& s) {
  const int64_t padded = padded_length(n);
  clear(padded, w.squares_a, w.squares_b, w.part_a, w.part_b);
  for_strip(
      pair, a, b, n, s,
      [&](const A* x, const A* y) {
#pragma omp simd
        for (int64_t c = 0; c < padded; ++c) {
          const A xs = x[c] * w.scale_a[c], ys = y[c] * w.scale_b[c];
          w.part_a[c] += xs * xs;
          w.part_b[c] += ys * ys;
        }
      },
      [&] {
        add_part(w.squares_a, w.part_a, padded);
        add_part(w.squares_b, w.part_b, padded);
      });
}

// Columns whose sums lost something get their scales, the others 1.
template <class S, class T, class A>
bool column_scales(const Pair& pair, const S* a, const T* b, int64_t n, const Strip<A>& w, const Scratch<A>& s) {
  bool safe = true;
  for (int64_t c = 0; c < n; ++c) safe &= is_safe(w.squares_a[c]) && is_safe(w.squares_b[c]);
  if (safe) return false;
  const int64_t padded = padded_length(n);
  clear(padded, w.part_a, w.part_b);
  for_strip(
      pair, a, b, n, s,
      [&](const A* x, const A* y) {
        for (int64_t c = 0; c < n; ++c) {
          w.part_a[c] = magnitude(x[c]) > w.part_a[c] ? magnitude(x[c]) : w.part_a[c];
          w.part_b[c] = magnitude(y[c]) > w.part_b[c] ? magnitude(y[c]) : w.part_b[c];
        }
      },
      [] {});
  for (int64_t c = 0; c < n; ++c) {
    if (is_safe(w.squares_a[c]) && is_safe(w.squares_b[c])) continue;
    w.scale_a[c] = scale_of(w.part_a[c]);
    w.scale_b[c] = scale_of(w.part_b[c]);
  }
  return true;
}

// One strip of columns, each a group: the sum of their distances.
template <int P, class S, class T, class A>
double strip_distance(const Args& args, const Pair& pair, const S* a, const T* b, int64_t n, int64_t group,
                      const Scratch<A>& s) {
  A* const* m = s.columns;
  const Strip<A> w{m[0], m[1], m[2], m[3], m[4], m[5], m[6], m[7]};
  const int64_t padded = padded_length(n);
  fill(w.scale_a, padded, A(1));
  fill(w.scale_b, padded, A(1));
  column_squares(pair, a, b, n, w, s);
  if (column_scales(pair, a, b, n, w, s)) column_squares(pair, a, b, n, w, s);
  for (int64_t c = 0; c < padded; ++c) {
    const Factors<A> f = make_factors(w.scale_a[c], w.squares_a[c], w.scale_b[c], w.squares_b[c]);
    w.inverse[c] = f.inverse;
    w.ratio[c] = f.ratio;
  }
  A *distance = s.term, *inner = s.sum, *squares_a = w.squares_a;
  clear(padded, distance, inner, w.part_a, w.part_b);
  for_strip(
      pair, a, b, n, s,
      [&](const A* x, const A* y) {
#pragma omp simd
        for (int64_t c = 0; c < padded; ++c) {
          const Factors<A> f{w.scale_a[c], w.scale_b[c], A(1), w.ratio[c]};
          const A u = f.difference(x[c], y[c]);
          w.part_a[c] += power<P>(u);
          w.part_b[c] += slope_times<P>(u, x[c] * f.scale_a);
        }
      },
      [&] {
        add_part(distance, w.part_a, padded);
        add_part(inner, w.part_b, padded);
      });
  double total = 0;
  for (int64_t c = 0; c < n; ++c) {
    const Factors<A> f{w.scale_a[c], w.scale_b[c], w.inverse[c], w.ratio[c]};
    save_state(static_cast<A*>(args.state), args.total_groups, group + c, f, squares_a[c],
               inner_of(P, f.inverse, inner[c]));
    total += double(distance_of(P, f.inverse, distance[c]));
  }
  return total;
}

template <int P, class S, class T, class A>
A sample_distance(const Args& args, const Pair& pair, int64_t b, const S* student, const T* teacher,
                  const Scratch<A>& s) {
  const int64_t group = pair.first_group + b * pair.groups;
  if (pair.group != Group::column) return rows_distance<P, S, T, A>(args, pair, student, teacher, group, s);
  double total = 0;
  for (int64_t c = 0; c < pair.inner; c += kStrip)
    total += strip_distance<P>(args, pair, student + c, teacher + c, least(kStrip, pair.inner - c), group + c, s);
  return A(total);
}

// [inner, outer] to [outer, inner], in blocks that share cache lines.
template <class T, class A>
void transpose(const T* from, int64_t outer, int64_t inner, A* to) {
  for (int64_t first = 0; first < inner; first += kLane) {
    const int64_t end = least(first + kLane, inner);
    for (int64_t o = 0; o < outer; ++o)
      for (int64_t i = first; i < end; ++i) to[o * inner + i] = A(load_as(from[i * outer + o]));
  }
}

template <class T>
const T* sample_of(const void* map, int64_t stride, int64_t b) {
  return static_cast<const T*>(map) + b * stride;
}

template <int P, class S, class T, class A>
void forward_typed(const Args& args, int64_t begin, int64_t end, const Scratch<A>& s) {
  const int students = args.shared ? 1 : args.pairs;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t b = task / students;
    const int first = int(task % students), last = args.shared ? args.pairs : first + 1;
    for (int k = first; k < last; ++k) {
      const Pair& pair = args.pair[k];
      const S* student = sample_of<S>(pair.student, pair.student_stride, b);
      const T* teacher = sample_of<T>(pair.teacher, pair.teacher_stride, b);
      A& distance = static_cast<A*>(args.distance)[k * args.samples + b];
      if (pair.transposed) {
        transpose(teacher, pair.outer, pair.inner, s.teacher);
        distance = sample_distance<P, S, A, A>(args, pair, b, student, s.teacher, s);
      } else {
        distance = sample_distance<P, S, T, A>(args, pair, b, student, teacher, s);
      }
    }
  }
}

// The gradient of elements that share their group, to `term`.
template <int P, class S, class T, class A>
void row_gradient(const Factors<A> f, A inner, A upstream, const S* a, const T* b, int64_t n, A* term) {
  for_blocks(n, [&](int64_t first, int64_t count) {
#pragma omp simd
    for (int64_t c = 0; c < count; ++c)
      term[first + c] =
          gradient<P>(f, inner, upstream, A(load_as(a[first + c])), A(load_as(b[first + c])));
  });
}

// The same for elements of neighbouring columns; `state` at the first one's group.
template <int P, class S, class T, class A>
void column_gradient(const A* state, int64_t groups, A upstream, const S* a, const T* b, int64_t n, A* term) {
  for_blocks(n, [&](int64_t first, int64_t count) {
#pragma omp simd
    for (int64_t c = first; c < first + count; ++c)
      term[c] = gradient<P>(load_factors(state, groups, c), load_inner(state, groups, c), upstream, A(load_as(a[c])),
                            A(load_as(b[c])));
  });
}

// One piece of row r, from column c: the gradient of pair k.
template <int P, class S, class T, class A>
void piece_gradient(const Args& args, const Pair& pair, int64_t b, int64_t r, int64_t c, int64_t n, A upstream,
                    const S* student, const T* teacher, A* term) {
  const A* state = static_cast<const A*>(args.state);
  const int64_t group = pair.first_group + b * pair.groups, at = r * pair.inner + c;
  if (pair.group == Group::column)
    return column_gradient<P>(state + group + c, args.total_groups, upstream, student + at, teacher + at, n, term);
  const int64_t g = group + (pair.group == Group::row ? r : 0);
  row_gradient<P>(load_factors(state, args.total_groups, g), load_inner(state, args.total_groups, g), upstream,
                  student + at, teacher + at, n, term);
}

template <class A>
A upstream_of(const Args& args, int k, int64_t b) {
  const A* grad = static_cast<const A*>(args.grad_loss);
  const A upstream = args.reduction == Reduction::none ? grad[b] : grad[0];
  const A mean = args.reduction == Reduction::mean ? A(args.samples) : A(1);
  return upstream * weight_of<A>(args, k, b) / mean;
}

// The gradient of one student's sample b: the sum over pairs [first, last).
template <int P, class S, class T, class A>
void sample_gradient(const Args& args, int first, int last, int64_t b, const Scratch<A>& s) {
  const Pair& shape = args.pair[first];
  const S* student = sample_of<S>(shape.student, shape.student_stride, b);
  S* grad = static_cast<S*>(shape.grad) + b * shape.elements();
  const int64_t rows = shape.group == Group::all ? 1 : shape.outer, row = shape.elements() / rows;
  for (int k = first; k < last; ++k) {
    const Pair& pair = args.pair[k];
    if (pair.transposed)
      transpose(sample_of<T>(pair.teacher, pair.teacher_stride, b), pair.outer, pair.inner,
                s.teacher + (k - first) * pair.elements());
  }
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < row; c += kPiece) {
      const int64_t n = least(kPiece, row - c);
      for (int k = first; k < last; ++k) {
        const Pair& pair = args.pair[k];
        A* term = k == first ? s.sum : s.term;
        const A upstream = upstream_of<A>(args, k, b);
        if (pair.transposed)
          piece_gradient<P>(args, pair, b, r, c, n, upstream, student,
                            s.teacher + (k - first) * pair.elements(), term);
        else
          piece_gradient<P>(args, pair, b, r, c, n, upstream, student,
                            sample_of<T>(pair.teacher, pair.teacher_stride, b), term);
        if (k > first)
          for (int64_t i = 0; i < n; ++i) s.sum[i] += s.term[i];
      }
      store_row(s.sum, n, A(1), grad + r * row + c);
    }
  }
}

template <int P, class S, class T, class A>
void backward_typed(const Args& args, int64_t begin, int64_t end, const Scratch<A>& s) {
  const int students = args.shared ? 1 : args.pairs;
  for (int64_t task = begin; task < end; ++task) {
    const int first = int(task % students);
    sample_gradient<P, S, T, A>(args, first, args.shared ? args.pairs : first + 1, task / students, s);
  }
}

// Elements of the teachers' samples that a task holds in the student's layout: all of those of one student.
int64_t transposed_elements(const Args& args) {
  int64_t most = 0;
  for (int k = 0; k < args.pairs; ++k) {
    const int64_t n = args.pair[k].transposed ? args.pair[k].elements() * (args.shared ? args.pairs : 1) : 0;
    most = n > most ? n : most;
  }
  return most;
}

template <class A>
Scratch<A> divide(void* memory) {
  A* p = aligned_scratch<A>(memory);
  Scratch<A> s{p, p + kPiece, p + 2 * kPiece, p + 3 * kPiece, {}, p + 4 * kPiece + 8 * kStrip};
  for (int i = 0; i < 8; ++i) s.columns[i] = p + 4 * kPiece + i * kStrip;
  return s;
}

int64_t scratch_bytes(const Args& args) {
  constexpr int64_t kAlignment = 64;
  return (4 * kPiece + 8 * kStrip + transposed_elements(args)) * int64_t(sizeof(double)) + kAlignment;
}

template <class F>
void dispatch_types(const Args& args, const F& run) {
  const bool same = args.student_type == args.teacher_type;
  switch (args.student_type) {
    case DType::f32: return run(float(), float(), float());
    case DType::f64: return run(double(), double(), double());
    case DType::f16: return same ? run(Half(), Half(), float()) : run(Half(), float(), float());
    case DType::bf16: return same ? run(BFloat16(), BFloat16(), float()) : run(BFloat16(), float(), float());
  }
}

void forward_tasks(const Args& args, int64_t begin, int64_t end, void* memory) {
  dispatch_types(args, [&]<class S, class T, class A>(S, T, A) {
    const Scratch<A> s = divide<A>(memory);
    if (args.p == 1)
      forward_typed<1, S, T>(args, begin, end, s);
    else
      forward_typed<2, S, T>(args, begin, end, s);
  });
}

void backward_tasks(const Args& args, int64_t begin, int64_t end, void* memory) {
  dispatch_types(args, [&]<class S, class T, class A>(S, T, A) {
    const Scratch<A> s = divide<A>(memory);
    if (args.p == 1)
      backward_typed<1, S, T>(args, begin, end, s);
    else
      backward_typed<2, S, T>(args, begin, end, s);
  });
}

}  // namespace
}  // namespace FASTKD_TARGET

const CpuKernels FASTKD_CPU_KERNELS = {scratch_bytes, forward_tasks, backward_tasks};

}  // namespace fastkd::feature_ensemble
