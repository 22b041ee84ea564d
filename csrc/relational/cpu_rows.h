// The parts of distances that read the embeddings, on the CPU, without a matrix product: squared distances are summed
// from differences, half as many as a Gram matrix has products, and exact for near rows in the rows' own precision.
#pragma once

#include "relational/math.h"

namespace fastkd::relational {
inline namespace FASTKD_TARGET {

constexpr int64_t kDepth = 512;     // columns whose sums stay in the rows' precision before they are added up in double
constexpr int64_t kTerms = 64;      // the same for the terms of a gradient
constexpr int kTall = 2, kWide = 4; // rows against rows in one loop over the columns

template <class A>
double direct_square(const A* a, const A* b, int64_t width) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t d = 0; d < width; ++d) {
    const double difference = double(a[d]) - double(b[d]);
    sum += difference * difference;
  }
  return sum;
}

// Squared distances of rows a, a + 1 from four others. Written out: GCC keeps arrays of sums in memory.
template <class A>
void square_tile(const A* a0, const A* a1, const A* const* b, int64_t count, A (*sums)[kWide]) {
  const A *b0 = b[0], *b1 = b[1], *b2 = b[2], *b3 = b[3];
  A s00 = 0, s01 = 0, s02 = 0, s03 = 0, s10 = 0, s11 = 0, s12 = 0, s13 = 0;
#pragma omp simd reduction(+ : s00, s01, s02, s03, s10, s11, s12, s13)
  for (int64_t d = 0; d < count; ++d) {
    const A x0 = a0[d], x1 = a1[d], y0 = b0[d], y1 = b1[d], y2 = b2[d], y3 = b3[d];
    s00 += (x0 - y0) * (x0 - y0);
    s01 += (x0 - y1) * (x0 - y1);
    s02 += (x0 - y2) * (x0 - y2);
    s03 += (x0 - y3) * (x0 - y3);
    s10 += (x1 - y0) * (x1 - y0);
    s11 += (x1 - y1) * (x1 - y1);
    s12 += (x1 - y2) * (x1 - y2);
    s13 += (x1 - y3) * (x1 - y3);
  }
  const A all[kTall][kWide] = {{s00, s01, s02, s03}, {s10, s11, s12, s13}};
  for (int i = 0; i < kTall; ++i)
    for (int j = 0; j < kWide; ++j) sums[i][j] = all[i][j];
}

// Rows of one block against all before them, and the mirror image of that.
template <class A>
struct SquareBlock {
  const RowsArgs& args;
  int64_t begin, end;  // its rows

  const A* row(int64_t r) const { return static_cast<const A*>(args.rows) + (r < args.n ? r : args.n - 1) * args.width; }

  void add(int64_t first, int64_t count) const {
    for (int64_t b = 0; b < end; b += kWide) {
      const A* others[kWide];
      for (int j = 0; j < kWide; ++j) others[j] = row(b + j) + first;
      for (int64_t a = begin > b ? begin : begin + (b - begin) / kTall * kTall; a < end; a += kTall) {
        A sums[kTall][kWide];
        square_tile(row(a) + first, row(a + 1) + first, others, count, sums);
        for (int i = 0; i < kTall && a + i < end; ++i)
          for (int j = 0; j < kWide && b + j < a + i; ++j) {
            double& square = args.squares[(a + i) * args.n + b + j];
            square = double(sums[i][j]) + (first > 0 ? square : 0.);
          }
      }
    }
  }

  void run() const {
    for (int64_t first = 0; first < args.width; first += kDepth)
      add(first, args.width - first < kDepth ? args.width - first : kDepth);
    for (int64_t b = 0; b < end; ++b) {
      for (int64_t a = begin; a < end; ++a) {
        if (b >= a) continue;
        double& square = args.squares[a * args.n + b];
        if (sizeof(A) == sizeof(float) && square < kTinySquare) square = direct_square(row(a), row(b), args.width);
        args.squares[b * args.n + a] = square;
      }
      if (b >= begin) args.squares[b * args.n + b] = 0;
    }
  }
};

// part0, part1 += sum_j weight[j] (x - y_j) for two rows x and four others y.
template <class A>
void pull_tile(const A* x0, const A* x1, const A* const* y, const A (*weights)[kWide], int64_t count, A* part0, A* part1) {
  const A *y0 = y[0], *y1 = y[1], *y2 = y[2], *y3 = y[3];
  const A w00 = weights[0][0], w01 = weights[0][1], w02 = weights[0][2], w03 = weights[0][3];
  const A w10 = weights[1][0], w11 = weights[1][1], w12 = weights[1][2], w13 = weights[1][3];
#pragma omp simd
  for (int64_t d = 0; d < count; ++d) {
    const A a = x0[d], b = x1[d], c0 = y0[d], c1 = y1[d], c2 = y2[d], c3 = y3[d];
    part0[d] += (w00 * (a - c0) + w01 * (a - c1)) + (w02 * (a - c2) + w03 * (a - c3));
    part1[d] += (w10 * (b - c0) + w11 * (b - c1)) + (w12 * (b - c2) + w13 * (b - c3));
  }
}

// The gradient of the rows a and a + 1 (the latter where it is below `end`): factor * sum_b weight_ab (x_a - x_b).
template <class A>
void pull_pair(const PullArgs& args, int64_t a, int64_t end, A* parts, double* totals) {
  const int64_t n = args.n, other = a + 1 < end ? a + 1 : a;
  const auto row = [&](int64_t r) { return static_cast<const A*>(args.rows) + r * args.width; };
  for (int64_t first = 0; first < args.width; first += kDepth) {
    const int64_t count = args.width - first < kDepth ? args.width - first : kDepth;
    for (int64_t d = 0; d < kTall * kDepth; ++d) totals[d] = 0;
    for (int64_t block = 0; block < n; block += kTerms) {
      for (int64_t d = 0; d < kTall * kDepth; ++d) parts[d] = 0;
      const int64_t stop = block + kTerms < n ? block + kTerms : n;
      for (int64_t b = block; b < stop; b += kWide) {
        const A* others[kWide];
        A weights[kTall][kWide];
        for (int j = 0; j < kWide; ++j) {
          const bool inside = b + j < stop;
          const int64_t at = inside ? b + j : b;
          others[j] = row(at) + first;
          weights[0][j] = inside ? A(-args.laplacian[a * n + at]) : A(0);
          weights[1][j] = inside ? A(-args.laplacian[other * n + at]) : A(0);
        }
        pull_tile(row(a) + first, row(other) + first, others, weights, count, parts, parts + kDepth);
      }
      for (int64_t d = 0; d < kTall * kDepth; ++d) totals[d] += double(parts[d]);
    }
    for (int i = 0; i < kTall && a + i < end; ++i) {
      A* to = static_cast<A*>(args.grad) + (a + i) * args.columns + first;
      const int64_t stop = args.columns - first < count ? args.columns - first : count;
      for (int64_t d = 0; d < stop; ++d) to[d] = A(totals[i * kDepth + d] * *args.factor);
    }
  }
}

}  // namespace FASTKD_TARGET
}  // namespace fastkd::relational
