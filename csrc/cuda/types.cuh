// What the kernels are written in: one source for NVRTC, nvcc, hipcc and, in tests, a host's C++ compiler.
//
// A map is stored as F16, BF16, float or double; all arithmetic is in AccumOf of it. Nothing is included on a device:
// NVRTC has the functions of math.h built in, and conversions are instructions.
#pragma once

#if defined(__CUDACC__) || defined(__HIPCC__)
#define FUSEDRES_ON_DEVICE 1
#define FUSEDRES_HD __device__ __forceinline__
#define FUSEDRES_UNROLL _Pragma("unroll")
#else
#define FUSEDRES_ON_DEVICE 0
#define FUSEDRES_HD inline
#define FUSEDRES_UNROLL
#include <cmath>
#include <cstring>
#endif

namespace fusedres {
namespace gpu {

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using i64 = long long;
using u64 = unsigned long long;

// Threads of a block, of every kernel.
constexpr int kThreads = 256;
// Bytes of the widest access.
constexpr int kWidest = 16;

struct F16 {
  u16 bits;
};
struct BF16 {
  u16 bits;
};

template <class T>
struct Storage {
  using Accum = float;
};
template <>
struct Storage<double> {
  using Accum = double;
};
template <class T>
using AccumOf = typename Storage<T>::Accum;

FUSEDRES_HD u32 bits_of(float x) {
#if FUSEDRES_ON_DEVICE
  return __float_as_uint(x);
#else
  u32 bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
#endif
}

FUSEDRES_HD float float_of(u32 bits) {
#if FUSEDRES_ON_DEVICE
  return __uint_as_float(bits);
#else
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
#endif
}

// ---- loads and stores of one value: exact, and rounded to nearest even ------------------------------------------

FUSEDRES_HD float loaded(float x) { return x; }
FUSEDRES_HD double loaded(double x) { return x; }
FUSEDRES_HD float loaded(BF16 x) { return float_of(u32(x.bits) << 16); }

FUSEDRES_HD float loaded(F16 x) {
#if defined(__CUDACC__)
  float found;
  asm("cvt.f32.f16 %0, %1;" : "=f"(found) : "h"(x.bits));
  return found;
#elif defined(__HIPCC__)
  return float(__builtin_bit_cast(_Float16, x.bits));
#else
  const u32 sign = u32(x.bits & 0x8000u) << 16, magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return float_of(sign | 0x7f800000u | (magnitude << 13));
  // as an integer times 2^-24 below the smallest normal number
  if (magnitude < 0x400u) return float_of(sign | bits_of(float(magnitude) * 0x1p-24f));
  return float_of(sign | ((magnitude << 13) + (112u << 23)));
#endif
}

FUSEDRES_HD void round_to(float& to, float x) { to = x; }
FUSEDRES_HD void round_to(double& to, double x) { to = x; }

FUSEDRES_HD void round_to(BF16& to, float x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(to.bits) : "f"(x));
#else
  const u32 bits = bits_of(x);
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  to.bits = u16(is_nan ? (bits >> 16) | 64u : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
#endif
}

FUSEDRES_HD void round_to(F16& to, float x) {
#if defined(__CUDACC__)
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(to.bits) : "f"(x));
#elif defined(__HIPCC__)
  to.bits = __builtin_bit_cast(u16, _Float16(x));
#else
  const u32 bits = bits_of(x), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  u32 found;
  if (magnitude > 0x7f800000u) {
    found = 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {
    found = 0x7c00u;  // from half a step above the largest number on
  } else if (magnitude < 0x38800000u) {
    // a sum with 1/2 has no bits below 2^-24, the step of subnormal numbers
    found = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    found = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  to.bits = u16(sign | found);
#endif
}

template <class T>
FUSEDRES_HD T rounded(AccumOf<T> x) {
  T to;
  round_to(to, x);
  return to;
}

// ---- V values side by side ---------------------------------------------------------------------------------------

template <class T, int V>
struct alignas(sizeof(T) * V) Vec {
  T v[V];
};

// Whose address sizeof(T) * V divides.
template <class T, int V>
FUSEDRES_HD Vec<T, V> load(const T* at) {
  return *reinterpret_cast<const Vec<T, V>*>(at);
}

template <class T, int V>
FUSEDRES_HD void store(T* at, const Vec<T, V>& values) {
#if defined(__CUDACC__)
  if constexpr (sizeof values == kWidest) {
    // in words: NVIDIA's compiler stores the pieces of a structure one by one
    union {
      Vec<T, V> values;
      u32 words[4];
    } both;
    both.values = values;
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(at)), "r"(both.words[0]),
                 "r"(both.words[1]), "r"(both.words[2]), "r"(both.words[3])
                 : "memory");
    return;
  }
#endif
  *reinterpret_cast<Vec<T, V>*>(at) = values;
}

// ---- numbers -----------------------------------------------------------------------------------------------------

template <class N>
FUSEDRES_HD N least(N a, N b) {
  return b < a ? b : a;
}

FUSEDRES_HD i64 ceiling(i64 a, i64 b) { return (a + b - 1) / b; }

// a / b of numbers that are not negative: of 32 bits, which is several times faster, where both fit.
FUSEDRES_HD i64 quotient(i64 a, i64 b) { return ((a | b) >> 32) == 0 ? i64(u32(a) / u32(b)) : a / b; }

FUSEDRES_HD float exponential(float x) { return ::expf(x); }
FUSEDRES_HD double exponential(double x) { return ::exp(x); }
FUSEDRES_HD float error_function(float x) { return ::erff(x); }
FUSEDRES_HD double error_function(double x) { return ::erf(x); }
FUSEDRES_HD float root(float x) { return ::sqrtf(x); }
FUSEDRES_HD double root(double x) { return ::sqrt(x); }

}  // namespace gpu
}  // namespace fusedres
