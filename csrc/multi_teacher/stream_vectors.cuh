// What the kernels of long rows in whole vectors share (stream_rows.cuh, stream_gradient.cuh): all networks in the student's
// dtype, float or shorter, and on 16-byte borders; combine="losses" at one temperature, four teachers at a time; labels that
// are classes, without smoothing. streaming.cuh takes everything else, from and to the same states.
#pragma once

#include "core/cuda/exponents.cuh"
#include "core/cuda/vectors.cuh"
#include "multi_teacher/launch.cuh"

namespace fastkd::multi_teacher {
inline namespace FASTKD_TARGET {

constexpr int kVectorThreads = 256, kVectorTeachers = 4;

// More teachers come in groups.
inline unsigned groups_of(int teachers) {
  return teachers <= kVectorTeachers ? 1 : unsigned(teachers + kVectorTeachers - 1) / kVectorTeachers;
}

template <class A>
__device__ __forceinline__ Exponents exponents_of(const Params<A>& p) {
  return make_exponents(p.inv_t[0], p.integer_t);
}

// A row's networks. A place without a teacher repeats the student, whose cached vectors cost no traffic; what comes of it is
// dropped.
template <int K>
struct RowOf {
  const void *student, *teacher[K];
  int slot[K];  // which teacher, or kNoTeacher
};

template <int K, class A>
__device__ __forceinline__ RowOf<K> row_of_vectors(const Params<A>& p, int64_t row, unsigned group = 0) {
  RowOf<K> at;
  at.student = any_row(p.network[0], row).data;
  unsigned rest = p.reads_of(row);
#pragma unroll 1
  for (unsigned before = group * K; before > 0; --before) rest &= rest - 1;
#pragma unroll
  for (int k = 0; k < K; ++k) {
    at.slot[k] = rest ? __ffs(int(rest)) - 1 : kNoTeacher;
    at.teacher[k] = rest ? any_row(p.network[at.slot[k] + 1], row).data : at.student;
    rest &= rest - 1;
  }
  return at;
}

template <int K>
struct Vectors {
  uint4 student, teacher[K];
};

template <int K>
__device__ __forceinline__ Vectors<K> load_vectors(const RowOf<K>& row, unsigned vector) {
  Vectors<K> loaded;
  loaded.student = load_raw(row.student, vector);
#pragma unroll
  for (int k = 0; k < K; ++k) loaded.teacher[k] = load_raw(row.teacher[k], vector);
  return loaded;
}

// Calls f(vector, its contents) for this thread's vectors from `begin` to `end`, the next one's loads in flight meanwhile.
template <int K, class F>
__device__ __forceinline__ void over_vectors(const RowOf<K>& row, unsigned begin, unsigned end, const F& f) {
  run_vectors<kVectorThreads, true>(begin, end, [&](unsigned vector) { return load_vectors(row, vector); }, f);
}

// So many rows make two rounds of blocks on the largest GPUs; fewer are split.
constexpr int64_t kWholeRows = 1056;

// Parts of a row for `blocks` blocks in all, where rows are few, with at least two vectors of a thread in each.
template <class S>
unsigned parts_of_row(const Args& args, int64_t blocks) {
  constexpr int64_t kLeast = 2 * kVectorThreads * kRawItems<S>;
  return parts_for_blocks(args.rows, blocks, args.classes / kLeast);
}

// f(dtype, places for teachers, AtOne) as template arguments, for what these kernels take.
template <class S, class F>
bool with_vectors(const Args& args, const F& f) {
  bool fits = sizeof(S) <= sizeof(float) && args.combine == Combine::losses && args.divergence == Divergence::forward &&
              !args.softcap && !args.several_temperatures && !args.soft.data &&
              (!args.cross_entropy || args.label_smoothing == 0) && args.classes / kRawItems<S> < int64_t(1) << 31 &&
              rows_aligned<kRawItems<S>>(args.student, args.classes) &&
              rows_aligned<kRawItems<S>>(args.grad, args.columns, args.classes, sizeof(S));
  for (int k = 0; k < args.teachers; ++k)
    fits = fits && args.teacher[k].type == args.student.type && rows_aligned<kRawItems<S>>(args.teacher[k], args.classes);
  if (!fits) return false;
  const auto of_teachers = [&]<AtOne One>() {
    if (args.teachers <= 1) return f.template operator()<1, One>();
    if (args.teachers == 2) return f.template operator()<2, One>();
    f.template operator()<4, One>();
  };
  switch (at_one_of(integer_temperature(args.temperature[0]), args.cross_entropy)) {
    case AtOne::same: of_teachers.template operator()<AtOne::same>(); break;
    case AtOne::power: of_teachers.template operator()<AtOne::power>(); break;
    case AtOne::exponential: of_teachers.template operator()<AtOne::exponential>(); break;
  }
  return true;
}

}  // namespace FASTKD_TARGET
}  // namespace fastkd::multi_teacher
