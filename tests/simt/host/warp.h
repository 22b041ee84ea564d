// Barriers, warp operations, atomics and cached loads of CUDA, for the host's scheduler. Included by csrc/core/cuda/simt.h only.
//
// Stricter than the hardware where the CUDA guide leaves a result undefined: every lane that a mask names must take
// part (an exited one is an error), every thread of a block must reach the same __syncthreads(), and a value shuffled
// from a lane outside the mask is NaN or -1.
#pragma once

#include <bit>
#include <concepts>
#include <cstring>

#include "machine.h"

inline void __syncthreads(simt::Where where = simt::Where::current()) {
  simt::barrier(simt::Barrier::sync, "__syncthreads()", 0, where);
}
inline int __syncthreads_count(int predicate, simt::Where where = simt::Where::current()) {
  return simt::barrier(simt::Barrier::count, "__syncthreads_count()", predicate, where);
}
inline int __syncthreads_and(int predicate, simt::Where where = simt::Where::current()) {
  return simt::barrier(simt::Barrier::all, "__syncthreads_and()", predicate, where);
}
inline int __syncthreads_or(int predicate, simt::Where where = simt::Where::current()) {
  return simt::barrier(simt::Barrier::any, "__syncthreads_or()", predicate, where);
}
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __threadfence_system() {}

namespace simt {

// The types that CUDA's shuffles take. Others do not compile under nvcc either.
template <class T>
inline constexpr bool shuffled = std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8);

inline constexpr WarpOperation syncwarp{"__syncwarp()", WarpOperation::synchronise};
inline constexpr WarpOperation shfl{"__shfl_sync()", WarpOperation::gather};
inline constexpr WarpOperation shfl_up{"__shfl_up_sync()", WarpOperation::gather};
inline constexpr WarpOperation shfl_down{"__shfl_down_sync()", WarpOperation::gather};
inline constexpr WarpOperation shfl_xor{"__shfl_xor_sync()", WarpOperation::gather};
inline constexpr WarpOperation ballot{"__ballot_sync()", WarpOperation::ballot};
inline constexpr WarpOperation any{"__any_sync()", WarpOperation::ballot};
inline constexpr WarpOperation all{"__all_sync()", WarpOperation::ballot};

template <class T>
T shuffle(const WarpOperation& operation, unsigned mask, T value, int source, const Where& where) {
  static_assert(shuffled<T>, "CUDA shuffles int, long, long long (signed or not), float, double and half types");
  std::uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = warp_operation(operation, mask, bits, static_cast<unsigned>(source), where);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

// The first lane of the caller's segment of `width` lanes.
inline int segment(int width, const WarpOperation& operation) {
  if (width < 1 || width > 32 || !std::has_single_bit(static_cast<unsigned>(width)))
    fail(std::string(operation.name) + " got width " + std::to_string(width) + ", not a power of two up to 32");
  return static_cast<int>(lane()) & ~(width - 1);
}

template <class T>
std::uint64_t widen(T value) {
  return static_cast<std::uint64_t>(static_cast<std::int64_t>(value));
}

template <class T, class F>
std::uint64_t fold_of(std::uint64_t a, std::uint64_t b) {
  return widen<T>(F{}(static_cast<T>(a), static_cast<T>(b)));
}
struct Add {
  template <class T>
  T operator()(T a, T b) const {
    return static_cast<T>(static_cast<unsigned>(a) + static_cast<unsigned>(b));  // wraps, as on the device
  }
};
struct Min {
  template <class T>
  T operator()(T a, T b) const {
    return b < a ? b : a;
  }
};
struct Max {
  template <class T>
  T operator()(T a, T b) const {
    return a < b ? b : a;
  }
};
struct And {
  template <class T>
  T operator()(T a, T b) const {
    return a & b;
  }
};
struct Or {
  template <class T>
  T operator()(T a, T b) const {
    return a | b;
  }
};
struct Xor {
  template <class T>
  T operator()(T a, T b) const {
    return a ^ b;
  }
};
template <class T, class F>
inline constexpr WarpOperation reduction{"__reduce_*_sync()", WarpOperation::fold, fold_of<T, F>};

}  // namespace simt

inline void __syncwarp(unsigned mask = 0xffffffffu, simt::Where where = simt::Where::current()) {
  simt::warp_operation(simt::syncwarp, mask, 0, 0, where);
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, simt::Where where = simt::Where::current()) {
  return simt::shuffle(simt::shfl, mask, value, simt::segment(width, simt::shfl) | (source & (width - 1)), where);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, simt::Where where = simt::Where::current()) {
  const int first = simt::segment(width, simt::shfl_up), me = simt::lane(), from = me - static_cast<int>(delta);
  return simt::shuffle(simt::shfl_up, mask, value, from >= first ? from : me, where);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, simt::Where where = simt::Where::current()) {
  const int first = simt::segment(width, simt::shfl_down), me = simt::lane(), from = me + static_cast<int>(delta);
  return simt::shuffle(simt::shfl_down, mask, value, from < first + width ? from : me, where);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, simt::Where where = simt::Where::current()) {
  // As in hardware: an earlier segment can be read, a later one gives the lane's own value.
  const int first = simt::segment(width, simt::shfl_xor), me = simt::lane(), from = me ^ bits;
  return simt::shuffle(simt::shfl_xor, mask, value, from < first + width ? from : me, where);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, simt::Where where = simt::Where::current()) {
  return static_cast<unsigned>(simt::warp_operation(simt::ballot, mask, predicate != 0, 0, where));
}
inline int __any_sync(unsigned mask, int predicate, simt::Where where = simt::Where::current()) {
  return simt::warp_operation(simt::any, mask, predicate != 0, 0, where) != 0;
}
inline int __all_sync(unsigned mask, int predicate, simt::Where where = simt::Where::current()) {
  return simt::warp_operation(simt::all, mask, predicate != 0, 0, where) == mask;
}
// Only the caller: the one answer that is right in every schedule.
inline unsigned __activemask() { return 1u << simt::lane(); }

#define SIMT_REDUCE(name, T, F)                                                                                   \
  inline T name(unsigned mask, T value, simt::Where where = simt::Where::current()) {                             \
    return static_cast<T>(simt::warp_operation(simt::reduction<T, simt::F>, mask, simt::widen(value), 0, where)); \
  }
SIMT_REDUCE(__reduce_add_sync, int, Add)
SIMT_REDUCE(__reduce_add_sync, unsigned, Add)
SIMT_REDUCE(__reduce_min_sync, int, Min)
SIMT_REDUCE(__reduce_min_sync, unsigned, Min)
SIMT_REDUCE(__reduce_max_sync, int, Max)
SIMT_REDUCE(__reduce_max_sync, unsigned, Max)
SIMT_REDUCE(__reduce_and_sync, unsigned, And)
SIMT_REDUCE(__reduce_or_sync, unsigned, Or)
SIMT_REDUCE(__reduce_xor_sync, unsigned, Xor)
#undef SIMT_REDUCE

// A fiber is never interrupted, so a plain read and write is atomic; the attribute keeps it out of the race detector.
#define SIMT_ATOMIC __attribute__((no_sanitize("thread")))

namespace simt {
// `value` in a non-deduced place, so that atomicAdd(pointer_to_float, 1) compiles as it does under nvcc.
template <class T, class... U>
concept one_of = (std::same_as<T, U> || ...);
template <class T, class F>
SIMT_ATOMIC T exchange(T* address, F next) {
  check_aligned(address, sizeof(T));
  const T old = *address;
  *address = next(old);
  return old;
}
}  // namespace simt

#define SIMT_RMW(name, expression, ...)                                                 \
  template <simt::one_of<__VA_ARGS__> T>                                                \
  SIMT_ATOMIC T name(T* address, std::type_identity_t<T> value) {                       \
    return simt::exchange(address, [&](T old) SIMT_ATOMIC -> T { return expression; }); \
  }
SIMT_RMW(atomicAdd, old + value, int, unsigned, unsigned long long, float, double)
SIMT_RMW(atomicSub, old - value, int, unsigned)
SIMT_RMW(atomicMin, value < old ? value : old, int, unsigned, long long, unsigned long long)
SIMT_RMW(atomicMax, value > old ? value : old, int, unsigned, long long, unsigned long long)
SIMT_RMW(atomicExch, value, int, unsigned, unsigned long long, float)
SIMT_RMW(atomicAnd, old& value, int, unsigned, unsigned long long)
SIMT_RMW(atomicOr, old | value, int, unsigned, unsigned long long)
SIMT_RMW(atomicXor, old ^ value, int, unsigned, unsigned long long)
SIMT_RMW(atomicInc, old >= value ? 0u : old + 1, unsigned)
SIMT_RMW(atomicDec, old == 0 || old > value ? value : old - 1, unsigned)
#undef SIMT_RMW

template <simt::one_of<int, unsigned, unsigned long long, unsigned short> T>
SIMT_ATOMIC T atomicCAS(T* address, std::type_identity_t<T> expected, std::type_identity_t<T> desired) {
  return simt::exchange(address, [&](T old) SIMT_ATOMIC -> T { return old == expected ? desired : old; });
}

#define SIMT_LOAD(name)                \
  template <class T>                   \
  T name(const T* p) {                 \
    simt::check_aligned(p, sizeof(T)); \
    return *p;                         \
  }
SIMT_LOAD(__ldg)
SIMT_LOAD(__ldca)
SIMT_LOAD(__ldcg)
SIMT_LOAD(__ldcs)
SIMT_LOAD(__ldcv)
SIMT_LOAD(__ldlu)
#undef SIMT_LOAD
#define SIMT_STORE(name)                           \
  template <class T>                               \
  void name(T* p, std::type_identity_t<T> value) { \
    simt::check_aligned(p, sizeof(T));             \
    *p = value;                                    \
  }
SIMT_STORE(__stcg)
SIMT_STORE(__stcs)
SIMT_STORE(__stwb)
SIMT_STORE(__stwt)
#undef SIMT_STORE
