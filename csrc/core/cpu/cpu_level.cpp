#include "core/cpu/cpu_level.h"

#include <cstdlib>

namespace fastkd {
namespace {

int supported_level() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  // What x86-64-v3 and -v4 consist of; __builtin_cpu_supports("x86-64-v3") itself is refused by GCC 11.
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
                  __builtin_cpu_supports("bmi2");
  const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512vl");
  return v4 ? 4 : v3 ? 3 : 1;
#else
  return 1;
#endif
}

int chosen_level() {
  const int supported = supported_level();
  const char* asked = std::getenv("FASTKD_CPU_LEVEL");
  if (!asked || !*asked) return supported;
  const int level = std::atoi(asked);
  return level < supported ? (level >= 3 ? 3 : 1) : supported;
}

}  // namespace

int cpu_level() {
  static const int level = chosen_level();
  return level;
}

}  // namespace fastkd

extern "C" __attribute__((visibility("default"))) int fastkd_cpu_level() { return fastkd::cpu_level(); }
