// The passes for AVX2 with FMA and F16C.
#if defined(__x86_64__)
// Standard headers come before the target switch: nothing of theirs may be compiled for it.
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "passes.h"

#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#define FUSEDRES_CAPABILITY avx2_capability
#define FUSEDRES_LANES 8
#include "passes_engine.h"

namespace fusedres {
const PassKernels pass_kernels_avx2 = avx2_capability::kernels;
}  // namespace fusedres
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
