// The arithmetic of one group, shared by CPU and CUDA. Derivation: README.md here.
#pragma once

#include "core/math.h"
#include "feature_ensemble/op.h"

namespace fastkd::feature_ensemble {
inline namespace FASTKD_TARGET {

// Whether a plain sum of squares lost nothing to underflow, and neither it nor that of a difference overflows. Else, also
// for 0 and NaN, it is taken again of the map times a power of two.
FASTKD_HD bool is_safe(float squares) { return squares >= 0x1p-40f && squares <= 0x1p+100f; }
FASTKD_HD bool is_safe(double squares) { return squares >= 0x1p-600 && squares <= 0x1p+900; }

// The power of two that brings a map with this largest magnitude near 1.
FASTKD_HD float scale_of(float largest) {
  const int exponent = 254 - int(float_to_bits(largest) >> 23 & 0xff);
  const int bounded = exponent < 1 ? 1 : exponent > 253 ? 253 : exponent;
  return bits_to_float(uint32_t(bounded) << 23);
}
FASTKD_HD double scale_of(double largest) {
  const int exponent = 2046 - int(__builtin_bit_cast(uint64_t, largest) >> 52 & 0x7ff);
  const int bounded = exponent < 1 ? 1 : exponent > 2045 ? 2045 : exponent;
  return __builtin_bit_cast(double, uint64_t(bounded) << 52);
}

// What a group's elements are combined with. With a' = a * scale_a, b' = b * scale_b (scales 1 for maps of usual size):
// u = a' - ratio * b', and the difference of the normalised maps is inverse * u. A ratio, not two normalised maps: it is
// exactly 1 for equal maps, so that u is exactly 0, also where the compiler fuses the multiplication and the subtraction.
template <class A>
struct Factors {
  A scale_a, scale_b, inverse, ratio;

  FASTKD_HD A difference(A a, A b) const { return a * scale_a - ratio * (b * scale_b); }
};

// A norm of 0 belongs to a map of zeros: any finite factor leaves it at 0.
template <class A>
FASTKD_HD A inverse_norm(A squares) {
  return squares == 0 ? A(1) : A(1) / square_root(squares);
}

// `Sum` may be wider than A: the ratio of the norms is in every element, so that its rounding does not average out.
template <class A, class Sum>
FASTKD_HD Factors<A> make_factors(A scale_a, Sum squares_a, A scale_b, Sum squares_b) {
  const Sum inverse = inverse_norm(squares_a);
  return {scale_a, scale_b, A(inverse), A(inverse_norm(squares_b) / inverse)};
}

// u to the power p, and u^(p - 1) * a', whose sum is the inner product of the derivative and the map. 0 stays 0 for p = 1,
// and NaN stays NaN.
template <int P, class A>
FASTKD_HD A power(A u) {
  return P == 1 ? magnitude(u) : u * u;
}
template <int P, class A>
FASTKD_HD A slope_times(A u, A a) {
  if (P == 2) return u * a;
  return u > 0 ? a : u < 0 ? -a : u;
}

// Sums over the group to: the sum of |x - y|^p, and <h, x> with h = d|x - y|^p / dx.
template <class A>
FASTKD_HD A distance_of(int p, A inverse, A sum) {
  return p == 1 ? inverse * sum : inverse * (inverse * sum);
}
template <class A>
FASTKD_HD A inner_of(int p, A inverse, A sum) {
  return p == 1 ? inverse * sum : 2 * inverse * (inverse * sum);
}

// The gradient with respect to one element of the student's map; `inverse` is 0 here for a map of zeros. `upstream`
// multiplies the pair's sum over elements. The scale comes last: alone it may be huge.
template <int P, class A>
FASTKD_HD A gradient(const Factors<A>& f, A inner, A upstream, A a, A b) {
  const A u = f.difference(a, b), x = f.inverse * (a * f.scale_a);
  const A h = P == 1 ? slope_times<1>(u, A(1)) : 2 * f.inverse * u;
  return upstream * f.inverse * (h - x * inner) * f.scale_a;
}

// Group g in the planes of a state.
template <class A>
FASTKD_HD void save_state(A* state, int64_t groups, int64_t g, const Factors<A>& f, A squares_a, A inner) {
  if (!state) return;
  state[g] = squares_a == 0 ? A(0) : f.inverse;
  state[g + groups] = f.ratio;
  state[g + 2 * groups] = inner;
  state[g + 3 * groups] = f.scale_a;
  state[g + 4 * groups] = f.scale_b;
}
template <class A>
FASTKD_HD Factors<A> load_factors(const A* state, int64_t groups, int64_t g) {
  return {state[g + 3 * groups], state[g + 4 * groups], state[g], state[g + groups]};
}
template <class A>
FASTKD_HD A load_inner(const A* state, int64_t groups, int64_t g) {
  return state[g + 2 * groups];
}

template <class A>
FASTKD_HD A given_weight(const Args& args, int k, int64_t b) {
  return args.host_weight ? A(args.host_weight[k])
                          : static_cast<const A*>(args.weight)[k * args.weight_stride_pair + b * args.weight_stride_sample];
}

// Whether the maps of pair k at sample b are not read, since nothing depends on them.
template <class A>
FASTKD_HD bool skips(const Args& args, int k, int64_t b) {
  return (args.mask && !args.mask[b]) || given_weight<A>(args, k, b) == 0;
}

// What multiplies sample b's sum over pair k's elements in the sample's loss.
template <class A>
FASTKD_HD A weight_of(const Args& args, int k, int64_t b) {
  const A weight = given_weight<A>(args, k, b);
  return args.mean_elements ? weight / A(args.pair[k].elements()) : weight;
}

}  // namespace FASTKD_TARGET
}  // namespace fastkd::feature_ensemble
