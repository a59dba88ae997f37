// The convolution kernels in bfloat16 for AVX-512 with its dot product of pairs (AVX512_BF16).
#if defined(__x86_64__)
// Standard headers come before the target switch: nothing of theirs may be compiled for it.
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "conv.h"

#if __has_include(<avx512bf16intrin.h>)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#endif
#define FUSEDRES_CAPABILITY avx512_bf16_capability
#define FUSEDRES_LANES 16
#define FUSEDRES_PAIRS
#include "conv_engine.h"

namespace fusedres {
const ConvKernelsOf<Bfloat16> conv_kernels_avx512_bf16 = {avx512_bf16_capability::forward, avx512_bf16_capability::dgrad, avx512_bf16_capability::wgrad};
}  // namespace fusedres
#if defined(__clang__)
#pragma clang attribute pop
#endif

#else
namespace fusedres {
const ConvKernelsOf<Bfloat16> conv_kernels_avx512_bf16 = {};
}  // namespace fusedres
#endif
#endif
