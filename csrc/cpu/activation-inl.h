// Activations beyond ReLU, compiled once per CPU capability: values and gradients of rows that are in cache, for every
// kernel the same.
//
// In float by polynomials that are exact to about a rounding (fitted for this file by reweighted least squares, to the
// figures given with them); in double by libm.
#pragma once

#include <cstdint>
#include <cstring>

#include "activation.h"
#include "vectors-inl.h"

namespace fusedres {
namespace FUSEDRES_CAPABILITY {
namespace {

template <class V, int kCount>
inline V polynomial(V x, const float (&coefficients)[kCount]) {
  V sum = V{} + coefficients[kCount - 1];
#pragma GCC unroll 16
  for (int i = kCount - 2; i >= 0; --i) sum = sum * x + coefficients[i];
  return sum;
}

template <class V>
inline V magnitude(V x) {
  return x < V{} ? -x : x;
}

// exp(x) for x <= 0, and 0 where that would be subnormal: 2^n * exp(r) with |r| <= log(2) / 2, and exp(r) = 1 + r + r^2
// q(r), q to 3e-9.
inline VecF exp_of_negative(VecF x) {
  constexpr float q[] = {0x1p-1f, 0x1.55548ep-3f, 0x1.55545ep-5f, 0x1.123bdep-7f, 0x1.6db4e8p-10f};
  constexpr float round = 0x1.8p23f;  // a sum with it has no bits behind the point
  const VecF n = (x * 0x1.715476p+0f + round) - round;
  const VecF r =
      (x - n * 0x1.62ep-1f) - n * 0x1.0bfbe8p-15f;  // log(2) in two parts, the first short enough for exact products
  const VecF power = bit_cast<VecF>((__builtin_convertvector(n, VecI) + 127) << 23);
  const VecF result = power + power * (r + r * r * polynomial(r, q));
  return x < -87.f ? VecF{} : result;  // NaN stays
}
inline VecD exp_of_negative(VecD x) {
  for (int i = 0; i < FUSEDRES_LANES / 2; ++i) x[i] = __builtin_exp(x[i]);
  return x;
}

// The normal distribution: `below` = Phi(x), and x times its density.
template <class V>
struct Normal {
  V below, moment;
};

inline Normal<VecF> normal(VecF x) {
  constexpr float root = 0x1.988454p-2f;  // 1 / sqrt(2 pi)
  // (Phi(x) - 1/2) / x in x^2 up to |x| = 1.25, to 3e-9
  constexpr float h[] = {0x1.988454p-2f,   -0x1.10580cp-4f, 0x1.46c622p-7f,
                         -0x1.365deap-10f, 0x1.d219c2p-14f, -0x1.ca71c0p-18f};
  // Phi(-t) exp(t^2 / 2) in 1 / (1 + t / 4) from there to where the exponential vanishes, to a relative 5e-9
  constexpr float g[] = {0x1.1fb9acp-18f, 0x1.98342ep-4f,  0x1.9aa76ep-4f, 0x1.7911aap-4f, 0x1.47e68ap-4f,
                         0x1.501d38p-4f,  -0x1.9ff026p-7f, 0x1.aad6c0p-4f, -0x1.75e6d4p-5f};
  const VecF square = x * x, t = magnitude(x), density = exp_of_negative(square * -0.5f);
  const VecF tail = density * polynomial(VecF{} + 1.f / (1.f + 0.25f * t), g);
  const VecF outer = x < VecF{} ? tail : 1.f - tail;
  return {t < 1.25f ? 0.5f + x * polynomial(square, h) : outer, x * density * root};
}
inline Normal<VecD> normal(VecD x) {
  Normal<VecD> result;
  for (int i = 0; i < FUSEDRES_LANES / 2; ++i) {
    result.below[i] = 0.5 * __builtin_erfc(-x[i] * 0.70710678118654752440);
    result.moment[i] = x[i] * __builtin_exp(-0.5 * x[i] * x[i]) * 0.39894228040143267794;
  }
  return result;
}

// 1 / (1 + exp(-x)), and one minus that without cancellation.
template <class V>
struct Sigmoid {
  V value, rest;
  explicit Sigmoid(V x) {
    const V e = exp_of_negative(-magnitude(x)), larger = 1 / (1 + e), smaller = e * larger;
    value = x < V{} ? smaller : larger;
    rest = x < V{} ? larger : smaller;
  }
};

// value(z), and the gradient of z from that of the value; at its kinks each has the derivative that torch gives it.
template <class V>
struct LeakyRelu {
  V slope;
  V value(V z) const { return z > V{} ? z : z * slope; }
  V gradient(V dy, V z) const { return z > V{} ? dy : dy * slope; }
};

template <class V>
struct Relu6 {
  V value(V z) const {
    const V positive = z < V{} ? V{} : z;
    return positive > 6 ? V{} + 6 : positive;
  }
  V gradient(V dy, V z) const { return (z <= V{}) | (z >= 6) ? V{} : dy; }
};

template <class V>
struct Hardswish {
  V value(V z) const { return z * Relu6<V>{}.value(z + 3) / 6; }
  V gradient(V dy, V z) const {
    const V inner = z >= 3 ? dy : dy * (z / 3 + V{} + 0.5f);
    return z <= -3 ? V{} : inner;
  }
};

template <class V>
struct Silu {
  V value(V z) const { return z * Sigmoid<V>(z).value; }
  V gradient(V dy, V z) const {
    const Sigmoid<V> s(z);
    return dy * (s.value * (1 + z * s.rest));
  }
};

template <class V>
struct Gelu {
  V value(V z) const { return z * normal(z).below; }
  V gradient(V dy, V z) const {
    const Normal<V> n = normal(z);
    return dy * (n.below + n.moment);
  }
};

// z * sigmoid(2 u), which is z * (1 + tanh(u)) / 2, with u = sqrt(2 / pi) (z + 0.044715 z^3).
template <class V, class A>
struct GeluTanh {
  static constexpr A kRoot = A(1.59576912160573071176), kCubic = A(0.044715);
  V value(V z) const { return z * Sigmoid<V>(kRoot * (z + kCubic * (z * z * z))).value; }
  V gradient(V dy, V z) const {
    const Sigmoid<V> s(kRoot * (z + kCubic * (z * z * z)));
    return dy * (s.value + z * s.value * s.rest * (kRoot * (1 + 3 * kCubic * (z * z))));
  }
};

// tanh(log(1 + exp(x))), and one minus that without cancellation: fractions of exp(-|x|), which never overflows.
template <class V>
struct TanhOfSoftplus {
  V value, rest;
  explicit TanhOfSoftplus(V x) {
    const V e = exp_of_negative(-magnitude(x));
    const V grown = x < V{} ? e * (e + 2) : 1 + 2 * e, left = x < V{} ? V{} + 2 : 2 * e * e;
    const V whole = 1 / (grown + left);
    value = grown * whole;
    rest = left * whole;
  }
};

template <class V>
struct Mish {
  V value(V z) const { return z * TanhOfSoftplus<V>(z).value; }
  V gradient(V dy, V z) const {
    const TanhOfSoftplus<V> t(z);
    return dy * (t.value + z * Sigmoid<V>(z).value * (t.rest * (1 + t.value)));
  }
};

// f(the activation), which is_other().
template <class A, class F>
inline void with_activation(const Activation& act, F&& f) {
  using V = typename Vector<A>::type;
  switch (act.kind) {
    case Act::none:
    case Act::relu: return;
    case Act::leaky_relu: return f(LeakyRelu<V>{V{} + A(act.slope)});
    case Act::relu6: return f(Relu6<V>{});
    case Act::hardswish: return f(Hardswish<V>{});
    case Act::silu: return f(Silu<V>{});
    case Act::gelu: return f(Gelu<V>{});
    case Act::gelu_tanh: return f(GeluTanh<V, A>{});
    case Act::mish: return f(Mish<V>{});
  }
}

// body(vector of each argument) for n numbers of rows in arithmetic precision; the result goes to the first row.
template <class A, class F>
inline void each_vector(A* first, const A* second, int64_t n, F&& body) {
  using V = typename Vector<A>::type;
  constexpr int kLanes = kRegister / int(sizeof(A));
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) write(first + i, body(read<V>(first + i), read<V>(second + i)));
  if (i == n) return;
  A ends[2][kLanes] = {};
  std::memcpy(ends[0], first + i, (n - i) * sizeof(A));
  std::memcpy(ends[1], second + i, (n - i) * sizeof(A));
  write(ends[0], body(read<V>(ends[0]), read<V>(ends[1])));
  std::memcpy(first + i, ends[0], (n - i) * sizeof(A));
}

// z becomes act(z).
template <class A>
__attribute__((noinline)) void activate_row(A* z, int64_t n, const Activation& act) {
  using V = typename Vector<A>::type;
  with_activation<A>(act, [&](auto f) { each_vector(z, z, n, [&](V v, V) { return f.value(v); }); });
}

// dy becomes the gradient of z by act(z).
template <class A>
__attribute__((noinline)) void gradient_row(A* dy, const A* z, int64_t n, const Activation& act) {
  using V = typename Vector<A>::type;
  with_activation<A>(act, [&](auto f) { each_vector(dy, z, n, [&](V g, V v) { return f.gradient(g, v); }); });
}

}  // namespace
}  // namespace FUSEDRES_CAPABILITY
}  // namespace fusedres
