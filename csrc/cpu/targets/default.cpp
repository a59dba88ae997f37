// Every kernel for any CPU of the architecture (SSE2 or NEON).
#define FUSEDRES_TARGET_DEFAULT
#include "cpu/begin_target.h"
// behind the switch
#include "cpu/conv-inl.h"
#include "cpu/passes-inl.h"

namespace fusedres {
const ConvKernelsOf<float> conv_kernels_default = default_capability::conv_kernels;
const PassKernels pass_kernels_default = default_capability::pass_kernels;
}  // namespace fusedres
#include "cpu/end_target.h"
