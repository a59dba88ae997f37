// Every kernel for AVX2 with FMA and F16C.
#if defined(__x86_64__)
#define FUSEDRES_TARGET_AVX2
#include "cpu/begin_target.h"
// behind the switch
#include "cpu/conv-inl.h"
#include "cpu/passes-inl.h"

namespace fusedres {
const ConvKernelsOf<float> conv_kernels_avx2 = avx2_capability::conv_kernels;
const PassKernels pass_kernels_avx2 = avx2_capability::pass_kernels;
}  // namespace fusedres
#include "cpu/end_target.h"
#endif
