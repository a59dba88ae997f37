// The convolution kernels for AVX-512 (F, BW, DQ, VL).
#if defined(__x86_64__)
// Standard headers come before the target switch: nothing of theirs may be compiled for it.
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "conv.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#endif
#define FUSEDRES_CAPABILITY avx512_capability
#define FUSEDRES_LANES 16
#include "conv_engine.h"

namespace fusedres {
const ConvKernelsOf<float> conv_kernels_avx512 = {avx512_capability::forward, avx512_capability::dgrad, avx512_capability::wgrad};
}  // namespace fusedres
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
