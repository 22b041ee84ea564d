// A thread's part of a row in registers, moved in 16-byte accesses where the row allows them.
#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "core/simt.h"

namespace fastkd {
inline namespace FASTKD_TARGET {

template <class T, int N>
struct alignas(sizeof(T) * N) Vec {
  T v[N];
};

// The widest vector that both a row of S and a row of T can be read in with the same element order.
template <class S, class T>
constexpr int kVector = 16 / int(sizeof(S) > sizeof(T) ? sizeof(S) : sizeof(T));

template <class T, int N>
__device__ __forceinline__ Vec<T, N> load_vec(const T* from) {
  SIMT_ASSERT_ALIGNED(from, int(sizeof(T) * N));
  return *reinterpret_cast<const Vec<T, N>*>(from);
}

template <class T, int N>
__device__ __forceinline__ void store_vec(T* to, const Vec<T, N>& value) {
  SIMT_ASSERT_ALIGNED(to, int(sizeof(T) * N));
  *reinterpret_cast<Vec<T, N>*>(to) = value;
}

// Whether every row of a matrix starts at a multiple of N elements, and so may be read in vectors of N.
template <int N>
FASTKD_HD bool rows_aligned(const void* data, int64_t stride, int64_t classes, int element_bytes) {
  return reinterpret_cast<uintptr_t>(data) % uintptr_t(N * element_bytes) == 0 && stride % N == 0 && classes % N == 0;
}

// Which class of a row item i of a thread is, in vectors of N: neighbouring threads have neighbouring vectors.
template <int N, class Index, class Thread>
__device__ __forceinline__ Index item_class(Index first, int i, int threads, Thread thread) {
  return first + (Index(i / N) * threads + thread) * N + i % N;
}

// Items from class `first` on; those past the row's end load as `pad`.
template <int Items, int N, class T, class A>
__device__ __forceinline__ void load_items(const T* row, int64_t first, int64_t classes, int threads, int thread,
                                           bool vectors, A pad, A (&to)[Items]) {
  static_assert(Items % N == 0);
#pragma unroll
  for (int j = 0; j < Items / N; ++j) {
    const int64_t c = first + (int64_t(j) * threads + thread) * N;
    if (vectors && c < classes) {
      const Vec<T, N> part = load_vec<T, N>(row + c);
#pragma unroll
      for (int v = 0; v < N; ++v) to[j * N + v] = A(load_as(part.v[v]));
    } else {
#pragma unroll
      for (int v = 0; v < N; ++v) to[j * N + v] = c + v < classes ? A(load_as(row[c + v])) : pad;
    }
  }
}

template <class A, int N>
__device__ __forceinline__ A max_item(A top, const A (&x)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) top = x[i] > top ? x[i] : top;
  return top;
}

template <int Items, int N, class T, class A>
__device__ __forceinline__ void store_items(T* row, int64_t first, int64_t classes, int threads, int thread,
                                            bool vectors, const A (&from)[Items]) {
#pragma unroll
  for (int j = 0; j < Items / N; ++j) {
    const int64_t c = first + (int64_t(j) * threads + thread) * N;
    Vec<T, N> part;
#pragma unroll
    for (int v = 0; v < N; ++v) store_as(part.v[v], from[j * N + v]);
    if (vectors && c < classes) {
      store_vec<T, N>(row + c, part);
    } else {
#pragma unroll
      for (int v = 0; v < N; ++v)
        if (c + v < classes) row[c + v] = part.v[v];
    }
  }
}

}  // namespace FASTKD_TARGET
}  // namespace fastkd
