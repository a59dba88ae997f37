// The program that is compiled for a device: every kernel of kernels.cuh by its name.
#include "kernels.cuh"

#define FUSEDRES_ENTRY(NAME, TYPE, V)                                                           \
  extern "C" __global__ void __launch_bounds__(fusedres::gpu::kThreads, fusedres::gpu::kBlocks) \
      NAME(const fusedres::gpu::TYPE<fusedres::gpu::Stored, V>::Args args) {                    \
    fusedres::gpu::run<fusedres::gpu::TYPE<fusedres::gpu::Stored, V>>(args);                    \
  }
FUSEDRES_MAP_KERNELS(FUSEDRES_ENTRY)
FUSEDRES_CHANNEL_KERNELS(FUSEDRES_ENTRY)
