// Which build a source is in: one of the CPU levels, CUDA, or the CUDA kernels on the host. Code of one CPU level lives in
// a namespace of its own, so that the linker can never pick, say, an AVX-512 copy of an inline function for an older CPU.
#pragma once

#if defined(FASTKD_CPU_LEVEL) && FASTKD_CPU_LEVEL == 4
#define FASTKD_TARGET level4
#define FASTKD_CPU_KERNELS cpu_kernels_level4
#elif defined(FASTKD_CPU_LEVEL) && FASTKD_CPU_LEVEL == 3
#define FASTKD_TARGET level3
#define FASTKD_CPU_KERNELS cpu_kernels_level3
#elif defined(FASTKD_CPU_LEVEL)
#define FASTKD_TARGET level1
#define FASTKD_CPU_KERNELS cpu_kernels_level1
#else
#define FASTKD_TARGET unleveled
#endif

#if defined(__CUDACC__)
#define FASTKD_HD __host__ __device__ __forceinline__
#else
#define FASTKD_HD inline __attribute__((always_inline))
#endif
