// A row in the registers of a warp or a block, as the kernels of on_chip.cuh hold it.
#pragma once

#include "core/cuda/block.cuh"
#include "multi_teacher/launch.cuh"

namespace fastkd::multi_teacher {
inline namespace FASTKD_TARGET {

// A row's data in this thread: classes past the end are -inf, like masked ones.
template <class A, int kItems>
struct RowState {
  A x_s[kItems];    // (s - max), at T = 1
  A e_s[kItems];    // exp(x_s / T)
  A t[kItems];      // a teacher's logits, then relative to their maximum; in the end soft labels
  A acc[kItems];    // gradient (losses, logits) or mixture (probs, logits)
  A z_s;
  A bound;          // of the gradient of divergences besides forward
};

// e_s at inv_t; z_s.
template <class A, int kItems, class Threads>
__device__ __forceinline__ void student_exponentials(RowState<A, kItems>& row, A inv_t, Threads& threads) {
  Numbers<A, 1> z{{0}};
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    row.e_s[i] = exp_negative(row.x_s[i] * inv_t);
    z.v[0] += row.e_s[i];
  }
  row.z_s = threads.sum(z).v[0];
}

template <int Width, class A, int kItems, class Threads>
__device__ __forceinline__ void load_row(const Params<A>& p, int slot, const AnyRow& from, Threads& threads, A (&to)[kItems]) {
  load_items<kItems, Width>(from, 0, p.classes, Threads::kThreads, threads.thread, p.in_vectors(slot), -A(kInf), to);
}

}  // namespace FASTKD_TARGET
}  // namespace fastkd::multi_teacher
