// How kernels share out work without knowing torch.
#pragma once

#include <cstdint>

namespace fusedres {

// Runs body(context, begin, end) over a partition of [0, n); results never depend on the partition.
using Parallel = void (*)(int64_t n, void (*body)(void*, int64_t, int64_t), void* context);

}  // namespace fusedres
