// Rows of a tensor to and from scratch memory in the accumulation type, padded with -inf to whole SIMD registers. A padded
// class is a masked class: its exponential is 0. So no loop between load and store has a tail.
#pragma once

#include <cstdint>

#include "core/exp_log.h"
#include "core/network.h"

namespace fastkd {
inline namespace FASTKD_TARGET {

constexpr int64_t kLane = 16;  // floats of an AVX-512 register: the unit that rows are padded to

FASTKD_HD int64_t padded_length(int64_t n) { return (n + kLane - 1) / kLane * kLane; }

// Asks for a row ahead of its use. The processor's own prefetcher stops at page borders, and rows of several tensors in
// turn are little else: without this, half of the time at [256, 1000] was spent waiting for the first lines of rows.
template <class T>
void prefetch_row(const T* row, int64_t n) {
  const char* line = reinterpret_cast<const char*>(row);
  for (int64_t byte = 0; byte < n * int64_t(sizeof(T)); byte += 64) __builtin_prefetch(line + byte);
}

// Calls block(first, n) over [0, n) in blocks of kLane. The last one overlaps the one before where n is no multiple:
// loading or storing a few classes twice is cheaper than a scalar tail.
template <class F>
FASTKD_HD void for_blocks(int64_t n, const F& block) {
  const int64_t whole = n / kLane * kLane;
  if (whole > 0) block(0, whole);
  if (whole > 0 && whole < n) block(n - kLane, int64_t(kLane));
  if (whole == 0) block(0, n);
}

// The maximum of the row, -inf for a row of NaN. to [padded_length(n)] gets -inf past the end.
template <class T, class A>
A load_row(const T* from, int64_t n, int64_t padded, A* to) {
  A top = -kInf;
  for (int64_t c = padded - kLane; c < padded; ++c) to[c] = -kInf;
  for_blocks(n, [&](int64_t first, int64_t count) {
    const T* f = from + first;
    A* t = to + first;
    A most = -kInf;
#pragma omp simd reduction(max : most)
    for (int64_t c = 0; c < count; ++c) {
      const A value = A(load_as(f[c]));
      t[c] = value;
      most = value > most ? value : most;
    }
    top = most > top ? most : top;
  });
  return top;
}

// load_row() of a network of any dtype, converted on the way.
template <class A>
A load_row(const Network& from, int64_t row, int64_t n, int64_t padded, A* to) {
  switch (from.type) {
    case DType::f64: return load_row(row_of<double>(from, row), n, padded, to);
    case DType::f16: return load_row(row_of<Half>(from, row), n, padded, to);
    case DType::bf16: return load_row(row_of<BFloat16>(from, row), n, padded, to);
    default: return load_row(row_of<float>(from, row), n, padded, to);
  }
}

inline void prefetch_row(const Network& from, int64_t row, int64_t n) {
  const int64_t bytes = bytes_of(from.type);
  prefetch_row(static_cast<const char*>(from.data) + row_offset(from.rows, row) * bytes, n * bytes);
}

// to = from * factor; `to` is other memory than `from`.
template <class T, class A>
void store_row(const A* from, int64_t n, A factor, T* to) {
  for_blocks(n, [&](int64_t first, int64_t count) {
    const A* f = from + first;
    T* t = to + first;
#pragma omp simd
    for (int64_t c = 0; c < count; ++c) store_as(t[c], f[c] * factor);
  });
}

template <class T, class A>
void fill_row(T* to, int64_t n, A value) {
  for (int64_t c = 0; c < n; ++c) store_as(to[c], value);
}

template <class A>
A* aligned_scratch(void* scratch) {
  return reinterpret_cast<A*>((reinterpret_cast<uintptr_t>(scratch) + 63) / 64 * 64);
}

}  // namespace FASTKD_TARGET
}  // namespace fastkd
