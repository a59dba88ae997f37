// How a convolution's numbers are stored, and how two operands are multiplied: what differs between float32 and
// bfloat16.
//
// The engine multiplies *units* of four bytes. In float32 a unit is a number. In bfloat16 it is a pair of numbers that
// follow one another along the sum (two channels; two pixels in the weight gradient), and the processor's dot product
// of pairs adds both products to a float: the same loops over half as many units, at twice the rate. A scratch holds
// the bits of units in floats. Winograd's algorithm alone has numbers in both: a transformed operand in bfloat16 would
// be rounded once more, and its products are so few that they are less work one by one.
//
// What differs on whole pixels and tiles is in conv_singles-inl.h and conv_pairs-inl.h.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#include "conv.h"
#include "storage-inl.h"

namespace fusedres {
namespace FUSEDRES_CAPABILITY {
namespace {

using vec = VecF;

#ifdef FUSEDRES_PAIRS
constexpr bool kPairs = true;
using Value = Bfloat16;
#else
constexpr bool kPairs = false;
using Value = float;
#endif
using Map = MapOf<Value>;
using Source = SourceOf<Value>;
using Weight = WeightOf<Value>;
using ForwardArgs = ForwardArgsOf<Value>;
using DgradArgs = DgradArgsOf<Value>;
using WgradArgs = WgradArgsOf<Value>;

constexpr int64_t kChannelsPerUnit = kPairs ? 2 : 1;

// By an instruction that passes NaN, where there is one.
inline vec relu(vec z) {
#if FUSEDRES_LANES == 16
  return bit_cast<vec>(_mm512_max_ps(_mm512_setzero_ps(), bit_cast<__m512>(z)));
#elif FUSEDRES_LANES == 8
  return bit_cast<vec>(_mm256_max_ps(_mm256_setzero_ps(), bit_cast<__m256>(z)));
#else
  return z <= 0.f ? vec{} : z;
#endif
}

inline float to_float(float value) { return value; }
inline void put(float* p, float value) { *p = value; }

// What a vector of four bytes a lane holds: numbers, or units. How it is loaded, and multiplied by a register kernel.
struct Numbers {
  static vec load_row(const Value* p) { return load(p); }
  static vec multiply_add(vec sum, float a, vec b) { return sum + a * b; }
};

#ifndef FUSEDRES_PAIRS

using Units = Numbers;

// A result as it is read again from storage.
template <class T>
inline T as_stored(T value) {
  return value;
}

// The unit whose numbers lie `stride` apart.
inline float unit_at(const float* p, int64_t) { return *p; }

// Units side by side, whose numbers lie `stride` apart.
inline void pack_row(const float* src, int64_t, int64_t n, float* dst) { std::memcpy(dst, src, n * sizeof(float)); }

#else

using bits = VecI;
typedef uint16_t Shorts __attribute__((vector_size(kRegister)));

struct Units {
  // numbers that lie side by side
  static vec load_row(const Value* p) { return bit_cast<vec>(_mm512_loadu_ps(reinterpret_cast<const float*>(p))); }
  static vec multiply_add(vec sum, float a, vec b) {
    return bit_cast<vec>(
        _mm512_dpbf16_ps(bit_cast<__m512>(sum), bit_cast<__m512bh>(_mm512_set1_ps(a)), bit_cast<__m512bh>(b)));
  }
};

inline float to_float(Bfloat16 value) { return bit_cast<float>(static_cast<uint32_t>(value.bits) << 16); }

// The bits of 16 values, each in its lane.
inline bits widen(const Bfloat16* p) { return widen(read<VecH>(p)); }

inline void put(Bfloat16* p, float value) { p->bits = round_to_bfloat16(vec{} + value)[0]; }

// Results as they are read again from storage.
inline vec as_stored(vec v) { return bit_cast<vec>(widen(round_to_bfloat16(v)) << 16); }
inline float as_stored(float value) {
  Bfloat16 rounded;
  put(&rounded, value);
  return to_float(rounded);
}

inline vec round_to_units(vec first, vec second) {
  return bit_cast<vec>(_mm512_cvtne2ps_pbh(bit_cast<__m512>(second), bit_cast<__m512>(first)));
}

// Of units, their numbers at even and at odd places; and of numbers, those at such places.
struct Halves {
  vec even, odd;
};
inline Halves halves(bits units) {
  return {bit_cast<vec>(units << 16), bit_cast<vec>(units & static_cast<int32_t>(0xffff0000))};
}
template <int... kLane>
inline Halves halves(const float* p, std::integer_sequence<int, kLane...>) {
  const vec a = load(p), b = load(p + kLanes);
  return {__builtin_shufflevector(a, b, 2 * kLane...), __builtin_shufflevector(a, b, (2 * kLane + 1)...)};
}
inline Halves halves(const float* p) { return halves(p, std::make_integer_sequence<int, kLanes>()); }

// a and b have the numbers of one operand in front and those of another behind them: units of one number of each, in
// turn from a and b, from number `kFirst` of theirs on.
template <int kFirst, int... kShort>
inline vec units_in_turn(Shorts a, Shorts b, std::integer_sequence<int, kShort...>) {
  return bit_cast<vec>(
      __builtin_shufflevector(a, b, (kShort / 2 % 2 * 2 * kLanes + kFirst + kShort / 4 + kShort % 2 * kLanes)...));
}
// Units of a's numbers and b's, from number `kFirst` on.
template <int kFirst, int... kShort>
inline vec units_of(Shorts a, Shorts b, std::integer_sequence<int, kShort...>) {
  return bit_cast<vec>(__builtin_shufflevector(a, b, (kShort % 2 * 2 * kLanes + kFirst + kShort / 2)...));
}
constexpr std::make_integer_sequence<int, 2 * kLanes> kEveryShort;
// Units of the numbers in a vector's first half and those in its second.
template <int... kShort>
inline vec units_of_halves(Shorts v, std::integer_sequence<int, kShort...>) {
  return bit_cast<vec>(__builtin_shufflevector(v, v, (kShort % 2 * kLanes + kShort / 2)...));
}

inline Shorts round_to_shorts(vec first, vec second) { return bit_cast<Shorts>(round_to_units(first, second)); }

inline vec make_units(bits low, bits high) { return bit_cast<vec>(low | (high << 16)); }
inline float make_unit(Bfloat16 low, Bfloat16 high) {
  return bit_cast<float>(static_cast<uint32_t>(low.bits) | static_cast<uint32_t>(high.bits) << 16);
}

// Units of n numbers and n others; `high` may be null for zeros.
inline void interleave(const float* low, const float* high, int64_t n, float* units) {
  int64_t c = 0;
  for (; c + kLanes <= n; c += kLanes)
    store(units + c, make_units(widen(round_to_bfloat16(load(low + c))),
                                high == nullptr ? bits{} : widen(round_to_bfloat16(load(high + c)))));
  for (; c < n; ++c) {
    Bfloat16 a, b{0};
    put(&a, low[c]);
    if (high != nullptr) put(&b, high[c]);
    units[c] = make_unit(a, b);
  }
}

// Units of 2 n numbers that follow one another.
inline void round_row(const float* values, int64_t n, float* units) {
  int64_t c = 0;
  for (; c + kLanes <= n; c += kLanes) {
    store(units + c, round_to_units(load(values + 2 * c), load(values + 2 * c + kLanes)));
  }
  for (; c < n; ++c) {
    Bfloat16 a, b;
    put(&a, values[2 * c]);
    put(&b, values[2 * c + 1]);
    units[c] = make_unit(a, b);
  }
}

inline float unit_at(const Bfloat16* p, int64_t stride) { return make_unit(p[0], p[stride]); }

inline void pack_row(const Bfloat16* src, int64_t stride, int64_t n, float* dst) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(dst + i, make_units(widen(src + i), widen(src + stride + i)));
  for (; i < n; ++i) dst[i] = make_unit(src[i], src[stride + i]);
}

#endif

}  // namespace
}  // namespace FUSEDRES_CAPABILITY
}  // namespace fusedres
