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

template <class A>
FASTKD_HD A magnitude(A x) {
  return x < 0 ? -x : x;
}

}  // namespace FASTKD_TARGET
}  // namespace fastkd
