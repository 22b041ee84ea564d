// A thread's part of a row in registers, moved in 16-byte accesses where the row allows them.
#pragma once

#include <cstdint>

#include "core/network.h"
#include "core/cuda/simt.h"

namespace fastkd {
inline namespace FASTKD_TARGET {

// What N elements must be aligned to: as much as an access moves, or 16 bytes where it takes several.
constexpr int vector_alignment(int n, int element_bytes) { return n * element_bytes < 16 ? n * element_bytes : 16; }

template <class T, int N>
struct alignas(vector_alignment(N, sizeof(T))) Vec {
  T v[N];
};

// The widest vector that both a row of S and a row of T can be read in with the same element order.
template <class S, class T>
constexpr int kVector = 16 / int(sizeof(S) > sizeof(T) ? sizeof(S) : sizeof(T));

template <class T, int N>
__device__ __forceinline__ Vec<T, N> load_vec(const T* from) {
  SIMT_ASSERT_ALIGNED(from, vector_alignment(N, sizeof(T)));
  return *reinterpret_cast<const Vec<T, N>*>(from);
}

// As bits, by an intrinsic: of a struct of small elements nvcc makes as many small stores.
template <class T, int N>
__device__ __forceinline__ void store_vec(T* to, const Vec<T, N>& value) {
  SIMT_ASSERT_ALIGNED(to, vector_alignment(N, sizeof(T)));
  if constexpr (sizeof(value) == 16)
    __stwb(reinterpret_cast<uint4*>(to), __builtin_bit_cast(uint4, value));
  else if constexpr (sizeof(value) == 8)
    __stwb(reinterpret_cast<uint2*>(to), __builtin_bit_cast(uint2, value));
  else
    *reinterpret_cast<Vec<T, N>*>(to) = value;
}

// Whether every row of a matrix may be read in vectors of N elements.
template <int N>
FASTKD_HD bool rows_aligned(const void* data, int64_t stride, int64_t classes, int element_bytes) {
  const int bytes = vector_alignment(N, element_bytes);
  return reinterpret_cast<uintptr_t>(data) % uintptr_t(bytes) == 0 && stride * element_bytes % bytes == 0 && classes % N == 0;
}

// The same of a network, wherever its rows lie.
template <int N>
FASTKD_HD bool rows_aligned(const Network& network, int64_t classes) {
  bool aligned = true;
  for (int d = 0; d < network.rows.dims; ++d)
    aligned &= rows_aligned<N>(network.data, network.rows.stride[d], classes, int(bytes_of(network.type)));
  return aligned;
}

// A row whose dtype is known at run time, and is the same for all threads of the row.
struct AnyRow {
  const void* data;
  DType type;
};

// row_offset() in a loop that stays one: unrolled, its 64-bit divisions would be a fifth of a kernel's code.
__device__ __forceinline__ int64_t device_row_offset(const RowLayout& rows, int64_t row) {
  int64_t at = 0;
#pragma unroll 1
  for (int d = rows.dims - 1; d > 0; --d) {
    const int64_t outer = row / rows.size[d];
    at += (row - outer * rows.size[d]) * rows.stride[d];
    row = outer;
  }
  return at + row * rows.stride[0];
}

__device__ __forceinline__ AnyRow any_row(const Network& network, int64_t row) {
  const char* data = static_cast<const char*>(network.data);
  return {data + device_row_offset(network.rows, row) * bytes_of(network.type), network.type};
}

// A row of a network that is of type T.
template <class T>
__device__ __forceinline__ const T* row_in_memory(const Network& network, int64_t row) {
  return static_cast<const T*>(network.data) + device_row_offset(network.rows, row);
}

// f(pointer to the row's elements).
template <class F>
__device__ __forceinline__ void visit(const AnyRow& row, const F& f) {
  switch (row.type) {
    case DType::f64: return f(static_cast<const double*>(row.data));
    case DType::f16: return f(static_cast<const Half*>(row.data));
    case DType::bf16: return f(static_cast<const BFloat16*>(row.data));
    default: return f(static_cast<const float*>(row.data));
  }
}

// Which class of a row item i of a thread is, in vectors of N: neighbouring threads have neighbouring vectors.
template <int N, class Index, class Thread>
__device__ __forceinline__ Index item_class(Index first, int i, int threads, Thread thread) {
  return first + (Index(i / N) * threads + thread) * N + i % N;
}

// Items from class `first` on; those past the row's end load as `pad`.
template <int Items, int N, class T, class A>
__device__ __forceinline__ void load_items(const T* row, int64_t first, int64_t classes, int threads, int thread, bool vectors,
                                           A pad, A (&to)[Items]) {
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

template <int Items, int N, class A>
__device__ __forceinline__ void load_items(const AnyRow& row, int64_t first, int64_t classes, int threads, int thread,
                                           bool vectors, A pad, A (&to)[Items]) {
  visit(row, [&](const auto* from) { load_items<Items, N>(from, first, classes, threads, thread, vectors, pad, to); });
}

template <class A, int N>
__device__ __forceinline__ A max_item(A top, const A (&x)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) top = x[i] > top ? x[i] : top;
  return top;
}

template <int Items, int N, class T, class A>
__device__ __forceinline__ void store_items(T* row, int64_t first, int64_t classes, int threads, int thread, bool vectors,
                                            const A (&from)[Items]) {
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
