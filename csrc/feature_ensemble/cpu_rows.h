// Groups that lie in one piece of memory, on the CPU: whole samples, and the rows of one. Included by cpu.cpp alone.
#pragma once

#include "core/cpu/rows.h"
#include "feature_ensemble/math.h"

namespace fastkd::feature_ensemble {
inline namespace FASTKD_TARGET {
namespace {

constexpr int64_t kPiece = 1024;  // elements of a row that are held in scratch memory
// Elements that are added up in the accumulation type, 32 in each lane of a register; their sums are in double.
#if defined(__AVX512F__)
constexpr int64_t kSummed = 512;
#elif defined(__AVX2__)
constexpr int64_t kSummed = 256;
#else
constexpr int64_t kSummed = 128;
#endif
constexpr int64_t kHalfLanes = 64;  // what loops over half precision take at once, at most: the rest is a sum of scalars
constexpr int64_t kStrip = 256;   // columns that are summed side by side
constexpr int64_t kBlock = 32;    // rows of a strip between two such additions

// What multiplies a pair's gradient at the sample in work.
template <class A>
struct Upstream {
  A factor;
  bool skipped;
};

template <class A>
struct Scratch {
  A *a, *b, *term, *sum;  // each [kPiece]
  A* columns[8];          // each [kStrip]
  Upstream<A>* upstream;  // of the pairs of a task
  A* teacher;             // unpacked samples of teachers, each [elements]
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

// Adds up `piece(a, b, n)` over a group's elements in double. Half precision that does not fill registers goes through
// scratch memory: one long sum of scalars is slow, and rounds most.
template <class S, class T, class A, class F>
Sums<double> in_pieces(const S* a, const T* b, int64_t n, const Scratch<A>& s, const F& piece) {
  double first = 0, second = 0;
  for (int64_t c = 0; c < n; c += kSummed) {
    const int64_t count = least(kSummed, n - c);
    Sums<A> sums;
    if ((sizeof(S) < sizeof(A) || sizeof(T) < sizeof(A)) && count % kHalfLanes != 0) {
      const int64_t padded = padded_length(count);
      sums = piece(as_row(a + c, count, padded, s.a), as_row(b + c, count, padded, s.b), padded);
    } else {
      sums = piece(a + c, b + c, count);
    }
    first += double(sums.first);
    second += double(sums.second);
  }
  return {first, second};
}

// One group that lies in one piece of memory: its distance; its state is saved.
template <int P, class S, class T, class A>
A group_distance(const Args& args, const S* a, const T* b, int64_t n, int64_t group, const Scratch<A>& scratch) {
  A scale_a = 1, scale_b = 1;
  const auto both = [&](const auto* x, const auto* y, int64_t m) { return squares(x, y, m, scale_a, scale_b); };
  Sums<double> s = in_pieces(a, b, n, scratch, both);
  if (!is_safe(A(s.first)) || !is_safe(A(s.second))) {
    scale_a = scale_of(largest(a, n, A()));
    scale_b = scale_of(largest(b, n, A()));
    s = in_pieces(a, b, n, scratch, both);
  }
  const Factors<A> f = make_factors(scale_a, s.first, scale_b, s.second);
  const Sums<double> d =
      in_pieces(a, b, n, scratch, [&](const auto* x, const auto* y, int64_t m) { return differences<P>(x, y, m, f); });
  save_state(static_cast<A*>(args.state), args.total_groups, group, f, A(s.first), inner_of(P, f.inverse, A(d.second)));
  return distance_of(P, f.inverse, A(d.first));
}

// The rows of a sample (or all of it as one row): the sum of their distances.
template <int P, class S, class T, class A>
A rows_distance(const Args& args, const Pair& pair, const S* a, const T* b, int64_t group, const Scratch<A>& s) {
  if (pair.group == Group::all) return group_distance<P>(args, a, b, pair.elements(), group, s);
  const int64_t n = pair.inner, padded = padded_length(n);
  double total = 0;
  for (int64_t r = 0; r < pair.outer; ++r, a += n, b += n) {
    if (padded <= kPiece) {
      const A *row_a = as_row(a, n, padded, s.a), *row_b = as_row(b, n, padded, s.b);
      total += double(group_distance<P>(args, row_a, row_b, padded, group + r, s));
    } else {
      total += double(group_distance<P>(args, a, b, n, group + r, s));
    }
  }
  return A(total);
}

}  // namespace
}  // namespace FASTKD_TARGET
}  // namespace fastkd::feature_ensemble
