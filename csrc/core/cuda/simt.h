// One CUDA kernel source, two compilers.
//
// nvcc: four macros over CUDA's own syntax, nothing else.
// g++ (C++20): the same source runs on the host, one block at a time, one fiber per CUDA thread, in an order that is
// chosen by number (simt::Settings::schedule) and repeats exactly. A kernel without races gives the same answer in
// every order. The scheduler is tests/simt/machine.cpp; only the tests compile and link it.
//
// What a kernel writes differently from plain CUDA:
//   SIMT_LAUNCH((kernel<T, 4>), grid, block, dynamic_shared_bytes, stream, args...);
//   SIMT_SHARED(T, name, n);          // __shared__ T name[n], aligned to at least 16 bytes
//   SIMT_DYNAMIC_SHARED(T, name);     // T* name: the launch's dynamic shared memory, aligned to 16 bytes
//   SIMT_ASSERT_ALIGNED(pointer, n);  // before a vector access; nothing under nvcc
// A type or kernel with a comma in it needs parentheses (kernel) or an alias (T). SIMT_SHARED leaves T's constructor
// out under both compilers: T must be trivial.
//
// The host run sees indexing, tails, missing barriers, divergent barriers and shuffles, uninitialised shared memory
// (NaN), writes outside of it, and, where the source is compiled with -fsanitize=thread (tests/simt/race.cpp), races in
// shared memory. It does not see speed, clusters, TMA, races in global memory, or progress: a block waits for no
// other block, so a kernel that spins on another block's flag never ends.
#pragma once

#ifdef __CUDACC__

#include <cuda_runtime.h>

#define SIMT_LAUNCH(kernel, grid, block, dynamic_bytes, stream, ...) kernel<<<grid, block, dynamic_bytes, stream>>>(__VA_ARGS__)
#define SIMT_SHARED(T, name, n) __shared__ alignas(16) alignas(T) T name[n]
// One declaration for all element types: `extern __shared__ T name[]` clashes when a second T uses the same name.
#define SIMT_DYNAMIC_SHARED(T, name)                             \
  extern __shared__ __align__(16) unsigned char simt_dynamic_[]; \
  static_assert(alignof(T) <= 16);                               \
  T* const name = reinterpret_cast<T*>(simt_dynamic_)
#define SIMT_ASSERT_ALIGNED(pointer, bytes) ((void)0)

#else

#include "simt/host/types.h"
#include "simt/host/machine.h"
#include "simt/host/runtime.h"
#include "simt/host/warp.h"
#include "simt/host/math.h"

// The kernel's name in an error is the macro's argument, without the parentheses that its commas need.
#define SIMT_LAUNCH(kernel, grid, block, dynamic_bytes, stream, ...) \
  ::simt::launch(#kernel, kernel, grid, block, dynamic_bytes, stream __VA_OPT__(, ) __VA_ARGS__)
// The static's address tells the call sites apart, and one template instantiation from another.
#define SIMT_SHARED(T, name, n) \
  static char simt_site_##name; \
  T(&name)[n] = ::simt::shared_array<T, n>(&simt_site_##name, #name)
#define SIMT_DYNAMIC_SHARED(T, name) \
  static_assert(alignof(T) <= 16);   \
  T* const name = static_cast<T*>(::simt::dynamic_shared(#name))
#define SIMT_ASSERT_ALIGNED(pointer, bytes) ::simt::check_aligned(pointer, bytes)

#endif
