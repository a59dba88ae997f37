// The register kernels: small blocks of a matrix product whose sums stay in registers, one function per block's size.
// Every loop over sums is unrolled by a pragma: with an index that is a variable anywhere, they would all be in memory.
#pragma once

#include <cstdint>

#include "conv_operand-inl.h"
#include "conv_sizes-inl.h"
#include "util-inl.h"

namespace fusedres {
namespace FUSEDRES_CAPABILITY {
namespace {

// Lines of memory that will be needed soon, side by side: a register kernel asks for one at each step of its sum, in
// the time that the FMA units take.
struct Ahead {
  const char* first;
  int64_t count;

  // Runs steps from `begin` on, one for each line, but none from `end` on; returns the next.
  template <class F>
  int64_t accompany(int64_t begin, int64_t end, F&& step) const {
    const int64_t stop = least(end, begin + count);
    const char* line = first;
    for (int64_t k = begin; k < stop; ++k, line += 64) {
      __builtin_prefetch(line, 0, 2);
      step(k);
    }
    return stop;
  }
};

constexpr Ahead kNothingAhead{nullptr, 0};

// c[R x V vectors] (+)= a[R rows of `depth`] * b[depth x V vectors], `ldb` floats a row. The sum starts at zero and
// joins c at the end: one chain of additions over all segments would round worse.
template <int R, int V, class Factors>
__attribute__((noinline)) void multiply(const float* scratch, const int64_t* base, const float* b, int64_t ldb,
                                        int64_t depth, float* c, int64_t ldc, bool first, Ahead ahead) {
  vec acc[R][V];
  const float* a[R];
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i) {
    a[i] = scratch + base[i];
#pragma GCC unroll 4
    for (int j = 0; j < V; ++j) acc[i][j] = vec{};
  }
  const auto step = [&](int64_t k) __attribute__((always_inline)) {
    vec weights[V];
#pragma GCC unroll 4
    for (int j = 0; j < V; ++j) weights[j] = load(b + k * ldb + j * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i) {
      // read, because a pair of bfloat16 in its place may begin at an odd channel
      const float value = read<float>(a[i] + k);
#pragma GCC unroll 4
      for (int j = 0; j < V; ++j) acc[i][j] = Factors::multiply_add(acc[i][j], value, weights[j]);
    }
  };
  for (int64_t k = ahead.accompany(0, depth, step); k < depth; ++k) step(k);
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < V; ++j)
      store(c + i * ldc + j * kLanes, first ? acc[i][j] : acc[i][j] + load(c + i * ldc + j * kLanes));
}

using Multiply = void (*)(const float*, const int64_t*, const float*, int64_t, int64_t, float*, int64_t, bool, Ahead);

// c[R x V vectors] (+)= sum over pixels of a[pixel][R consecutive channels] * g[pixel][V vectors], as in multiply; both
// have a base per pixel.
template <int R, int V, class Factors>
__attribute__((noinline)) void outer(const float* a, const int64_t* a_base, const float* g, const int64_t* g_base,
                                     int64_t pixels, float* c, int64_t ldc, bool first, Ahead ahead) {
  vec acc[R][V];
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < V; ++j) acc[i][j] = vec{};
  // the sums of a whole weight do not stay in L2; these lie side by side but where a weight is few pixels' gradient
  const Ahead sums{reinterpret_cast<const char*>(c), (R * V * kLanes + 15) / 16};
  const auto step = [&](int64_t m) __attribute__((always_inline)) {
    const float* from = a + a_base[m];
    const float* other = g + g_base[m];
    vec values[V];
#pragma GCC unroll 4
    for (int j = 0; j < V; ++j) values[j] = load(other + j * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i) {
      const float value = read<float>(from + i);
#pragma GCC unroll 4
      for (int j = 0; j < V; ++j) acc[i][j] = Factors::multiply_add(acc[i][j], value, values[j]);
    }
  };
  for (int64_t m = ahead.accompany(sums.accompany(0, pixels, step), pixels, step); m < pixels; ++m) step(m);
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < V; ++j)
      store(c + i * ldc + j * kLanes, first ? acc[i][j] : acc[i][j] + load(c + i * ldc + j * kLanes));
}

using Outer = void (*)(const float*, const int64_t*, const float*, const int64_t*, int64_t, float*, int64_t, bool,
                       Ahead);

// A stretch of a product's depth: where it begins, from a pixel's base and from the weight's row or column.
struct Run {
  int64_t operand, weight, depth;
};

inline float total(vec v) {
  float lanes[kLanes];
  store(lanes, v);
  for (int step = kLanes / 2; step > 0; step /= 2)
    for (int i = 0; i < step; ++i) lanes[i] += lanes[i + step];
  return lanes[0];
}

// c[R pixels x O outputs] = the products of their rows along `runs`, whose depths are whole vectors: the weight's row
// of an output is read from end to end.
template <int R, int O>
__attribute__((noinline)) void dots(const float* scratch, const int64_t* base, const float* w, int64_t ldw,
                                    const Run* runs, int count, float* c, int64_t ldc) {
  vec acc[R][O];
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < O; ++j) acc[i][j] = vec{};
  for (int run = 0; run < count; ++run) {
    const float* a = scratch + runs[run].operand;
    const float* b = w + runs[run].weight;
    for (int64_t k = 0; k < runs[run].depth; k += kLanes) {
      vec weights[O];
#pragma GCC unroll 4
      for (int j = 0; j < O; ++j) weights[j] = load(b + j * ldw + k);
#pragma GCC unroll 8
      for (int i = 0; i < R; ++i) {
        const vec value = load(a + base[i] + k);
#pragma GCC unroll 4
        for (int j = 0; j < O; ++j) acc[i][j] += value * weights[j];
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < O; ++j) c[i * ldc + j] = total(acc[i][j]);
}

using Dots = void (*)(const float*, const int64_t*, const float*, int64_t, const Run*, int, float*, int64_t);

struct Kernels {
  Multiply multiply[kPanelVectors + 1][kMaxRows + 1], multiply_numbers[kPanelVectors + 1][kMaxRows + 1];
  Outer outer[kPanelVectors + 1][kMaxRows + 1], outer_numbers[kPanelVectors + 1][kMaxRows + 1];
  Dots dots[kDotOutputs + 1][kDotPixels + 1];
};

template <int V, int R>
void fill_rows(Kernels& k) {
  if constexpr (R > 0) {
    k.multiply[V][R] = multiply<R, V, Units>;
    k.multiply_numbers[V][R] = multiply<R, V, Numbers>;
    k.outer[V][R] = outer<R, V, Units>;
    k.outer_numbers[V][R] = outer<R, V, Numbers>;
    fill_rows<V, R - 1>(k);
  }
}

template <int V>
void fill_vectors(Kernels& k) {
  if constexpr (V > 0) {
    fill_rows<V, rows_for(V)>(k);
    fill_vectors<V - 1>(k);
  }
}

template <int R>
void fill_dots(Kernels& k) {
  if constexpr (R > 0) {
    k.dots[1][R] = dots<R, 1>;
    k.dots[kDotOutputs][R] = dots<R, kDotOutputs>;
    fill_dots<R - 1>(k);
  }
}

Kernels make_kernels() {
  Kernels k{};
  fill_vectors<kPanelVectors>(k);
  fill_dots<kDotPixels>(k);
  return k;
}

const Kernels& kernels() {
  static const Kernels table = make_kernels();
  return table;
}

// Splits `total` into the fewest blocks of at most `limit`, as even as can be: a last block of one row would run at a
// sixth of the rate.
inline int64_t even_block(int64_t total, int64_t limit) { return div_up(total, div_up(total, limit)); }

}  // namespace
}  // namespace FUSEDRES_CAPABILITY
}  // namespace fusedres
