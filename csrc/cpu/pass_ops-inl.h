// The operations of the passes over rows: apply() makes one output vector from x (inputs) and k (constants), and adds
// to s (sums). relu() and blocked() let NaN through: a comparison with NaN is false.
//
// Activations beyond ReLU are a step before apply(), on whole rows: what pending() makes of x and k, activated
// (kStep::value) or the first input times the derivative there (kStep::gradient), is one more x, behind the inputs.
#pragma once

#include "activation-inl.h"

namespace fusedres {
namespace FUSEDRES_CAPABILITY {
namespace {

template <class V>
inline V relu(V z, V floor) {
  return z < floor ? floor : z;
}
template <class V>
inline V blocked(V dz, V z) {
  return z <= V{} ? V{} : dz;
}

enum class Step { none, value, gradient };

// x: none. For passes that only measure.
struct Nothing {
  static constexpr int kInputs = 0, kConstants = 0, kSums = 0;
  static constexpr Step kStep = Step::none;
  static constexpr bool kWrites = false, kMeasures = true;
  template <class V>
  static V apply(const V*, const V*, V*, V) {
    return V{};
  }
};

enum class Residual { none, plain, scale_shift };

// What stands before a gradient: nothing, ReLU, another activation.
enum class Mask { none, relu, other };

// x: raw, residual. k: scale, shift, residual's scale, residual's shift.
template <bool kScaleShift, Residual kResidual, bool kOther>
struct AddActForward {
  static constexpr int kInputs = kResidual == Residual::none ? 1 : 2, kConstants = 4, kSums = 0;
  static constexpr bool kWrites = true, kMeasures = true;
  static constexpr Step kStep = kOther ? Step::value : Step::none;
  template <class V>
  static V pending(const V* x, const V* k) {
    V z = kScaleShift ? x[0] * k[0] + k[1] : x[0];
    if constexpr (kResidual == Residual::plain) z = z + x[1];
    if constexpr (kResidual == Residual::scale_shift) z = z + (x[1] * k[2] + k[3]);
    return z;
  }
  template <class V>
  static V apply(const V* x, const V* k, V*, V floor) {
    if constexpr (kOther) return x[kInputs];
    else return relu(pending(x, k), floor);
  }
};

// x: grad, then raw (masked or sums), then the residual (in the mask or three sums). k: scale, shift, mean, residual's
// scale, shift and mean. s: dz, dz * (raw - mean), dz * (residual - its mean).
template <Mask kMask, Residual kResidual, int kSumCount>
struct AddActBackward {
  static constexpr bool kMasked = kMask != Mask::none;
  static constexpr bool kSecond = kSumCount == 3 || (kMasked && kResidual != Residual::none);
  static constexpr int kInputs = kSecond ? 3 : kMasked || kSumCount > 0 ? 2 : 1;
  static constexpr int kConstants = 6, kSums = kSumCount;
  static constexpr bool kWrites = kMasked, kMeasures = false;
  static constexpr Step kStep = kMask == Mask::other ? Step::gradient : Step::none;
  template <class V>
  static V pending(const V* x, const V* k) {
    V z = x[1] * k[0] + k[1];
    if constexpr (kResidual == Residual::plain) z = z + x[2];
    if constexpr (kResidual == Residual::scale_shift) z = z + (x[2] * k[3] + k[4]);
    return z;
  }
  template <class V>
  static V apply(const V* x, const V* k, V* s, V) {
    V dz = kMask == Mask::other ? x[kInputs] : x[0];
    if constexpr (kMask == Mask::relu) dz = blocked(dz, pending(x, k));
    if constexpr (kSumCount >= 2) {
      s[0] += dz;
      s[1] += dz * (x[1] - k[2]);
    }
    if constexpr (kSumCount == 3) s[2] += dz * (x[2] - k[5]);
    return dz;
  }
};

// x: raw, gate, carry. k: scale, shift, gate's scale, gate's shift.
template <bool kRelu>
struct HighwayForward {
  static constexpr int kInputs = 3, kConstants = 4, kSums = 0;
  static constexpr bool kWrites = true, kMeasures = false;
  static constexpr Step kStep = Step::none;
  template <class V>
  static V apply(const V* x, const V* k, V*, V) {
    V h = x[0] * k[0] + k[1];
    if constexpr (kRelu) h = relu(h, V{});
    const Sigmoid<V> t(x[1] * k[2] + k[3]);
    return t.value * h + t.rest * x[2];
  }
};

// x: grad, raw, gate, carry. k: scale, shift, mean, and the same of the gate. s: dz, dz * (raw - mean), dgate, dgate *
// (gate - its mean). Writes dz, and behind it dgate and dcarry.
template <bool kRelu>
struct HighwayBackward {
  static constexpr int kInputs = 4, kConstants = 6, kSums = 4;
  static constexpr bool kWrites = true, kMeasures = false;
  static constexpr Step kStep = Step::none;
  template <class V>
  static V apply(const V* x, const V* k, V* s, V, V* more) {
    const V z = x[1] * k[0] + k[1];
    const Sigmoid<V> t(x[2] * k[3] + k[4]);
    V h = z, dz = x[0] * t.value;
    if constexpr (kRelu) {
      h = relu(z, V{});
      dz = blocked(dz, z);
    }
    const V dgate = x[0] * (h - x[3]) * (t.value * t.rest);
    s[0] += dz;
    s[1] += dz * (x[1] - k[2]);
    s[2] += dgate;
    s[3] += dgate * (x[2] - k[5]);
    more[0] = dgate;
    more[1] = x[0] * t.rest;
    return dz;
  }
};

// The outputs of an operation behind the first.
template <class Op>
constexpr int kMore = 0;
template <bool kRelu>
constexpr int kMore<HighwayBackward<kRelu>> = 2;

// x: grad, raw. k: p, q, r.
template <bool kRaw>
struct ApplyGradCoeff {
  static constexpr Step kStep = Step::none;
  static constexpr int kInputs = kRaw ? 2 : 1, kConstants = 3, kSums = 0;
  static constexpr bool kWrites = true, kMeasures = false;
  template <class V>
  static V apply(const V* x, const V* k, V*, V) {
    V g = x[0] * k[0] + k[2];
    if constexpr (kRaw) g = g + x[1] * k[1];
    return g;
  }
};

// x: da, then base, then x (mask or sums). k: scale, shift, mean, factor of dz. s: dz, dz * (x - mean).
template <Mask kMask, bool kReduce, bool kBase>
struct DgradEpilogue {
  static constexpr int kX = kBase ? 2 : 1;
  static constexpr int kInputs = kMask != Mask::none || kReduce ? kX + 1 : kX, kConstants = 4, kSums = kReduce ? 2 : 0;
  static constexpr bool kWrites = true, kMeasures = false;
  static constexpr Step kStep = kMask == Mask::other ? Step::gradient : Step::none;
  template <class V>
  static V pending(const V* x, const V* k) {
    return x[kX] * k[0] + k[1];
  }
  template <class V>
  static V apply(const V* x, const V* k, V* s, V) {
    V dz = kMask == Mask::other ? x[kInputs] : x[0];
    if constexpr (kMask == Mask::relu) dz = blocked(dz, pending(x, k));
    if constexpr (kReduce) {
      s[0] += dz;
      s[1] += dz * (x[kX] - k[2]);
    }
    dz = dz * k[3];
    if constexpr (kBase) dz = dz + x[1];
    return dz;
  }
};

}  // namespace
}  // namespace FUSEDRES_CAPABILITY
}  // namespace fusedres
