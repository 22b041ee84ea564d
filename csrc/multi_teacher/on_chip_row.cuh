// A row in the registers of a warp or a block, as the kernels of on_chip.cuh hold it.
#pragma once

#include "core/cuda/block.cuh"
#include "core/cuda/raw.cuh"
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

// Whether a row of two bytes an element stays as it lies in memory until it is used: a conversion would wait for the load.
template <class S, class A>
__device__ __forceinline__ bool stays_raw(const Params<A>& p, int slot) {
  return sizeof(S) == 2 && p.network[slot].type == p.network[0].type && p.in_vectors(slot);
}

// load_row() for later: take_row() gives the items.
template <class S, int Width, class A, int kItems, class Threads>
__device__ __forceinline__ void ask_row(const Params<A>& p, int slot, int64_t index, Threads& threads, A (&asked)[kItems]) {
  const AnyRow from = any_row(p.network[slot], index);
  if (!stays_raw<S>(p, slot)) return load_row<Width>(p, slot, from, threads, asked);
  if constexpr (sizeof(S) == 2) {
    constexpr uint32_t kMasked = is_half<S> ? 0xfc00fc00u : 0xff80ff80u;  // -inf twice: past the end
#pragma unroll
    for (int j = 0; j < kItems / Width; ++j) {
      const int64_t c = item_class<Width>(int64_t(0), j * Width, Threads::kThreads, threads.thread);
      uint4 bits{kMasked, kMasked, kMasked, kMasked};
      if (c < p.classes) bits = load_raw(static_cast<const S*>(from.data) + c);
      const auto words = __builtin_bit_cast(RawArray<float, uint4>, bits);
#pragma unroll
      for (int w = 0; w < 4; ++w) asked[j * 4 + w] = words.v[w];
    }
  }
}

template <class S, int Width, class A, int kItems>
__device__ __forceinline__ void take_row(const Params<A>& p, int slot, const A (&asked)[kItems], A (&to)[kItems]) {
  if (stays_raw<S>(p, slot)) {
    if constexpr (sizeof(S) == 2) {
#pragma unroll
      for (int w = 0; w < kItems / 2; ++w) unpack_pair(float_to_bits(asked[w]), S{}, to[2 * w], to[2 * w + 1]);
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kItems; ++i) to[i] = asked[i];
}

}  // namespace FASTKD_TARGET
}  // namespace fastkd::multi_teacher
