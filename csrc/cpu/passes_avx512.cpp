// The passes for AVX-512 (F, BW, DQ, VL).
#if defined(__x86_64__)
// Standard headers come before the target switch: nothing of theirs may be compiled for it.
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "passes.h"

#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif
#define FUSEDRES_CAPABILITY avx512_capability
#define FUSEDRES_LANES 16
#include "passes_engine.h"

namespace fusedres {
const PassKernels pass_kernels_avx512 = avx512_capability::kernels;
}  // namespace fusedres
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
