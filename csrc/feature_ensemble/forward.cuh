// The norms, then the distances: a group that is one piece of memory by a warp or a block, columns side by side by threads.
#pragma once

#include "core/cuda/block.cuh"
#include "feature_ensemble/launch.cuh"

namespace fastkd::feature_ensemble {
inline namespace FASTKD_TARGET {

// One tile of a row of both maps in registers, with zeros past the end.
template <class A, int kItems>
struct Tile {
  A a[kItems], b[kItems];
};

template <class S, class T, class A, class Policy>
struct Row {
  const PairParams<A>& pair;
  const S* student;  // the row's first element
  Source<T> teacher;  // from the sample's first element on where it is transposed, else from the row's
  unsigned start, length;

  __device__ __forceinline__ void load(unsigned first, int thread, Tile<A, Policy::kItems>& tile) const {
    constexpr int kItems = Policy::kItems, kWidth = kVector<S, T>;
    load_items<kItems, kWidth>(student, first, length, Policy::kThreads, thread, pair.student_vectors, A(0), tile.a);
    if (!pair.transposed) {
      teacher.template items<kItems, kWidth>(first, length, Policy::kThreads, thread, pair.teacher_vectors, tile.b);
      return;
    }
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const unsigned c = item_class<kWidth>(first, i, Policy::kThreads, thread);
      tile.b[i] = c < length ? teacher.template load<A>(teacher_index(pair, start + c)) : A(0);
    }
  }
};

template <class A, int kItems>
__device__ __forceinline__ Numbers<A, 2> sum_of_squares(Numbers<A, 2> sums, const Tile<A, kItems>& tile, A scale_a, A scale_b) {
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const A a = tile.a[i] * scale_a, b = tile.b[i] * scale_b;
    sums.v[0] += a * a;
    sums.v[1] += b * b;
  }
  return sums;
}

template <class A>
__device__ __forceinline__ Numbers<A, 2> larger(const Numbers<A, 2>& x, const Numbers<A, 2>& y) {
  return {{x.v[0] < y.v[0] ? y.v[0] : x.v[0], x.v[1] < y.v[1] ? y.v[1] : x.v[1]}};
}

// {sum of |u|^p, sum of its slope times a'} and one more element.
template <class A>
__device__ __forceinline__ void add_difference(Numbers<A, 2>& sums, const Factors<A>& f, int p, A a, A b) {
  const A u = f.difference(a, b);
  sums.v[0] += p == 1 ? power<1>(u) : power<2>(u);
  sums.v[1] += p == 1 ? slope_times<1>(u, a * f.scale_a) : slope_times<2>(u, a * f.scale_a);
}

// Distance and state of a finished group, by one thread.
template <class A>
__device__ __forceinline__ void finish_group(const Params<A>& p, int64_t group, const Factors<A>& f, A squares_a,
                                             const Numbers<A, 2>& sums) {
  p.distance[group] = distance_of(p.p, f.inverse, sums.v[0]);
  save_state(p.state, p.total_groups, group, f, squares_a, inner_of(p.p, f.inverse, sums.v[1]));
}

// Blocks of a multiprocessor: two of 512 threads, which one register more than 64 would forbid; a double needs them.
template <class A, class Policy>
constexpr int kRowBlocks = sizeof(A) == 4 && Policy::kBlock == 512 ? 2 : 1;

template <class S, class T, class A, class Policy>
__global__ void __launch_bounds__(Policy::kBlock, (kRowBlocks<A, Policy>)) rows_kernel(const __grid_constant__ Params<A> p) {
  using Threads = RowThreads<A, Policy::kThreads>;
  SIMT_SHARED(A, buffer, 2 * Threads::kWarps * Threads::kMost);
  Threads threads{int(threadIdx.x) % Policy::kThreads, 0, buffer};
  const Work work = work_of(p);
  const PairParams<A>& pair = p.pair[work.pair];
  const int64_t index = work.block * Policy::kRows + threadIdx.x / Policy::kThreads;  // of the group in its pair
  if (index >= p.samples * pair.groups) return;  // whole warps: a row of less than a block needs no barrier
  const int64_t b = index / pair.groups;
  if (p.skips(work.pair, b)) {  // the same for all threads of the row
    if (threads.thread == 0) p.distance[pair.first_group + index] = 0;
    return;
  }
  const unsigned length = pair.group == Group::all ? pair.outer * pair.inner : pair.inner;
  const unsigned start = unsigned(index % pair.groups) * length;
  const Source<T> teacher(pair.teacher, pair.teacher_type, b * pair.teacher_stride + (pair.transposed ? 0 : start));
  const Row<S, T, A, Policy> row{pair, static_cast<const S*>(pair.student) + b * pair.student_stride + start, teacher, start,
                                 length};
  Tile<A, Policy::kItems> tile;
  const auto all_tiles = [&](const auto& use) {
    for (unsigned first = 0; first < length; first += Policy::kTile) {
      row.load(first, threads.thread, tile);
      use();
    }
  };

  A scale_a = 1, scale_b = 1;
  Numbers<A, 2> squares{{0, 0}};
  all_tiles([&] { squares = sum_of_squares(squares, tile, A(1), A(1)); });
  squares = threads.sum(squares);
  if (!is_safe(squares.v[0]) || !is_safe(squares.v[1])) {  // the same for all threads of the row
    Numbers<A, 2> top{{0, 0}};
    all_tiles([&] {
#pragma unroll
      for (int i = 0; i < Policy::kItems; ++i) top = larger(top, Numbers<A, 2>{{magnitude(tile.a[i]), magnitude(tile.b[i])}});
    });
    top = threads.reduce(top, larger<A>);
    scale_a = scale_of(top.v[0]);
    scale_b = scale_of(top.v[1]);
    squares = {{0, 0}};
    all_tiles([&] { squares = sum_of_squares(squares, tile, scale_a, scale_b); });
    squares = threads.sum(squares);
  }

  // From the last tile, which is still in registers, to the first: what was read last is the likeliest in the cache.
  const Factors<A> f = make_factors(scale_a, squares.v[0], scale_b, squares.v[1]);
  Numbers<A, 2> sums{{0, 0}};
  const unsigned last = (length - 1) / Policy::kTile * Policy::kTile;
  for (unsigned first = last;; first -= Policy::kTile) {
    if (first != last) row.load(first, threads.thread, tile);
#pragma unroll
    for (int i = 0; i < Policy::kItems; ++i) add_difference(sums, f, p.p, tile.a[i], tile.b[i]);
    if (first == 0) break;
  }
  sums = threads.sum(sums);
  if (threads.thread == 0) finish_group(p, pair.first_group + index, f, squares.v[0], sums);
}

constexpr int kColumns = 32, kSlices = 8;  // of a block: neighbouring columns, and parts of their length

// Sums {x, y} over the slices of a column, in the same order for every thread.
template <class A>
__device__ __forceinline__ Numbers<A, 2> over_slices(const Numbers<A, 2>& mine, A (&shared)[2 * kColumns * kSlices],
                                                     bool maximum) {
  const int lane = threadIdx.x % kColumns;
  __syncthreads();  // what was read of the sums before
  shared[2 * threadIdx.x] = mine.v[0];
  shared[2 * threadIdx.x + 1] = mine.v[1];
  __syncthreads();
  Numbers<A, 2> all{{0, 0}};
#pragma unroll
  for (int slice = 0; slice < kSlices; ++slice) {
    const Numbers<A, 2> part{{shared[2 * (slice * kColumns + lane)], shared[2 * (slice * kColumns + lane) + 1]}};
    all = maximum ? larger(all, part) : Numbers<A, 2>{{all.v[0] + part.v[0], all.v[1] + part.v[1]}};
  }
  return all;
}

// Blocks of a multiprocessor. Teachers of any dtype need more than 40 registers, which is what ptxas aims at for sm_120.
template <class T>
constexpr int kColumnBlocks = 0;
template <>
constexpr int kColumnBlocks<AnyType> = 5;

// The columns of all of a pair's samples are numbered through: neighbouring lanes read neighbouring elements.
template <class S, class T, class A>
__global__ void __launch_bounds__(kColumns* kSlices, kColumnBlocks<T>) columns_kernel(const __grid_constant__ Params<A> p) {
  SIMT_SHARED(A, shared, 2 * kColumns * kSlices);
  const Work work = work_of(p);
  const PairParams<A>& pair = p.pair[work.pair];
  const int64_t index = work.block * kColumns + threadIdx.x % kColumns;
  const bool exists = index < p.samples * pair.inner;
  const int64_t b = exists ? index / pair.inner : 0;
  const bool inside = exists && !p.skips(work.pair, b);
  const unsigned column = exists ? unsigned(index % pair.inner) : 0, slice = threadIdx.x / kColumns;
  const S* student = static_cast<const S*>(pair.student) + b * pair.student_stride + column;
  const Source<T> teacher(pair.teacher, pair.teacher_type,
                          b * pair.teacher_stride + (pair.transposed ? column * pair.outer : column));
  const unsigned step = pair.transposed ? 1 : pair.inner, outer = inside ? pair.outer : 0;
  const auto all_elements = [&](const auto& use) {
#pragma unroll 4
    for (unsigned o = slice; o < outer; o += kSlices)
      use(A(load_as(student[o * pair.inner])), teacher.template load<A>(o * step));
  };

  A scale_a = 1, scale_b = 1;
  Numbers<A, 2> squares{{0, 0}};
  const auto add_squares = [&](A a, A b) {
    squares.v[0] += a * scale_a * (a * scale_a);
    squares.v[1] += b * scale_b * (b * scale_b);
  };
  all_elements(add_squares);
  squares = over_slices(squares, shared, false);
  const bool safe = !inside || (is_safe(squares.v[0]) && is_safe(squares.v[1]));
  if (__syncthreads_or(!safe)) {
    Numbers<A, 2> top{{0, 0}};
    all_elements([&](A a, A b) { top = larger(top, Numbers<A, 2>{{magnitude(a), magnitude(b)}}); });
    top = over_slices(top, shared, true);
    scale_a = safe ? A(1) : scale_of(top.v[0]);  // a column alone decides: its result does not depend on its neighbours
    scale_b = safe ? A(1) : scale_of(top.v[1]);
    squares = {{0, 0}};
    all_elements(add_squares);
    squares = over_slices(squares, shared, false);
  }
  const Factors<A> f = make_factors(scale_a, squares.v[0], scale_b, squares.v[1]);
  Numbers<A, 2> sums{{0, 0}};
  all_elements([&](A a, A b) { add_difference(sums, f, p.p, a, b); });
  sums = over_slices(sums, shared, false);
  if (slice != 0 || !exists) return;
  if (inside)
    finish_group(p, pair.first_group + index, f, squares.v[0], sums);
  else
    p.distance[pair.first_group + index] = 0;
}

}  // namespace FASTKD_TARGET
}  // namespace fastkd::feature_ensemble
