// From run-time dtypes to template arguments, with a C++20 template lambda: f.template operator()<Student, Teacher, A>().
#pragma once

#include "core/dtype.h"

namespace fastkd {
inline namespace FASTKD_TARGET {

template <class F>
void dispatch(DType type, const F& f) {
  switch (type) {
    case DType::f32: return f.template operator()<float, float>();
    case DType::f64: return f.template operator()<double, double>();
    case DType::f16: return f.template operator()<Half, float>();
    case DType::bf16: return f.template operator()<BFloat16, float>();
  }
}

}  // namespace FASTKD_TARGET
}  // namespace fastkd
