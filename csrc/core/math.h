// Elementary functions in float and double, for CPU and CUDA. Those of C, not std::log: an inline function of the standard
// library could leak from one CPU level into another.
#pragma once

#include <math.h>

#include "core/config.h"

namespace fastkd {
inline namespace FASTKD_TARGET {

FASTKD_HD float natural_log(float x) { return ::logf(x); }
FASTKD_HD double natural_log(double x) { return ::log(x); }

FASTKD_HD float square_root(float x) { return ::sqrtf(x); }
FASTKD_HD double square_root(double x) { return ::sqrt(x); }

// a * b in a rounding of its own, where CUDA's compiler would fuse it with a following sum: two networks must go through the
// same roundings for equal ones to be 0 apart. The host build of the CUDA kernels may fuse too (tests/simt/build.py).
#if defined(__CUDA_ARCH__)
FASTKD_HD float rounded_product(float a, float b) { return __fmul_rn(a, b); }
FASTKD_HD double rounded_product(double a, double b) { return __dmul_rn(a, b); }
#else
template <class A>
FASTKD_HD A rounded_product(A a, A b) {
  A product = a * b;
#if defined(FASTKD_BACKEND_SIMT) && defined(__FMA__)
  asm("" : "+x"(product));
#endif
  return product;
}
#endif

template <class A>
FASTKD_HD A magnitude(A x) {
  return x < 0 ? -x : x;
}

}  // namespace FASTKD_TARGET
}  // namespace fastkd
