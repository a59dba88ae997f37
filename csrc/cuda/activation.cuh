// The activations: value and gradient of every kind, of the vector of a thread. The kind is the same for all threads of
// a launch, so that nobody waits at its switch.
#pragma once

#include "types.cuh"

namespace fusedres {
namespace gpu {

// As fusedres/backends/cuda_launch.py numbers them.
enum Kind : i64 { kNone, kRelu, kLeakyRelu, kRelu6, kHardswish, kSilu, kGelu, kGeluTanh, kMish };

struct Activation {
  i64 kind;
  double slope;
};

template <class A>
FUSEDRES_HD A magnitude(A x) {
  return x < A(0) ? -x : x;
}

// 1 / (1 + exp(-x)), and one minus that without cancellation; the exponent is negative, so that nothing overflows.
template <class A>
struct Sigmoid {
  A value, rest;
  FUSEDRES_HD explicit Sigmoid(A x) {
    const A e = exponential(-magnitude(x)), larger = A(1) / (A(1) + e), smaller = e * larger;
    value = x < A(0) ? smaller : larger;
    rest = x < A(0) ? larger : smaller;
  }
};

// tanh(log(1 + exp(x))), and one minus that without cancellation: fractions of exp(-|x|), which never overflows.
template <class A>
struct TanhOfSoftplus {
  A value, rest;
  FUSEDRES_HD explicit TanhOfSoftplus(A x) {
    const A e = exponential(-magnitude(x));
    const A grown = x < A(0) ? e * (e + A(2)) : A(1) + A(2) * e, left = x < A(0) ? A(2) : A(2) * e * e;
    const A whole = A(1) / (grown + left);
    value = grown * whole;
    rest = left * whole;
  }
};

// Twice the argument of the hyperbolic tangent by which Gelu is approximated.
template <class A>
FUSEDRES_HD A doubled_argument(A z) {
  return A(1.59576912160573071176) * (z + A(0.044715) * (z * z * z));
}

template <class A>
FUSEDRES_HD A below(A z) {
  return A(0.5) + A(0.5) * error_function(z * A(0.70710678118654752440));
}

// z becomes act(z); NaN stays.
template <class A, int V>
FUSEDRES_HD void activate(const Activation& act, A (&z)[V]) {
#define FUSEDRES_EACH(VALUE)    \
  FUSEDRES_UNROLL               \
  for (int i = 0; i < V; ++i) { \
    const A x = z[i];           \
    z[i] = VALUE;               \
  }                             \
  return
  switch (act.kind) {
    case kNone: return;
    case kRelu: FUSEDRES_EACH(x < A(0) ? A(0) : x);
    case kLeakyRelu: FUSEDRES_EACH(x > A(0) ? x : x * A(act.slope));
    case kRelu6: FUSEDRES_EACH(x < A(0) ? A(0) : x > A(6) ? A(6) : x);
    case kHardswish: FUSEDRES_EACH(x * (x < A(-3) ? A(0) : x > A(3) ? A(6) : x + A(3)) / A(6));
    case kSilu: FUSEDRES_EACH(x * Sigmoid<A>(x).value);
    case kGelu: FUSEDRES_EACH(x * below(x));
    case kGeluTanh: FUSEDRES_EACH(x * Sigmoid<A>(doubled_argument(x)).value);
    case kMish: FUSEDRES_EACH(x * TanhOfSoftplus<A>(x).value);
    default: return;
  }
#undef FUSEDRES_EACH
}

template <class A>
FUSEDRES_HD A silu_slope(A z) {
  const Sigmoid<A> s(z);
  return s.value * (A(1) + z * s.rest);
}

template <class A>
FUSEDRES_HD A gelu_slope(A z) {
  return below(z) + z * exponential(z * z * A(-0.5)) * A(0.39894228040143267794);
}

template <class A>
FUSEDRES_HD A gelu_tanh_slope(A z) {
  const Sigmoid<A> s(doubled_argument(z));
  return s.value + z * s.value * s.rest * (A(1.59576912160573071176) * (A(1) + A(0.134145) * (z * z)));
}

template <class A>
FUSEDRES_HD A mish_slope(A z) {
  const TanhOfSoftplus<A> t(z);
  return t.value + z * Sigmoid<A>(z).value * (t.rest * (A(1) + t.value));
}

// dz becomes the gradient of z by act(z), which at kinks is the one that torch takes.
template <class A, int V>
FUSEDRES_HD void apply_gradient(const Activation& act, A (&dz)[V], const A (&z)[V]) {
#define FUSEDRES_EACH(VALUE)      \
  FUSEDRES_UNROLL                 \
  for (int i = 0; i < V; ++i) {   \
    const A x = z[i], dy = dz[i]; \
    dz[i] = VALUE;                \
  }                               \
  return
  switch (act.kind) {
    case kNone: return;
    case kRelu: FUSEDRES_EACH(x <= A(0) ? A(0) : dy);
    case kLeakyRelu: FUSEDRES_EACH(x > A(0) ? dy : dy * A(act.slope));
    case kRelu6: FUSEDRES_EACH(x <= A(0) || x >= A(6) ? A(0) : dy);
    case kHardswish: FUSEDRES_EACH(x <= A(-3) ? A(0) : x >= A(3) ? dy : dy * (x / A(3) + A(0.5)));
    case kSilu: FUSEDRES_EACH(dy * silu_slope(x));
    case kGelu: FUSEDRES_EACH(dy * gelu_slope(x));
    case kGeluTanh: FUSEDRES_EACH(dy * gelu_tanh_slope(x));
    case kMish: FUSEDRES_EACH(dy * mish_slope(x));
    default: return;
  }
#undef FUSEDRES_EACH
}

}  // namespace gpu
}  // namespace fusedres
