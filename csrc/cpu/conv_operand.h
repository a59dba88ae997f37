// How a convolution's numbers are stored, and how two operands are multiplied: what differs between float32 and bfloat16.
//
// The engine multiplies *units* of four bytes. In float32 a unit is a number. In bfloat16 it is a pair of numbers that follow one another along
// the sum (two channels; two pixels in the weight gradient), and the processor's dot product of pairs adds both products to a float: the
// same loops over half as many units, at twice the rate. A scratch holds the bits of units in floats.
//
// Included by conv_engine.h, within its namespace, behind its vectors; with FUSEDRES_PAIRS for bfloat16.

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

inline float to_float(float value) { return value; }
inline void put(float* p, float value) { *p = value; }

#ifndef FUSEDRES_PAIRS

inline vec multiply_add(vec sum, float a, vec b) { return sum + a * b; }
inline vec load_units(const float* p) { return load(p); }

#else

typedef int32_t bits __attribute__((vector_size(4 * FUSEDRES_LANES)));

template <class To, class From>
inline To reinterpret(From value) {
  static_assert(sizeof(To) == sizeof(From), "the same bits");
  To result;
  std::memcpy(&result, &value, sizeof(To));
  return result;
}

inline vec multiply_add(vec sum, float a, vec b) {
  return reinterpret<vec>(_mm512_dpbf16_ps(reinterpret<__m512>(sum), reinterpret<__m512bh>(_mm512_set1_ps(a)), reinterpret<__m512bh>(b)));
}

inline float to_float(Bfloat16 value) { return reinterpret<float>(static_cast<uint32_t>(value.bits) << 16); }

// The bits of 16 values, each in its lane.
inline bits widen(__m256i values) { return reinterpret<bits>(_mm512_maskz_cvtepu16_epi32(0xffff, values)); }
inline bits widen(const Bfloat16* p) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
inline __m256i round_to_bfloat16(vec v) { return reinterpret<__m256i>(_mm512_maskz_cvtneps_pbh(0xffff, reinterpret<__m512>(v))); }

inline vec load(const Bfloat16* p) { return reinterpret<vec>(widen(p) << 16); }
inline void store(Bfloat16* p, vec v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), round_to_bfloat16(v)); }
inline void put(Bfloat16* p, float value) { p->bits = static_cast<uint16_t>(_mm256_extract_epi16(round_to_bfloat16(vec{} + value), 0)); }

// Units of numbers that lie side by side.
inline vec load_units(const Bfloat16* p) { return reinterpret<vec>(_mm512_loadu_ps(reinterpret_cast<const float*>(p))); }

inline vec round_to_units(vec first, vec second) { return reinterpret<vec>(_mm512_cvtne2ps_pbh(reinterpret<__m512>(second), reinterpret<__m512>(first))); }
inline vec make_units(bits low, bits high) { return reinterpret<vec>(low | (high << 16)); }
inline float make_unit(Bfloat16 low, Bfloat16 high) { return reinterpret<float>(static_cast<uint32_t>(low.bits) | static_cast<uint32_t>(high.bits) << 16); }

// Units of n numbers and n others; `high` may be null for zeros.
inline void interleave(const float* low, const float* high, int64_t n, float* units) {
  int64_t c = 0;
  for (; c + kLanes <= n; c += kLanes)
    store(units + c, make_units(widen(round_to_bfloat16(load(low + c))), high == nullptr ? bits{} : widen(round_to_bfloat16(load(high + c)))));
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

#endif
