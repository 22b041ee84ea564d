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

// Teachers in the student's type, or in float32 beside a half-precision student.
template <class F>
void dispatch_pair(DType student, DType teacher, const F& f) {
  const bool same = student == teacher;
  switch (student) {
    case DType::f32: return f.template operator()<float, float, float>();
    case DType::f64: return f.template operator()<double, double, double>();
    case DType::f16:
      return same ? f.template operator()<Half, Half, float>() : f.template operator()<Half, float, float>();
    case DType::bf16:
      return same ? f.template operator()<BFloat16, BFloat16, float>() : f.template operator()<BFloat16, float, float>();
  }
}

}  // namespace FASTKD_TARGET
}  // namespace fastkd
