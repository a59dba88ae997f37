// Vectors of one register. Included by the engines, once per CPU capability: FUSEDRES_CAPABILITY names the namespace, FUSEDRES_LANES the
// floats of a register. GCC's vector extensions, which Clang shares.
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

}  // namespace
}  // namespace FUSEDRES_CAPABILITY
}  // namespace fusedres
