// What the CUDA kernels of multi_teacher receive: Args in the accumulation type, by value, so that it lies in constant
// memory and a loop over the teachers indexes it without a copy.
#pragma once

#include "core/vec.cuh"
#include "group_stats/op.h"
#include "multi_teacher/math.h"

namespace fastkd::multi_teacher {
inline namespace FASTKD_TARGET {

template <class A>
struct Params {
  int64_t rows, classes;
  int teachers;
  int64_t student_stride, teacher_stride[kMaxLaunchTeachers];
  const void *student, *teacher[kMaxLaunchTeachers];
  const int64_t* target;
  int64_t ignore_index;

  const A* weight;  // null: host_weight
  int64_t weight_stride_teacher, weight_stride_row;
  A host_weight[kMaxLaunchTeachers], inv_t[kMaxLaunchTeachers];
  Scale<A> scale[kMaxLaunchTeachers];
  int integer_t;  // 0 where the temperature is no small integer
  bool several_temperatures;
  Combine combine;
  A ce_weight, smoothing;
  bool need_grad, half_student;
  bool student_vectors, grad_vectors;
  unsigned teacher_vectors;  // a bit per teacher: its rows allow 16-byte accesses

  A *row_loss, *saved, *kl;
  void* grad;
  group_stats::Output stats;

  FASTKD_HD A weight_of(int k, int64_t row) const {
    return weight ? weight[k * weight_stride_teacher + row * weight_stride_row] : host_weight[k];
  }
  template <class S>
  FASTKD_HD const S* student_row(int64_t row) const {
    return static_cast<const S*>(student) + row * student_stride;
  }
  template <class T>
  FASTKD_HD const T* teacher_row(int k, int64_t row) const {
    return static_cast<const T*>(teacher[k]) + row * teacher_stride[k];
  }
  template <class S>
  FASTKD_HD S* grad_row(int64_t row) const {
    return static_cast<S*>(grad) + row * classes;
  }
  FASTKD_HD bool teacher_in_vectors(int k) const { return teacher_vectors >> k & 1u; }
};

template <class S, class T, class A>
Params<A> make_params(const Args& args) {
  constexpr int kWidth = kVector<S, T>;
  Params<A> p{};
  p.rows = args.rows;
  p.classes = args.classes;
  p.teachers = args.teachers;
  p.student = args.student;
  p.student_stride = args.student_stride;
  p.student_vectors = rows_aligned<kWidth>(args.student, args.student_stride, args.classes, sizeof(S));
  p.grad_vectors = rows_aligned<kWidth>(args.grad, args.classes, args.classes, sizeof(S));
  for (int k = 0; k < args.teachers; ++k) {
    p.teacher[k] = args.teacher[k];
    p.teacher_stride[k] = args.teacher_stride[k];
    p.teacher_vectors |=
        unsigned(rows_aligned<kWidth>(args.teacher[k], args.teacher_stride[k], args.classes, sizeof(T))) << k;
    p.host_weight[k] = args.host_weight ? A(args.host_weight[k]) : A(0);
    p.inv_t[k] = A(1 / args.temperature[k]);
    p.scale[k] = temperature_scale<A>(args.temperature[k], args.scale_by_t2);
  }
  p.target = args.target;
  p.ignore_index = args.ignore_index;
  p.weight = static_cast<const A*>(args.weight);
  p.weight_stride_teacher = args.weight_stride_teacher;
  p.weight_stride_row = args.weight_stride_row;
  p.integer_t = integer_temperature(args.temperature[0]);
  p.several_temperatures = args.several_temperatures;
  p.combine = args.combine;
  p.ce_weight = A(args.ce_weight);
  p.smoothing = A(args.label_smoothing);
  p.need_grad = args.need_grad;
  p.half_student = args.student_type == DType::f16;
  p.row_loss = static_cast<A*>(args.row_loss);
  p.saved = static_cast<A*>(args.saved);
  p.grad = args.grad;
  p.kl = static_cast<A*>(args.kl);
  p.stats = args.stats;
  return p;
}

}  // namespace FASTKD_TARGET
}  // namespace fastkd::multi_teacher
