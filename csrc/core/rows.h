// Rows of a tensor to and from scratch memory in the accumulation type, padded with -inf to whole SIMD registers. A padded
// class is a masked class: its exponential is 0. So no loop between load and store has a tail.
#pragma once

#include <cstdint>

#include "core/exp_log.h"

namespace fastkd {
inline namespace FASTKD_TARGET {

// Asks for a row ahead of its use. The processor's own prefetcher stops at page borders, and rows of several tensors in
// turn are little else: without this, half of the time at [256, 1000] was spent waiting for the first lines of rows.
template <class T>
void prefetch_row(const T* row, int64_t n) {
  const char* line = reinterpret_cast<const char*>(row);
  for (int64_t byte = 0; byte < n * int64_t(sizeof(T)); byte += 64) __builtin_prefetch(line + byte);
}

// The maximum of the row, -inf for a row of NaN.
template <class T, class A>
A load_row(const T* from, int64_t n, int64_t padded, A* to) {
  A top = -kInf;
#pragma omp simd reduction(max : top)
  for (int64_t c = 0; c < n; ++c) {
    const A value = A(load_as(from[c]));
    to[c] = value;
    top = value > top ? value : top;
  }
  for (int64_t c = n; c < padded; ++c) to[c] = -kInf;
  return top;
}

template <class T, class A>
void store_row(const A* from, int64_t n, A factor, T* to) {
#pragma omp simd
  for (int64_t c = 0; c < n; ++c) store_as(to[c], from[c] * factor);
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
