// The logistic function of a vector. Included by the engines, once per CPU capability.
#pragma once

#include "simd.h"

namespace fusedres {
namespace FUSEDRES_CAPABILITY {
namespace {

// e^z for z <= 0, and 0 where that would be subnormal; NaN stays NaN. With n = round(z / ln 2) and r = z - n ln 2 it is 2^n e^r, where
// |r| < 0.35, and e^r by its Taylor polynomial, whose rest is a tenth of a rounding. In double by libm.
inline VecF decay(VecF z) {
  constexpr float factor[] = {1.f / 5040, 1.f / 720, 1.f / 120, 1.f / 24, 1.f / 6, 1.f / 2, 1.f, 1.f};
  constexpr float magic = 0x1.8p23f;  // a sum with it is rounded to an integer, which stands in its low bits
  const VecF shifted = z * 0x1.715476p+0f + magic, n = shifted - magic;
  const VecF r = (z - n * 0x1.62ep-1f) - n * 0x1.0bfbe8p-15f;  // ln 2 in two parts, the first short enough for exact products
  VecF sum = VecF{} + factor[0];
#pragma GCC unroll 8
  for (int i = 1; i < 8; ++i) sum = sum * r + factor[i];
  const VecF power = bit_cast<VecF>((bit_cast<VecI>(shifted) << 23) + (127 << 23));
  return z < -87.f ? VecF{} : sum * power;
}
inline VecD decay(VecD z) {
  for (int i = 0; i < FUSEDRES_LANES / 2; ++i) z[i] = __builtin_exp(z[i]);
  return z;
}

// 1 / (1 + e^-z), and one minus that without cancellation.
template <class V>
struct Sigmoid {
  V value, rest;
  explicit Sigmoid(V z) {
    const V e = decay(z < V{} ? z : -z), larger = 1 / (1 + e), smaller = e * larger;
    value = z < V{} ? smaller : larger;
    rest = z < V{} ? larger : smaller;
  }
};

}  // namespace
}  // namespace FUSEDRES_CAPABILITY
}  // namespace fusedres
