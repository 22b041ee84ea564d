// relational on the CPU. Compiled once per instruction set; no headers of the standard library with inline functions here
// (core/config.h says why).
#include "core/math.h"
#include "core/cpu/rows.h"
#include "relational/cpu_rows.h"

namespace fastkd::relational {
inline namespace FASTKD_TARGET {
namespace {

// A tile of the triangle k < i, 5 arrays of kRows x kColumns, stays in the L1 or L2 cache while the vertices pass by.
constexpr int64_t kRows = 8, kColumns = 256;

template <class F>
void with_rows_type(DType type, const F& f) {
  type == DType::f64 ? f.template operator()<double>() : f.template operator()<float>();
}

double scale(const RowsArgs& args) {
  double top = 0;
  with_rows_type(args.type, [&]<class A>() {
    const A* x = static_cast<const A*>(args.from);
    A most = 0;
#pragma omp simd reduction(max : most)
    for (int64_t e = 0; e < args.n * args.columns; ++e) {
      const A size = magnitude(x[e]);
      most = size > most ? size : most;
    }
    top = double(most);
  });
  return row_scale(top);
}

void copy_rows(const RowsArgs& args, int64_t begin, int64_t end) {
  with_rows_type(args.type, [&]<class A>() {
    for (int64_t a = begin; a < end; ++a) {
      const A* from = static_cast<const A*>(args.from) + a * args.columns;
      A* to = static_cast<A*>(args.rows) + a * args.width;
      for (int64_t d = 0; d < args.columns; ++d) to[d] = A(double(from[d]) * args.scale);
      for (int64_t d = args.columns; d < args.width; ++d) to[d] = 0;
    }
  });
}

void direct_squares(const RowsArgs& args, int64_t begin, int64_t end) {
  with_rows_type(args.type, [&]<class A>() { SquareBlock<A>{args, begin, end}.run(); });
}

void pull(const PullArgs& args, int64_t begin, int64_t end) {
  with_rows_type(args.type, [&]<class A>() {
    alignas(64) A parts[kTall * kDepth];
    alignas(64) double totals[kTall * kDepth];
    for (int64_t a = begin; a < end; a += kTall) pull_pair(args, a, end, parts, totals);
  });
}

void gram_squares(const SidesArgs& args, int64_t begin, int64_t end) {
  const int64_t n = args.n;
  for (int64_t a = begin; a < end; ++a) {
    const double norm = args.gram[a * n + a];
    for (int64_t b = 0; b < n; ++b) {
      const double other = args.gram[b * n + b];
      double square = norm + other - 2 * args.gram[a * n + b];
      if (is_near(square, norm + other) || a == b)
        square = direct_square(args.x + a * args.width, args.x + b * args.width, args.width);
      args.squares[a * n + b] = args.counts(a, b) ? square : 0;
    }
  }
}

void sums(const SidesArgs& args, int64_t begin, int64_t end) {
  const int64_t n = args.n;
  for (int64_t a = begin; a < end; ++a) {
    const double* squares = args.squares + a * n;
    double sum = 0, positive = 0;
#pragma omp simd reduction(+ : sum, positive)
    for (int64_t b = 0; b < n; ++b) {
      sum += ::sqrt(squares[b]);
      positive += squares[b] > 0 ? 1. : 0.;
    }
    args.row_sums[a] = sum;
    args.row_sums[n + a] = positive;
  }
}

template <class A>
void angle_planes(const SidesArgs& args, int64_t a) {
  const int64_t n = args.n, padded = padded_size(n), plane = n * padded;
  const double scale = inverse_mean(args.mean[0]), eps = args.eps;
  const double* from = args.squares + a * n;
  A* hi = static_cast<A*>(args.planes) + a * padded;
  A *inv = hi + plane, *lo = hi + 2 * plane;
  for (int64_t b = 0; b < padded; ++b) {
    const Plane<A> p = b < n ? plane_of<A>(from[b] * scale * scale, eps) : Plane<A>{0, 0, 0};
    hi[b] = p.hi;
    inv[b] = p.inv;
    if constexpr (sizeof(A) == sizeof(float)) lo[b] = p.lo;
  }
}

void planes(const SidesArgs& args, int64_t begin, int64_t end) {
  for (int64_t a = begin; a < end; ++a) {
    if (args.kind == Kind::single) {
      angle_planes<float>(args, a);
    } else if (args.kind == Kind::full) {
      angle_planes<double>(args, a);
    } else {
      const int64_t padded = padded_size(args.n);
      const double scale = inverse_mean(args.mean[0]);
      double* to = static_cast<double*>(args.planes) + a * padded;
      for (int64_t b = 0; b < args.n; ++b) to[b] = ::sqrt(args.squares[a * args.n + b]) * scale;
      for (int64_t b = args.n; b < padded; ++b) to[b] = 0;
    }
  }
}

// --- angles ---------------------------------------------------------------------------------------------------------------

// Rows of the triangle k < i, each padded to whole registers, one after the other.
int64_t triangle_row(int64_t i) {
  const int64_t block = i / kLane;
  return kLane * kLane / 2 * block * (block + 1) + i % kLane * kLane * (block + 1);
}

int64_t triangle_size(int64_t n) { return triangle_row((n + kLane - 1) / kLane * kLane); }

// The planes of one network.
template <class A>
struct Network {
  const A *hi, *inv, *lo;
  int64_t padded;

  Network(const void* data, int64_t n) : padded(padded_size(n)) {
    hi = static_cast<const A*>(data);
    inv = hi + n * padded;
    lo = sizeof(A) == sizeof(float) ? inv + n * padded : hi;  // double needs none: read and not used
  }
  Network row(int64_t r) const {
    Network at = *this;
    at.hi += r * padded;
    at.inv += r * padded;
    at.lo += r * padded;
    return at;
  }
  Plane<A> at(int64_t c) const { return {hi[c], lo[c], inv[c]}; }
};

template <class A>
struct Vertex {
  Network<A> student, teacher;  // its rows
  A* by_side;                   // [padded]
  A weight;
};

template <class A>
struct RowResult {
  A loss, by_side;
};

// Triplets of a vertex with the side to i and those to `count` k from `first` on. kMasked: one register of them, of which
// only k < i count.
template <bool kGrad, bool kMasked, class A>
RowResult<A> row_of_triplets(const Vertex<A>& v, const Network<A>& s, const Network<A>& t, int64_t i, int64_t first,
                             int64_t count, A* by_opposite) {
  const Plane<A> si = v.student.at(i), ti = v.teacher.at(i);
  const A weight = v.weight;
  const A *s_hi = s.hi + first, *s_lo = s.lo + first, *t_hi = t.hi + first, *t_lo = t.lo + first;
  const A *sk_hi = v.student.hi + first, *sk_lo = v.student.lo + first, *sk_inv = v.student.inv + first;
  const A *tk_hi = v.teacher.hi + first, *tk_lo = v.teacher.lo + first, *tk_inv = v.teacher.inv + first;
  A *by_side = v.by_side + first, *by_pair = kGrad ? by_opposite + first : nullptr;
  const int inside = int(i - first);
  A loss = 0, side = 0;
#pragma omp simd reduction(+ : loss, side)
  for (int k = 0; k < int(count); ++k) {
    const A mask = !kMasked || k < inside ? A(1) : A(0);
    const Plane<A> sk{sk_hi[k], sk_lo[k], kMasked ? sk_inv[k] * mask : sk_inv[k]};
    const Plane<A> tk{tk_hi[k], tk_lo[k], kMasked ? tk_inv[k] * mask : tk_inv[k]};
    const Triplet<A> r = triplet(si, sk, s_hi[k], s_lo[k], ti, tk, t_hi[k], t_lo[k], weight);
    loss += r.loss;
    if constexpr (kGrad) {
      side += r.by_side_i;
      by_side[k] += r.by_side_k;
      by_pair[k] += r.by_opposite;
    }
  }
  return {loss, side};
}

template <bool kGrad, class A>
struct Chunk {
  const LossArgs& args;
  Network<A> student, teacher;
  A *by_side, *by_opposite;  // [N, padded], and the chunk's triangle
  int64_t padded = padded_size(args.n);

  Vertex<A> vertex(int64_t j) const {
    const A weight = args.weight ? A(args.weight[j]) : A(1);
    return {student.row(j), teacher.row(j), by_side + j * padded, weight};
  }

  // Rows [i0, i1) and columns [first, last) of the triangle, at one vertex.
  double tile(const Vertex<A>& v, int64_t i0, int64_t i1, int64_t first, int64_t last) const {
    double loss = 0;
    for (int64_t i = i0; i < i1; ++i) {
      const Network<A> s = student.row(i), t = teacher.row(i);
      A* pairs = kGrad ? by_opposite + triangle_row(i) : nullptr;
      const int64_t diagonal = i / kLane * kLane, stop = diagonal < last ? diagonal : last;
      A side = 0;
      if (first < stop) {
        const auto r = row_of_triplets<kGrad, false>(v, s, t, i, first, stop - first, pairs);
        loss += double(r.loss);
        side += r.by_side;
      }
      if (first <= diagonal && diagonal < last) {
        const auto r = row_of_triplets<kGrad, true>(v, s, t, i, diagonal, kLane, pairs);
        loss += double(r.loss);
        side += r.by_side;
      }
      if constexpr (kGrad) v.by_side[i] += side;
    }
    return loss;
  }

  void run(int64_t j0, int64_t j1) const {
    const int64_t n = args.n;
    for (int64_t j = j0; j < j1; ++j) {
      args.row_loss[j] = 0;
      if constexpr (kGrad)
        for (int64_t k = 0; k < padded; ++k) by_side[j * padded + k] = 0;
    }
    if constexpr (kGrad)
      for (int64_t e = 0; e < triangle_row(n); ++e) by_opposite[e] = 0;
    for (int64_t first = 0; first < n; first += kColumns) {
      for (int64_t i0 = first / kRows * kRows; i0 < n; i0 += kRows) {
        const int64_t i1 = i0 + kRows < n ? i0 + kRows : n;
        for (int64_t j = j0; j < j1; ++j) args.row_loss[j] += tile(vertex(j), i0, i1, first, first + kColumns);
      }
    }
    for (int64_t j = j0; j < j1; ++j) {
      double same = 0;
      for (int64_t i = 0; i < n; ++i) same += same_side_loss(student.row(j).inv[i], teacher.row(j).inv[i]);
      args.row_loss[j] = (2 * args.row_loss[j] + same) * vertex_factor(n);
    }
  }
};

// partial: by_side [N, padded], then kChunks triangles.
template <class A>
A* triangle_of(const LossArgs& args, int64_t chunk) {
  return static_cast<A*>(args.partial) + args.n * padded_size(args.n) + chunk * triangle_size(args.n);
}

int64_t partial_elements(int64_t n) { return n * padded_size(n) + kChunks * triangle_size(n); }

template <bool kGrad, class A>
void angles_typed(const LossArgs& args, int64_t begin, int64_t end) {
  for (int64_t c = begin; c < end; ++c) {
    const Chunk<kGrad, A> chunk{args, Network<A>(args.student, args.n), Network<A>(args.teacher, args.n),
                                static_cast<A*>(args.partial), kGrad ? triangle_of<A>(args, c) : nullptr};
    chunk.run(args.n * c / kChunks, args.n * (c + 1) / kChunks);
  }
}

void angles(const LossArgs& args, int64_t begin, int64_t end) {
  if (args.kind == Kind::single)
    args.need_grad ? angles_typed<true, float>(args, begin, end) : angles_typed<false, float>(args, begin, end);
  else
    args.need_grad ? angles_typed<true, double>(args, begin, end) : angles_typed<false, double>(args, begin, end);
}

// Pairs k < i of the rows [begin, end): both elements of `laplacian`.
template <class A>
void angle_pairs_typed(const LossArgs& args, int64_t begin, int64_t end) {
  const int64_t n = args.n, padded = padded_size(n);
  const A* by_side = static_cast<const A*>(args.partial);
  const double factor = 2 * vertex_factor(n) * args.factor() * element_factor(args.mean[0]);
  for (int64_t i = begin; i < end; ++i) {
    for (int64_t k = 0; k < i; ++k) {
      double opposite = 0;
      for (int64_t c = 0; c < kChunks; ++c) opposite += double(triangle_of<A>(args, c)[triangle_row(i) + k]);
      const double sides = double(by_side[i * padded + k]) + double(by_side[k * padded + i]);
      args.laplacian[i * n + k] = args.laplacian[k * n + i] = (sides - opposite) * factor;
    }
  }
}

void angle_pairs(const LossArgs& args, int64_t begin, int64_t end) {
  args.kind == Kind::single ? angle_pairs_typed<float>(args, begin, end) : angle_pairs_typed<double>(args, begin, end);
}

// --- distances ------------------------------------------------------------------------------------------------------------

struct DistanceRows {
  const LossArgs& args;
  int64_t padded = padded_size(args.n);

  const double* student(int64_t a) const { return static_cast<const double*>(args.student) + a * padded; }
  const double* teacher(int64_t a) const { return static_cast<const double*>(args.teacher) + a * padded; }
};

void distances(const LossArgs& args, int64_t begin, int64_t end) {
  const DistanceRows rows{args};
  for (int64_t a = begin; a < end; ++a) {
    const double *s = rows.student(a), *t = rows.teacher(a), own = args.weight_of(a);
    double loss = 0, through_mean = 0;
    for (int64_t b = 0; b < args.n; ++b) {
      const double slope = huber_slope(s[b] - t[b]);
      loss += huber(s[b] - t[b], slope);
      through_mean += (own + args.weight_of(b)) * slope * s[b];
    }
    args.row_loss[a] = loss / double(args.n);
    args.row_sums[a] = through_mean;
  }
}

void distance_pairs(const LossArgs& args, double correction, int64_t begin, int64_t end) {
  const DistanceRows rows{args};
  const int64_t n = args.n;
  const double factor = args.factor() / double(n) * element_factor(args.mean[0]);
  for (int64_t a = begin; a < end; ++a) {
    const double *s = rows.student(a), *t = rows.teacher(a), own = args.weight_of(a);
    for (int64_t b = 0; b < n; ++b) {
      const double slope = huber_slope(s[b] - t[b]);
      args.laplacian[a * n + b] = factor * distance_by_square(s[b], slope, own + args.weight_of(b), correction);
    }
  }
}

void diagonal(const LossArgs& args, int64_t begin, int64_t end) {
  const int64_t n = args.n;
  for (int64_t a = begin; a < end; ++a) {
    double* row = args.laplacian + a * n;
    row[a] = 0;
    double sum = 0;
    for (int64_t b = 0; b < n; ++b) sum += row[b];
    row[a] = -sum;
  }
}

}  // namespace
}  // namespace FASTKD_TARGET

const CpuKernels FASTKD_CPU_KERNELS = {partial_elements, scale,          copy_rows, direct_squares, pull,
                                       gram_squares,     sums,           planes,    angles,         angle_pairs,
                                       distances,        distance_pairs, diagonal};

}  // namespace fastkd::relational
