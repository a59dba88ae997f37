// The kernels of a program, by their names, which fusedres/backends/nvrtc.py knows: for maps of FUSEDRES_STORAGE (F16,
// BF16, float, double) those over maps with FUSEDRES_OF_MAPS, each twice, for accesses of 16 bytes and of one value;
// with FUSEDRES_OF_CHANNELS those over numbers per channel.
#pragma once

#include "batchnorm.cuh"
#include "elementwise.cuh"
#include "highway.cuh"
#include "pool.cuh"

namespace fusedres {
namespace gpu {
using Stored = FUSEDRES_STORAGE;
// Of a multiprocessor at the least: what bounds the registers of a thread, and keeps compilers from spilling for more.
constexpr int kBlocks = sizeof(Stored) == 8 ? 1 : 2;
}  // namespace gpu
}  // namespace fusedres

// KERNEL(name, type, values side by side)
#define FUSEDRES_BOTH(KERNEL, NAME, TYPE)                                                \
  KERNEL(NAME##_wide, TYPE, fusedres::gpu::kWidest / int(sizeof(fusedres::gpu::Stored))) \
  KERNEL(NAME##_narrow, TYPE, 1)

#ifdef FUSEDRES_OF_MAPS
#define FUSEDRES_MAP_KERNELS(KERNEL)                      \
  FUSEDRES_BOTH(KERNEL, add_act_forward, AddActForward)   \
  FUSEDRES_BOTH(KERNEL, add_act_backward, AddActBackward) \
  FUSEDRES_BOTH(KERNEL, pool_forward, PoolForward)        \
  FUSEDRES_BOTH(KERNEL, pool_backward, PoolBackward)      \
  FUSEDRES_BOTH(KERNEL, highway_forward, HighwayForward)  \
  FUSEDRES_BOTH(KERNEL, highway_backward, HighwayBackward)
#else
#define FUSEDRES_MAP_KERNELS(KERNEL)
#endif

#ifdef FUSEDRES_OF_CHANNELS
#define FUSEDRES_CHANNEL_KERNELS(KERNEL)     \
  KERNEL(merge, Merge, 1)                    \
  KERNEL(bn_coefficients, BnCoefficients, 1) \
  KERNEL(bn_backward, BnBackward, 1)
#else
#define FUSEDRES_CHANNEL_KERNELS(KERNEL)
#endif
