// Small kernels, each with a switch that breaks it, to test what a run on the host sees. nvcc compiles them too.
#pragma once

#include <cstdint>

#include "core/cuda/simt.h"
#include "simt/selftest.h"

namespace selftest {

// Sum of a row of x [rows, n] by one block. Without the barrier, warp 0 can read sums that are not yet there.
template <bool with_barrier>
__global__ void __launch_bounds__(1024) block_sum(const float* __restrict__ x, float* __restrict__ out, int n) {
  SIMT_SHARED(float, part, 32);
  const float* row = x + static_cast<int64_t>(blockIdx.x) * n;
  float sum = 0;
  for (int i = threadIdx.x; i < n; i += blockDim.x) sum += row[i];
  const unsigned lanes = blockDim.x - threadIdx.x / 32 * 32;
  const unsigned mask = lanes >= 32 ? 0xffffffffu : (1u << lanes) - 1;
  for (int offset = 16; offset > 0; offset /= 2) {
    const float other = __shfl_down_sync(mask, sum, offset);
    if ((threadIdx.x & 31) + offset < 32 && threadIdx.x + offset < blockDim.x) sum += other;
  }
  if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = sum;
  if constexpr (with_barrier) __syncthreads();
  if (threadIdx.x == 0) {
    sum = 0;
    for (unsigned w = 0; w < (blockDim.x + 31) / 32; ++w) sum += part[w];
    out[blockIdx.x] = sum;
  }
}

// Each lane passes its value on through shared memory; without __syncwarp() the neighbour may not have written.
template <bool with_sync>
__global__ void warp_rotate(const int* x, int* out) {
  SIMT_SHARED(int, slot, 32);
  slot[threadIdx.x] = x[threadIdx.x];
  if constexpr (with_sync) __syncwarp();
  out[threadIdx.x] = slot[(threadIdx.x + 1) % 32];
}

// Prefix sums in place. Without the barrier a thread can read what its neighbour has already added to.
template <bool with_barrier>
__global__ void scan(const int* x, int* out) {
  SIMT_SHARED(int, s, 256);
  const int t = threadIdx.x, n = blockDim.x;
  s[t] = x[t];
  __syncthreads();
  for (int offset = 1; offset < n; offset *= 2) {
    const int add = t >= offset ? s[t - offset] : 0;
    if constexpr (with_barrier) __syncthreads();
    s[t] += add;
    __syncthreads();
  }
  out[t] = s[t];
}

template <int>
__global__ void empty() {}

__device__ inline void shuffle_fault(Fault fault, float* out) {
  const unsigned t = threadIdx.x;
  unsigned mask = 0xffffffffu;
  int width = 32;
  if (fault == Fault::deadlock && t == 5) return;
  if (fault == Fault::lane_not_in_mask && t == 3) mask &= ~8u;
  if (fault == Fault::other_mask && t == 3) mask = 0xfu;
  if (fault == Fault::bad_width) width = 12;
  if (fault == Fault::other_operation && t == 4)
    out[t] = __shfl_down_sync(mask, out[t], 1);
  else
    out[t] = __shfl_xor_sync(mask, out[t], 1, width);
}

#ifndef __CUDACC__
inline int destroyed = 0;
struct Counted {
  ~Counted() { ++destroyed; }
};
#endif

__global__ void faulty(Fault fault, float* out) {
  SIMT_DYNAMIC_SHARED(float, dynamic);
  SIMT_SHARED(float, fixed, 16);
  const unsigned t = threadIdx.x;
  dynamic[t] = 0;
  if (t < 16) fixed[t] = 0;
#ifndef __CUDACC__
  Counted counted;
  if (fault == Fault::exception && t == 7) throw std::logic_error("thrown by a kernel");
  if (fault == Fault::nested_launch) SIMT_LAUNCH((empty<0>), 1, 1, 0, nullptr);
#endif
  if (fault == Fault::past_dynamic && t == 9) dynamic[blockDim.x] = 1;
  if (fault == Fault::before_dynamic && t == 9) dynamic[-1] = 1;
  if (fault == Fault::past_static && t == 9) fixed[16] = 1;
  if (fault == Fault::exit_before_barrier && t == 40) return;
  if (fault == Fault::divergent_barrier && t == 33) __syncthreads();
  __syncthreads();
  if (fault == Fault::barrier_after_exit && t != 1) return;
  if (fault == Fault::barrier_after_exit) __syncthreads();
  if (fault == Fault::exited_lane && t == 5) return;
  shuffle_fault(fault, out);
  __syncthreads();
  out[t] += dynamic[t] + fixed[t % 16];
}

#ifndef __CUDACC__
__global__ void large_static(float* out) {
  SIMT_SHARED(float, large, 12288);
  SIMT_SHARED(float, one_more, 1);
  out[0] = large[0] + one_more[0];
}
#endif

// Three arrays of one kernel, one of a second instantiation, filled by different threads, and read back.
template <int n>
__global__ void arrays(int* out) {
  SIMT_SHARED(int, a, n);
  SIMT_SHARED(int, b, n);
  SIMT_SHARED(double, c, n);
  const int t = threadIdx.x;
  a[t] = t;
  b[t] = 1000 + t;
  c[t] = 2000 + t;
  __syncthreads();
  const int other = n - 1 - t;
  out[t] = a[other] == other && b[other] == 1000 + other && c[other] == 2000 + other;
}

// What shared memory holds before anyone writes: [static, dynamic] per block; then leaves other values behind.
__global__ void uninitialised(float* out) {
  SIMT_SHARED(float, fixed, 4);
  SIMT_DYNAMIC_SHARED(float, dynamic);
  out[2 * blockIdx.x] = fixed[3];
  out[2 * blockIdx.x + 1] = dynamic[3];
  fixed[3] = dynamic[3] = 1;
}

__global__ void vector_copy(const float* from, float* to) {
  SIMT_ASSERT_ALIGNED(from, 16);
  reinterpret_cast<float4*>(to)[threadIdx.x] = reinterpret_cast<const float4*>(from)[threadIdx.x];
}
// As vector_copy, but nothing is asserted.
__global__ void bare_vector_copy(const float* from, float* to) {
  reinterpret_cast<float4*>(to)[threadIdx.x] = reinterpret_cast<const float4*>(from)[threadIdx.x];
}

// The shuffles of a block's values; out [4, threads]. All lanes of the warps that there are take part.
template <class T>
__global__ void shuffles(const T* x, T* out, int argument, int width) {
  const unsigned t = threadIdx.x, n = blockDim.x;
  out[t] = __shfl_sync(0xffffffffu, x[t], argument, width);
  out[n + t] = __shfl_up_sync(0xffffffffu, x[t], argument, width);
  out[2 * n + t] = __shfl_down_sync(0xffffffffu, x[t], argument, width);
  out[3 * n + t] = __shfl_xor_sync(0xffffffffu, x[t], argument, width);
}

// Half-warps with masks of their own; out [12, threads].
__global__ void votes(const int* x, int* out) {
  const unsigned t = threadIdx.x, n = blockDim.x, mask = t % 32 < 16 ? 0x0000ffffu : 0xffff0000u;
  const int v = x[t];
  int row = 0;
  const auto put = [&](int value) { out[row++ * n + t] = value; };
  put(static_cast<int>(__ballot_sync(mask, v > 0)));
  put(__any_sync(mask, v > 0));
  put(__all_sync(mask, v > 0));
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  put(__reduce_add_sync(mask, v));
  put(__reduce_min_sync(mask, v));
  put(__reduce_max_sync(mask, v));
  put(static_cast<int>(__reduce_and_sync(mask, static_cast<unsigned>(v))));
  put(static_cast<int>(__reduce_or_sync(mask, static_cast<unsigned>(v))));
  put(static_cast<int>(__reduce_xor_sync(mask, static_cast<unsigned>(v))));
#endif
  put(__syncthreads_count(v > 0));
  put(__syncthreads_and(v > 0));
  put(__syncthreads_or(v > 0));
}

struct Totals {
  int sum;
  unsigned count;
  unsigned long long wide;
  float real;
  int greatest, least;
  unsigned wrapped;
  int swapped;
};

__global__ void atomics(const int* x, Totals* totals, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  atomicAdd(&totals->sum, x[i]);
  atomicAdd(&totals->count, 1);
  atomicAdd(&totals->wide, static_cast<unsigned long long>(i) << 32);
  atomicAdd(&totals->real, 0.5f);
  atomicMax(&totals->greatest, x[i]);
  atomicMin(&totals->least, x[i]);
  atomicInc(&totals->wrapped, 9);
  for (int old = totals->swapped, seen; (seen = atomicCAS(&totals->swapped, old, old + 1)) != old;) old = seen;
  __threadfence();
}

// Counts of x modulo 4, added up in shared memory, by atomics or by racing increments.
template <bool atomic>
__global__ void histogram(const int* x, int* out) {
  SIMT_SHARED(int, count, 4);
  if (threadIdx.x < 4) count[threadIdx.x] = 0;
  __syncthreads();
  if constexpr (atomic)
    atomicAdd(&count[x[threadIdx.x] % 4], 1);
  else
    count[x[threadIdx.x] % 4] += 1;
  __syncthreads();
  if (threadIdx.x < 4) out[threadIdx.x] = count[threadIdx.x];
}

// Where each thread stands; out [blocks, threads, 6].
__global__ void indices(int* out) {
  const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  int* mine = out + (block * blockDim.x * blockDim.y * blockDim.z + thread) * 6;
  mine[0] = threadIdx.x;
  mine[1] = threadIdx.y;
  mine[2] = threadIdx.z;
  mine[3] = blockIdx.x;
  mine[4] = blockIdx.y;
  mine[5] = blockIdx.z;
}

// `steps` barriers or shuffles a thread, to time a switch.
__global__ void barriers(int steps) {
  for (int i = 0; i < steps; ++i) __syncthreads();
}
__global__ void exchanges(int steps, int* out) {
  int v = threadIdx.x;
  for (int i = 0; i < steps; ++i) v += __shfl_xor_sync(0xffffffffu, v, 1);
  out[threadIdx.x] = v;
}

// Plain functions that kernels use; out [16].
__global__ void functions(float x, unsigned bits, float* out) {
  int i = 0;
  out[i++] = __expf(x);
  out[i++] = exp2f(x);
  out[i++] = __logf(x);
  out[i++] = rsqrtf(x);
  out[i++] = fmaxf(x, 2.0f);
  out[i++] = __fdividef(x, 4.0f);
  out[i++] = fmaf(x, x, 1.0f);
  out[i++] = __saturatef(x);
  out[i++] = static_cast<float>(__popc(bits));
  out[i++] = static_cast<float>(__ffs(static_cast<int>(bits)));
  out[i++] = static_cast<float>(__clz(static_cast<int>(bits)));
  out[i++] = static_cast<float>(__brev(bits) >> 16);
  out[i++] = static_cast<float>(min(static_cast<int>(bits), 7));
  out[i++] = max(x, 0.25f);
  out[i++] = __ldg(&out[0]);
  __stcs(&out[i], __int_as_float(__float_as_int(x)));
}

}  // namespace selftest
