// Vectors of one register, by GCC's vector extensions, which Clang shares.
#pragma once

#include <cstdint>

namespace fusedres {
namespace FUSEDRES_CAPABILITY {
namespace {

constexpr int kRegister = 4 * FUSEDRES_LANES;  // bytes

template <class A>
struct Vector;
template <>
struct Vector<float> {
  typedef float type __attribute__((vector_size(kRegister)));
  typedef int32_t integer __attribute__((vector_size(kRegister)));
};
template <>
struct Vector<double> {
  typedef double type __attribute__((vector_size(kRegister)));
  typedef int64_t integer __attribute__((vector_size(kRegister)));
};

using VecF = Vector<float>::type;
using VecI = Vector<float>::integer;
using VecD = Vector<double>::type;

template <class To, class From>
inline To bit_cast(From value) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast between sizes");
  To result;
  __builtin_memcpy(&result, &value, sizeof(To));
  return result;
}

template <class V, class T>
inline V read(const T* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof(V));
  return v;
}

template <class V, class T>
inline void write(T* p, V v) {
  __builtin_memcpy(p, &v, sizeof(V));
}

constexpr int kLanes = FUSEDRES_LANES;  // floats of a register

#if FUSEDRES_LANES == 16
#define FUSEDRES_LOW 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define FUSEDRES_HIGH 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#elif FUSEDRES_LANES == 8
#define FUSEDRES_LOW 0, 8, 1, 9, 2, 10, 3, 11
#define FUSEDRES_HIGH 4, 12, 5, 13, 6, 14, 7, 15
#else
#define FUSEDRES_LOW 0, 4, 1, 5
#define FUSEDRES_HIGH 2, 6, 3, 7
#endif

// Writes the columns of kLanes rows as rows: log2(kLanes) rounds of interleaving the first half of the rows with the
// second. `read(i)` is row i, `write(j, column j)` takes the result.
template <class Read, class Write>
inline void transpose(Read&& read, Write&& write) {
  VecF rows[kLanes], next[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) rows[i] = read(i);
#pragma GCC unroll 4
  for (int round = 1; round < kLanes; round *= 2) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes / 2; ++i) {
      next[2 * i] = __builtin_shufflevector(rows[i], rows[i + kLanes / 2], FUSEDRES_LOW);
      next[2 * i + 1] = __builtin_shufflevector(rows[i], rows[i + kLanes / 2], FUSEDRES_HIGH);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) rows[i] = next[i];
  }
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) write(i, rows[i]);
}

#undef FUSEDRES_LOW
#undef FUSEDRES_HIGH

}  // namespace
}  // namespace FUSEDRES_CAPABILITY
}  // namespace fusedres
