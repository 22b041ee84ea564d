// feature_ensemble on the CPU: a sample at a time, which stays in the L2 cache between its passes. Compiled once per
// instruction set; no headers of the standard library with inline functions here (core/config.h says why).
#include "core/dispatch.h"
#include "feature_ensemble/cpu_columns.h"

namespace fastkd::feature_ensemble {
inline namespace FASTKD_TARGET {
namespace {

template <int P, class S, class T, class A>
A sample_distance(const Args& args, const Pair& pair, int64_t b, const S* student, const T* teacher, const Scratch<A>& s) {
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

// A teacher's sample in the student's layout, in the accumulation type.
template <class A>
void unpack(const Pair& pair, int64_t b, A* to) {
  dispatch(pair.teacher_type, [&]<class T, class>() {
    const T* from = sample_of<T>(pair.teacher, pair.teacher_stride, b);
    if (pair.transposed) return transpose(from, pair.outer, pair.inner, to);
    for_blocks(pair.elements(), [&](int64_t first, int64_t count) {
#pragma omp simd
      for (int64_t c = first; c < first + count; ++c) to[c] = A(load_as(from[c]));
    });
  });
}

// f(a pointer to the teacher's sample b): `unpacked`, or where it lies, in the student's type or float32 beside a half.
template <class S, class A, class F>
void with_teacher(const Pair& pair, int64_t b, const A* unpacked, const F& f) {
  if (pair.unpacked) return f(unpacked);
  if constexpr (sizeof(S) < sizeof(A))
    if (pair.teacher_type == DType::f32) return f(sample_of<float>(pair.teacher, pair.teacher_stride, b));
  f(sample_of<S>(pair.teacher, pair.teacher_stride, b));
}

// The gradient of elements that share their group, to `term`.
template <int P, class S, class T, class A>
void row_gradient(const Factors<A> f, A inner, A upstream, const S* a, const T* b, int64_t n, A* term) {
  for_blocks(n, [&](int64_t first, int64_t count) {
#pragma omp simd
    for (int64_t c = 0; c < count; ++c)
      term[first + c] = gradient<P>(f, inner, upstream, A(load_as(a[first + c])), A(load_as(b[first + c])));
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
  row_gradient<P>(load_factors(state, args.total_groups, g), load_inner(state, args.total_groups, g), upstream, student + at,
                  teacher + at, n, term);
}

template <class A>
A upstream_of(const Args& args, int k, int64_t b) {
  const A* grad = static_cast<const A*>(args.grad_loss);
  const A upstream = !grad ? A(1) : args.reduction == Reduction::none ? grad[b] : grad[0];
  return upstream * weight_of<A>(args, k, b) / A(args.divisor);
}

// Elements [c, c + n) of row r of one student's sample b: the sum over pairs [first, last) of their gradients, to `sum`.
template <int P, class S, class A>
void piece_of_sum(const Args& args, int first, int last, int64_t b, int64_t r, int64_t c, int64_t n, const S* student, A* sum,
                  const Scratch<A>& s) {
  bool empty = true;
  for (int k = first; k < last; ++k) {
    const Upstream<A> upstream = s.upstream[k - first];
    if (upstream.skipped) continue;
    const Pair& pair = args.pair[k];
    A* term = empty ? sum : s.term;
    with_teacher<S>(pair, b, s.teacher + (k - first) * pair.elements(), [&](const auto* teacher) {
      piece_gradient<P>(args, pair, b, r, c, n, upstream.factor, student, teacher, term);
    });
    if (!empty)
      for (int64_t i = 0; i < n; ++i) sum[i] += s.term[i];
    empty = false;
  }
  if (empty) fill(sum, n, A(0));
}

// The gradient of one student's sample b: the sum over pairs [first, last).
template <int P, class S, class A>
void sample_gradient(const Args& args, int first, int last, int64_t b, const Scratch<A>& s) {
  const Pair& shape = args.pair[first];
  const S* student = sample_of<S>(shape.student, shape.student_stride, b);
  const int64_t rows = shape.group == Group::all ? 1 : shape.outer, row = shape.elements() / rows;
  const bool direct = sizeof(S) == sizeof(A) || args.grad_type == DType::f32;
  for (int k = first; k < last; ++k) {
    const Pair& pair = args.pair[k];
    const bool skipped = skips<A>(args, k, b);
    s.upstream[k - first] = {skipped ? A(0) : upstream_of<A>(args, k, b), skipped};
    if (pair.unpacked && !skipped) unpack(pair, b, s.teacher + (k - first) * pair.elements());
  }
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < row; c += kPiece) {
      const int64_t n = least(kPiece, row - c), at = b * shape.elements() + r * row + c;
      A* sum = direct ? static_cast<A*>(shape.grad) + at : s.sum;
      piece_of_sum<P>(args, first, last, b, r, c, n, student, sum, s);
      if (!direct) store_row(sum, n, A(1), static_cast<S*>(shape.grad) + at);
    }
  }
}

template <int P, class S, class A>
A pair_distance(const Args& args, int k, int64_t b, const Scratch<A>& s) {
  if (skips<A>(args, k, b)) return 0;
  const Pair& pair = args.pair[k];
  const S* student = sample_of<S>(pair.student, pair.student_stride, b);
  if (pair.unpacked) unpack(pair, b, s.teacher);
  A distance;
  with_teacher<S>(pair, b, static_cast<const A*>(s.teacher), [&]<class T>(const T* teacher) {
    distance = sample_distance<P, S, T, A>(args, pair, b, student, teacher, s);
  });
  return distance;
}

template <int P, class S, class A>
void forward_typed(const Args& args, int64_t begin, int64_t end, const Scratch<A>& s) {
  const int students = args.shared ? 1 : args.pairs;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t b = task / students;
    const int first = int(task % students), last = args.shared ? args.pairs : first + 1;
    for (int k = first; k < last; ++k)
      static_cast<A*>(args.distance)[k * args.samples + b] = pair_distance<P, S>(args, k, b, s);
    if (args.pair[first].grad) sample_gradient<P, S>(args, first, last, b, s);  // its maps are still in the cache
  }
}

template <int P, class S, class A>
void backward_typed(const Args& args, int64_t begin, int64_t end, const Scratch<A>& s) {
  const int students = args.shared ? 1 : args.pairs;
  for (int64_t task = begin; task < end; ++task) {
    const int first = int(task % students);
    sample_gradient<P, S>(args, first, args.shared ? args.pairs : first + 1, task / students, s);
  }
}

// Elements of the teachers' samples that a task unpacks: all of those of one student.
int64_t unpacked_elements(const Args& args) {
  int64_t most = 0;
  for (int k = 0; k < args.pairs; ++k) {
    const int64_t n = args.pair[k].unpacked ? args.pair[k].elements() * (args.shared ? args.pairs : 1) : 0;
    most = n > most ? n : most;
  }
  return most;
}

template <class A>
Scratch<A> divide(const Args& args, void* memory) {
  A* p = aligned_scratch<A>(memory);
  Scratch<A> s{p, p + kPiece, p + 2 * kPiece, p + 3 * kPiece, {}, nullptr, p + 4 * kPiece + 8 * kStrip};
  for (int i = 0; i < 8; ++i) s.columns[i] = p + 4 * kPiece + i * kStrip;
  s.upstream = reinterpret_cast<Upstream<A>*>(s.teacher + unpacked_elements(args));
  return s;
}

int64_t scratch_bytes(const Args& args) {
  constexpr int64_t kAlignment = 64;
  const int64_t pairs = args.pairs * int64_t(sizeof(Upstream<double>));
  return (4 * kPiece + 8 * kStrip + unpacked_elements(args)) * int64_t(sizeof(double)) + pairs + kAlignment;
}

void forward_tasks(const Args& args, int64_t begin, int64_t end, void* memory) {
  dispatch(args.student_type, [&]<class S, class A>() {
    const Scratch<A> s = divide<A>(args, memory);
    if (args.p == 1)
      forward_typed<1, S>(args, begin, end, s);
    else
      forward_typed<2, S>(args, begin, end, s);
  });
}

void backward_tasks(const Args& args, int64_t begin, int64_t end, void* memory) {
  dispatch(args.student_type, [&]<class S, class A>() {
    const Scratch<A> s = divide<A>(args, memory);
    if (args.p == 1)
      backward_typed<1, S>(args, begin, end, s);
    else
      backward_typed<2, S>(args, begin, end, s);
  });
}

}  // namespace
}  // namespace FASTKD_TARGET

const CpuKernels FASTKD_CPU_KERNELS = {scratch_bytes, forward_tasks, backward_tasks};

}  // namespace fastkd::feature_ensemble
