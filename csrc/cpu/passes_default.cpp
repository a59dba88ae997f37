// The passes for any CPU of the architecture (SSE2 or NEON).
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "passes.h"

#define FUSEDRES_CAPABILITY default_capability
#define FUSEDRES_LANES 4
#include "passes_engine.h"

namespace fusedres {
const PassKernels pass_kernels_default = default_capability::kernels;
}  // namespace fusedres
