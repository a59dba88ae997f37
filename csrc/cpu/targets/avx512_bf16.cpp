// The convolutions in bfloat16 for AVX-512 with its dot product of pairs (AVX512_BF16); everything else is as for
// AVX-512.
#if defined(__x86_64__)
#if __has_include(<avx512bf16intrin.h>)
#define FUSEDRES_TARGET_AVX512_BF16
#include "cpu/begin_target.h"
// behind the switch
#include "cpu/conv-inl.h"

namespace fusedres {
const ConvKernelsOf<Bfloat16> conv_kernels_avx512_bf16 = avx512_bf16_capability::conv_kernels;
}  // namespace fusedres
#include "cpu/end_target.h"
#else
#include "cpu/conv.h"

namespace fusedres {
const ConvKernelsOf<Bfloat16> conv_kernels_avx512_bf16 = {};
}  // namespace fusedres
#endif
#endif
