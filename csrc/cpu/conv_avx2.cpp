// The convolution kernels for AVX2 and FMA.
#if defined(__x86_64__)
// Standard headers come before the target switch: nothing of theirs may be compiled for it.
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "conv.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#define FUSEDRES_CAPABILITY avx2_capability
#define FUSEDRES_LANES 8
#include "conv_engine.h"

namespace fusedres {
const ConvKernelsOf<float> conv_kernels_avx2 = {avx2_capability::forward, avx2_capability::dgrad, avx2_capability::wgrad};
}  // namespace fusedres
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
