// Begins the code for one instruction set, which a file of targets/ names by FUSEDRES_TARGET_DEFAULT, _AVX2, _AVX512 or
// _AVX512_BF16; end_target.h ends it. Between the two, the -inl.h files define everything once more in a namespace of
// its own. For them
//
//   FUSEDRES_CAPABILITY  is that namespace
//   FUSEDRES_LANES       the floats of a register
//   FUSEDRES_PAIRS       defined where convolutions multiply pairs of bfloat16
//
// Every header that is not of this kind comes before the switch: nothing of theirs may be compiled for it. For the same
// reason no template of the standard library is instantiated behind it: such functions are shared between translation
// units at link time, and a copy compiled for AVX-512 could be the one that an older machine runs.
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <utility>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "activation.h"
#include "conv.h"
#include "kept.h"
#include "memory.h"
#include "parallel.h"
#include "passes.h"
#include "storage.h"

#if defined(FUSEDRES_TARGET_DEFAULT)  // SSE2 or NEON

#define FUSEDRES_CAPABILITY default_capability
#define FUSEDRES_LANES 4

#elif defined(FUSEDRES_TARGET_AVX2)

#define FUSEDRES_CAPABILITY avx2_capability
#define FUSEDRES_LANES 8
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

#elif defined(FUSEDRES_TARGET_AVX512)

#define FUSEDRES_CAPABILITY avx512_capability
#define FUSEDRES_LANES 16
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif

#elif defined(FUSEDRES_TARGET_AVX512_BF16)

#define FUSEDRES_CAPABILITY avx512_bf16_capability
#define FUSEDRES_LANES 16
#define FUSEDRES_PAIRS
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif

#else
#error "a file of targets/ says which instruction set it is for"
#endif
