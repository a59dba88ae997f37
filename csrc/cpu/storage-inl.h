// The conversions between storage and arithmetic, in vectors of one register. Intrinsics only where a 16-bit type has
// an instruction.
#pragma once

#include <cstdint>

#include "storage.h"
#include "vectors-inl.h"

namespace fusedres {
namespace FUSEDRES_CAPABILITY {
namespace {

typedef uint16_t VecH __attribute__((vector_size(kRegister / 2)));

// The type of arithmetic for a storage type.
template <class T>
struct Accum {
  using type = float;
};
template <>
struct Accum<double> {
  using type = double;
};

template <class T>
using AccumOf = typename Accum<T>::type;
template <class T>
using VecOf = typename Vector<AccumOf<T>>::type;
template <class T>
constexpr int kLanesOf = kRegister / int(sizeof(AccumOf<T>));

inline VecF load(const float* p) { return read<VecF>(p); }
inline void store(float* p, VecF v) { write(p, v); }
inline VecD load(const double* p) { return read<VecD>(p); }
inline void store(double* p, VecD v) { write(p, v); }

// Numbers of 16 bits, each in the low half of its lane, and back. By intrinsics where GCC makes halves of a conversion.
#if FUSEDRES_LANES == 16
inline VecI widen(VecH v) { return bit_cast<VecI>(_mm512_maskz_cvtepu16_epi32(0xffff, bit_cast<__m256i>(v))); }
inline VecH narrow(VecI v) { return bit_cast<VecH>(_mm512_maskz_cvtepi32_epi16(0xffff, bit_cast<__m512i>(v))); }
#else
#if FUSEDRES_LANES == 8
inline VecI widen(VecH v) { return bit_cast<VecI>(_mm256_cvtepu16_epi32(bit_cast<__m128i>(v))); }
#else
inline VecI widen(VecH v) { return __builtin_convertvector(v, VecI); }
#endif
inline VecH narrow(VecI v) { return __builtin_convertvector(v & 0xffff, VecH); }
#endif

inline VecF load(const Bfloat16* p) { return bit_cast<VecF>(widen(read<VecH>(p)) << 16); }
#ifdef FUSEDRES_PAIRS
inline VecH round_to_bfloat16(VecF v) { return bit_cast<VecH>(_mm512_maskz_cvtneps_pbh(0xffff, bit_cast<__m512>(v))); }
inline void store(Bfloat16* p, VecF v) { write(p, round_to_bfloat16(v)); }
#else
inline void store(Bfloat16* p, VecF v) {
  const VecI u = bit_cast<VecI>(v);
  const VecI rounded = u + (0x7fff + ((u >> 16) & 1));    // to nearest, ties to even
  const VecI kept = v == v ? rounded : (u | 0x00400000);  // rounding could carry a NaN into infinity
  write(p, narrow(kept >> 16));
}
#endif

#if FUSEDRES_LANES == 16
inline VecF load(const Float16* p) { return bit_cast<VecF>(_mm512_maskz_cvtph_ps(0xffff, read<__m256i>(p))); }
inline void store(Float16* p, VecF v) {
  write(p, _mm512_maskz_cvtps_ph(0xffff, bit_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT));
}
#elif FUSEDRES_LANES == 8
inline VecF load(const Float16* p) { return bit_cast<VecF>(_mm256_cvtph_ps(read<__m128i>(p))); }
inline void store(Float16* p, VecF v) { write(p, _mm256_cvtps_ph(bit_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT)); }
#else
// Exponent bias 15 against 127: a float16's exponent and mantissa, moved to their places in a float, are the value
// times 2^-112, also where it is subnormal.
inline VecF load(const Float16* p) {
  const VecI h = widen(read<VecH>(p));
  const VecI magnitude = (h & 0x7fff) << 13;
  VecI bits = bit_cast<VecI>(bit_cast<VecF>(magnitude) * 0x1p112f);
  bits = magnitude >= (0x7c00 << 13) ? (magnitude | 0x7f800000) : bits;  // infinity and NaN
  return bit_cast<VecF>(bits | ((h & 0x8000) << 16));
}
inline void store(Float16* p, VecF v) {
  const VecI u = bit_cast<VecI>(v), magnitude = u & 0x7fffffff;
  const VecI normal = (magnitude - (112 << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  // adding 0.5 leaves the 10 bits of a subnormal at the end of the sum, rounded by the addition itself
  const VecI subnormal = bit_cast<VecI>(bit_cast<VecF>(magnitude) + 0.5f) - (126 << 23);
  VecI h = magnitude < (113 << 23) ? subnormal : normal;
  h = magnitude >= (143 << 23) ? 0x7c00 - (magnitude > 0x7f800000) * 0x200 : h;  // a true comparison is -1
  write(p, narrow(h | ((u >> 16) & 0x8000)));
}
#endif

// The first n values, zeros behind them; the store writes n values.
template <class T>
inline VecOf<T> load_part(const T* p, int n) {
  T values[kLanesOf<T>] = {};
  for (int i = 0; i < n; ++i) values[i] = p[i];
  return load(values);
}
template <class T>
inline void store_part(T* p, VecOf<T> v, int n) {
  T values[kLanesOf<T>];
  store(values, v);
  for (int i = 0; i < n; ++i) p[i] = values[i];
}

template <class T, bool kPart>
inline VecOf<T> load_lanes(const T* p, int n) {
  if constexpr (kPart) return load_part(p, n);
  else return load(p);
}
template <class T, bool kPart>
inline void store_lanes(T* p, VecOf<T> v, int n) {
  if constexpr (kPart) store_part(p, v, n);
  else store(p, v);
}

}  // namespace
}  // namespace FUSEDRES_CAPABILITY
}  // namespace fusedres
