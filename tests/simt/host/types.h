// CUDA's qualifiers and built-in vector types, for g++. Included by csrc/core/cuda/simt.h only.
#pragma once

#include <cstdint>

#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __launch_bounds__(...)
#define __forceinline__ inline
#define __align__(n) __attribute__((aligned(n)))

#define SIMT_VECTORS(name, T, a1, a2, a4)                            \
  struct name##1 { T x; };                                           \
  struct alignas(a2) name##2 { T x, y; };                            \
  struct alignas(a1) name##3 { T x, y, z; };                         \
  struct alignas(a4) name##4 { T x, y, z, w; };                      \
  inline name##1 make_##name##1(T x) { return {x}; }                 \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; }         \
  inline name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; } \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }

SIMT_VECTORS(char, signed char, 1, 2, 4)
SIMT_VECTORS(uchar, unsigned char, 1, 2, 4)
SIMT_VECTORS(short, short, 2, 4, 8)
SIMT_VECTORS(ushort, unsigned short, 2, 4, 8)
SIMT_VECTORS(int, int, 4, 8, 16)
SIMT_VECTORS(uint, unsigned int, 4, 8, 16)
SIMT_VECTORS(float, float, 4, 8, 16)
// CUDA's 8-byte elements in fours are aligned to 16, not 32: no access is wider than 16 bytes.
SIMT_VECTORS(longlong, long long, 8, 16, 16)
SIMT_VECTORS(ulonglong, unsigned long long, 8, 16, 16)
SIMT_VECTORS(double, double, 8, 16, 16)
#undef SIMT_VECTORS

struct dim3 {
  unsigned int x, y, z;
  constexpr dim3(unsigned int x = 1, unsigned int y = 1, unsigned int z = 1) : x(x), y(y), z(z) {}
  constexpr dim3(uint3 v) : x(v.x), y(v.y), z(v.z) {}
};

// What the running CUDA thread reads of itself; the scheduler sets them at every switch.
// constinit: a plain load, no call of a thread_local initialiser.
extern constinit thread_local uint3 threadIdx;
extern constinit thread_local uint3 blockIdx;
extern constinit thread_local uint3 blockDim;
extern constinit thread_local uint3 gridDim;
inline constexpr int warpSize = 32;
