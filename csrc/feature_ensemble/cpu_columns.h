// Groups that are the columns of a sample, on the CPU: a strip of them side by side. Included by cpu.cpp alone.
#pragma once

#include "feature_ensemble/cpu_rows.h"

namespace fastkd::feature_ensemble {
inline namespace FASTKD_TARGET {
namespace {

// Calls row(a, b) for every row of a strip, then flush() after every kBlock of them.
template <class S, class T, class A, class Row, class Flush>
void for_strip(const Pair& pair, const S* a, const T* b, int64_t n, const Scratch<A>& s, const Row& row, const Flush& flush) {
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
    const Factors<A> f = make_factors(w.scale_a[c], double(w.squares_a[c]), w.scale_b[c], double(w.squares_b[c]));
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
    save_state(static_cast<A*>(args.state), args.total_groups, group + c, f, squares_a[c], inner_of(P, f.inverse, inner[c]));
    total += double(distance_of(P, f.inverse, distance[c]));
  }
  return total;
}

}  // namespace
}  // namespace FASTKD_TARGET
}  // namespace fastkd::feature_ensemble
