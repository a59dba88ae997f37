// Narrow groups abreast: a group reads as many channels as it writes, a power of two from two to a vector's lanes, so
// that a vector of the map holds whole groups. A lane needs the channels of its group one after the other: the vector
// is shuffled within its groups once for each, and every lane works.
#pragma once

#include <cstdint>

#include "conv_gemm-inl.h"
#include "conv_grid-inl.h"

namespace fusedres {
namespace FUSEDRES_CAPABILITY {
namespace {

#if FUSEDRES_LANES == 8 || (FUSEDRES_LANES == 4 && defined(__x86_64__))
constexpr int kAbreastSums = 8;  // of 16 registers
#else
constexpr int kAbreastSums = 16;  // of 32 registers
#endif
// As many as there are registers for their addresses, or for the weights beside them.
constexpr int abreast_rows(int of_group) { return of_group == kLanes ? 10 : 8; }

template <int... kLane>
struct LaneList {};
#if FUSEDRES_LANES == 16
using EveryLane = LaneList<0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15>;
#elif FUSEDRES_LANES == 8
using EveryLane = LaneList<0, 1, 2, 3, 4, 5, 6, 7>;
#else
using EveryLane = LaneList<0, 1, 2, 3>;
#endif

template <int kOf, int kChannel, int... kLane>
inline vec of_group(vec channels, LaneList<kLane...>) {
  return __builtin_shufflevector(channels, channels, (kLane / kOf * kOf + kChannel)...);
}

// Lanes of 128 bits, each twice: `kHalf` of a group of two. Shuffles within these lanes follow; without the
// barrier the compiler would make one across them of both.
template <int kHalf, int... kLane>
inline vec half_of_group(vec channels, LaneList<kLane...>) {
  vec half = __builtin_shufflevector(channels, channels, (kLane / 8 * 8 + 4 * kHalf + kLane % 4)...);
  __asm__("" : "+v"(half));
  return half;
}

// body(c, i, channel c of vector i) for the channels of a group of kOf: in each lane that of the lane's own group. Of
// every vector before the next channel: what is added up of one vector alone would wait for itself.
template <int kOf, int kFirst = 0, int R, class F>
inline __attribute__((always_inline)) void each_channel(const vec (&channels)[R], F&& body) {
  if constexpr (kOf == 8) {
    vec half[R];
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i) half[i] = half_of_group<0>(channels[i], EveryLane{});
    each_channel<4>(half, body);
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i) half[i] = half_of_group<1>(channels[i], EveryLane{});
    each_channel<4>(half, [&](int c, int i, vec value) __attribute__((always_inline)) { body(4 + c, i, value); });
  } else if constexpr (kFirst < kOf) {
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i) body(kFirst, i, of_group<kOf, kFirst>(channels[i], EveryLane{}));
    each_channel<kOf, kFirst + 1>(channels, body);
  }
}

// One tap of multiply_abreast for the rows from kFirst on, a few at a time.
template <int kOf, int kFirst, int R>
inline __attribute__((always_inline)) void multiply_rows(const float* const (&a)[R], int64_t offset,
                                                         const vec (&weights)[kOf], vec (&acc)[R]) {
  constexpr int kRows = R - kFirst < 4 ? R - kFirst : 4;
  if constexpr (kRows > 0) {
    vec values[kRows];
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) values[i] = load(a[kFirst + i] + offset);
    each_channel<kOf>(
        values, [&](int k, int i, vec value) __attribute__((always_inline)) { acc[kFirst + i] += value * weights[k]; });
    multiply_rows<kOf, kFirst + kRows>(a, offset, weights, acc);
  }
}

// c[R pixels x a vector] = the products of their rows with b, a vector for each tap and channel. A tap reads
// offsets[tap] behind a pixel's base.
template <int kOf, int R>
__attribute__((noinline)) void multiply_abreast(const float* scratch, const int64_t* base, const int64_t* offsets,
                                                int taps, const float* b, float* c, int64_t ldc) {
  vec acc[R];
  const float* a[R];
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i) {
    a[i] = scratch + base[i];
    acc[i] = vec{};
  }
  for (int t = 0; t < taps; ++t, b += kOf * kLanes) {
    if constexpr (kOf == kLanes) {
#pragma GCC unroll 16
      for (int k = 0; k < kOf; ++k) {
        const vec weights = load(b + k * kLanes);
#pragma GCC unroll 16
        for (int i = 0; i < R; ++i) acc[i] += read<float>(a[i] + offsets[t] + k) * weights;
      }
    } else {
      vec weights[kOf];
#pragma GCC unroll 16
      for (int k = 0; k < kOf; ++k) weights[k] = load(b + k * kLanes);
      multiply_rows<kOf, 0>(a, offsets[t], weights, acc);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i) store(c + i * ldc, acc[i]);
}

using MultiplyAbreast = void (*)(const float*, const int64_t*, const int64_t*, int, const float*, float*, int64_t);

// c[T taps x kOf channels x a vector] (+)= sum over pixels of a[pixel] through the tap * g[pixel].
template <int kOf, int T>
__attribute__((noinline)) void outer_abreast(const float* scratch, const int64_t* base, const int64_t* offsets,
                                             const float* g, const int64_t* g_base, int64_t pixels, float* c,
                                             int64_t ldc, bool first, Ahead ahead) {
  vec acc[T][kOf];
  const float* a[T];
#pragma GCC unroll 16
  for (int t = 0; t < T; ++t) {
    a[t] = scratch + offsets[t];
#pragma GCC unroll 16
    for (int k = 0; k < kOf; ++k) acc[t][k] = vec{};
  }
  const auto step = [&](int64_t m) __attribute__((always_inline)) {
    const vec gradient = load(g + g_base[m]);
    const int64_t from = base[m];
    if constexpr (kOf == kLanes) {
#pragma GCC unroll 16
      for (int t = 0; t < T; ++t)
#pragma GCC unroll 16
        for (int k = 0; k < kOf; ++k) acc[t][k] += read<float>(a[t] + from + k) * gradient;
    } else {
      vec values[T];
#pragma GCC unroll 16
      for (int t = 0; t < T; ++t) values[t] = load(a[t] + from);
      each_channel<kOf>(values,
                        [&](int k, int t, vec value) __attribute__((always_inline)) { acc[t][k] += value * gradient; });
    }
  };
  for (int64_t m = ahead.accompany(0, pixels, step); m < pixels; ++m) step(m);
#pragma GCC unroll 16
  for (int t = 0; t < T; ++t)
#pragma GCC unroll 16
    for (int k = 0; k < kOf; ++k, c += ldc) store(c, first ? acc[t][k] : acc[t][k] + load(c));
}

using OuterAbreast = void (*)(const float*, const int64_t*, const int64_t*, const float*, const int64_t*, int64_t,
                              float*, int64_t, bool, Ahead);

struct AbreastKernels {
  MultiplyAbreast multiply[kMaxRows + 1];
  int rows;
  OuterAbreast outer[kAbreastSums + 1];  // by taps
  int taps;                              // at most
};

template <int kOf, int R>
void fill_abreast(AbreastKernels& k) {
  if constexpr (R > 0) {
    if constexpr (R <= abreast_rows(kOf)) k.multiply[R] = multiply_abreast<kOf, R>;
    if constexpr (R * kOf <= kAbreastSums) k.outer[R] = outer_abreast<kOf, R>;
    fill_abreast<kOf, R - 1>(k);
  }
}

template <int kOf>
const AbreastKernels& abreast_kernels_of() {
  static const AbreastKernels table = [] {
    AbreastKernels k{};
    fill_abreast<kOf, (abreast_rows(kOf) > kAbreastSums ? abreast_rows(kOf) : kAbreastSums)>(k);
    k.rows = abreast_rows(kOf);
    k.taps = kAbreastSums / kOf;
    return k;
  }();
  return table;
}

// For groups of so many channels.
inline const AbreastKernels& abreast_kernels(int64_t of_group) {
  // no code for more channels than there are lanes
  constexpr int kFour = kLanes < 4 ? kLanes : 4, kEight = kLanes < 8 ? kLanes : 8;
  switch (of_group) {
    case 2: return abreast_kernels_of<2>();
    case 4: return abreast_kernels_of<kFour>();
    case 8: return abreast_kernels_of<kEight>();
    default: return abreast_kernels_of<kLanes>();
  }
}

// How far behind a pixel's base its taps are read; returns how many there are.
inline int tap_offsets(const Problem& p, int64_t* offsets) {
  const int64_t pitch = p.scratch_pitch({});
  int count = 0;
  for (int i = 0; i < p.h.taps; ++i)
    for (int j = 0; j < p.w.taps; ++j) offsets[count++] = p.shift(i, j) * pitch;
  return count;
}

}  // namespace
}  // namespace FUSEDRES_CAPABILITY
}  // namespace fusedres
