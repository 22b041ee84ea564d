// Vectors of a row as they lie in memory. What is loaded so is converted where it is used, and not where the load is issued:
// there the conversion would wait for it.
#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "core/cuda/simt.h"

namespace fastkd {
inline namespace FASTKD_TARGET {

template <class T>
constexpr int kRawItems = 16 / int(sizeof(T));

// What an access of so many bytes moves.
template <int Bytes>
struct RawOf {
  using type = uint4;
};
template <>
struct RawOf<8> {
  using type = uint2;
};
template <int Bytes>
using Raw = typename RawOf<Bytes>::type;

template <class T, class Bits>
struct RawArray {
  T v[sizeof(Bits) / sizeof(T)];
};

// The vector at `row`, or so many vectors after it.
template <class Bits = uint4>
__device__ __forceinline__ Bits load_raw(const void* row, unsigned vector = 0) {
  const Bits* from = static_cast<const Bits*>(row) + vector;
  SIMT_ASSERT_ALIGNED(from, sizeof(Bits));
  return __ldg(from);
}

__device__ __forceinline__ void store_raw(void* row, unsigned vector, const uint4& bits) {
  uint4* to = static_cast<uint4*>(row) + vector;
  SIMT_ASSERT_ALIGNED(to, 16);
  __stwb(to, bits);
}

// The same of a row of so many words that begins on any border of 4 bytes; `pad` is what lies past its end.
__device__ __forceinline__ uint4 load_words(const void* row, unsigned vector, unsigned words, uint32_t pad) {
  const uint32_t* from = static_cast<const uint32_t*>(row);
  RawArray<uint32_t, uint4> raw;
#pragma unroll
  for (unsigned w = 0; w < 4; ++w) raw.v[w] = 4 * vector + w < words ? __ldg(from + 4 * vector + w) : pad;
  return __builtin_bit_cast(uint4, raw);
}

__device__ __forceinline__ void store_words(void* row, unsigned vector, unsigned words, const uint4& bits) {
  uint32_t* to = static_cast<uint32_t*>(row);
  const auto raw = __builtin_bit_cast(RawArray<uint32_t, uint4>, bits);
#pragma unroll
  for (unsigned w = 0; w < 4; ++w)
    if (4 * vector + w < words) to[4 * vector + w] = raw.v[w];
}

__device__ __forceinline__ void unpack_pair(uint32_t word, BFloat16, float& low, float& high) {
  low = bits_to_float(word << 16);
  high = bits_to_float(word & 0xffff0000u);
}

__device__ __forceinline__ void unpack_pair(uint32_t word, Half, float& low, float& high) {
#if defined(__CUDA_ARCH__)
  asm("{.reg .f16 l, h;\n mov.b32 {l, h}, %2;\n cvt.f32.f16 %0, l;\n cvt.f32.f16 %1, h;}" : "=f"(low), "=f"(high) : "r"(word));
#else
  low = load_as(Half{uint16_t(word)});
  high = load_as(Half{uint16_t(word >> 16)});
#endif
}

// Both rounded to T, of 16 bits.
template <class T>
__device__ __forceinline__ uint32_t pack_pair(float low, float high) {
#if defined(__CUDA_ARCH__)
  uint32_t word;
  if constexpr (is_half<T>)
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  else
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
#else
  T l, h;
  store_as(l, low);
  store_as(h, high);
  return uint32_t(h.bits) << 16 | l.bits;
#endif
}

// The elements of a vector of T.
template <class T, class Bits, class A, int N>
__device__ __forceinline__ void unpack(const Bits& bits, A (&to)[N]) {
  static_assert(N * sizeof(T) == sizeof(Bits));
  if constexpr (sizeof(T) == sizeof(A)) {
    const RawArray<A, Bits> raw = __builtin_bit_cast(RawArray<A, Bits>, bits);
#pragma unroll
    for (int i = 0; i < N; ++i) to[i] = raw.v[i];
  } else {
    const RawArray<uint32_t, Bits> raw = __builtin_bit_cast(RawArray<uint32_t, Bits>, bits);
#pragma unroll
    for (int w = 0; w < N / 2; ++w) unpack_pair(raw.v[w], T{}, to[2 * w], to[2 * w + 1]);
  }
}

template <class T>
__device__ __forceinline__ uint4 pack(const float (&from)[kRawItems<T>]) {
  RawArray<uint32_t, uint4> raw;
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    if constexpr (sizeof(T) == 4)
      raw.v[w] = float_to_bits(from[w]);
    else
      raw.v[w] = pack_pair<T>(from[2 * w], from[2 * w + 1]);
  }
  return __builtin_bit_cast(uint4, raw);
}

}  // namespace FASTKD_TARGET
}  // namespace fastkd
