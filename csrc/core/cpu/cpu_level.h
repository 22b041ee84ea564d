// Which build of the CPU kernels runs on this processor: 1, 3 or 4 for x86-64, x86-64-v3 (AVX2) and x86-64-v4 (AVX-512).
#pragma once

namespace fastkd {

// Chosen once, when the library is loaded. FASTKD_CPU_LEVEL=1|3|4 in the environment asks for a lower one.
int cpu_level();

template <class Kernels>
const Kernels& for_cpu_level(const Kernels& level1, const Kernels& level3, const Kernels& level4) {
  const int level = cpu_level();
  return level >= 4 ? level4 : level >= 3 ? level3 : level1;
}

}  // namespace fastkd

#if defined(__x86_64__)
#define FASTKD_KERNELS_OF(op) ::fastkd::for_cpu_level(op::cpu_kernels_level1, op::cpu_kernels_level3, op::cpu_kernels_level4)
#else
#define FASTKD_KERNELS_OF(op) op::cpu_kernels_level1
#endif
