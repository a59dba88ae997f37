// Every kernel for AVX-512 (F, BW, DQ, VL).
#if defined(__x86_64__)
#define FUSEDRES_TARGET_AVX512
#include "cpu/begin_target.h"
// behind the switch
#include "cpu/conv-inl.h"
#include "cpu/passes-inl.h"

namespace fusedres {
const ConvKernelsOf<float> conv_kernels_avx512 = avx512_capability::conv_kernels;
const PassKernels pass_kernels_avx512 = avx512_capability::pass_kernels;
}  // namespace fusedres
#include "cpu/end_target.h"
#endif
