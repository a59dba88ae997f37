// The convolution kernels for any CPU of the architecture (SSE2 or NEON).
// Standard headers come before the target switch: nothing of theirs may be compiled for it.
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "conv.h"

#define FUSEDRES_CAPABILITY default_capability
#define FUSEDRES_LANES 4
#include "conv_engine.h"

namespace fusedres {
const ConvKernelsOf<float> conv_kernels_default = {default_capability::forward, default_capability::dgrad, default_capability::wgrad};
}  // namespace fusedres
