// How a kernel runs. It is a type with
//
//   Args       what it is launched with: pointers, 64-bit integers and doubles only, so that it is a list of 8 bytes
//   each Shared     what the threads of a block share, Local what a thread keeps; neither has a value at first kPhases
//   how many steps it has, phase(Phase<I>, args, place, shared, local) each of them
//
// and between two phases all threads of a block wait for each other: nothing that a phase reads in Shared is written in
// it by another thread. A device runs a phase on all threads at once; a host (tests) runs the threads one after another
// in any order, phase by phase, which is the same as far as a kernel may know.
#pragma once

#include "types.cuh"

namespace fusedres {
namespace gpu {

template <int I>
struct Phase {};

// Which thread of which block, and how many blocks there are along x.
struct Place {
  int thread;
  i64 x, y;
  i64 blocks;
};

#if FUSEDRES_ON_DEVICE

template <class Kernel, int I = 0>
FUSEDRES_HD void run_phases(const typename Kernel::Args& args, const Place& place, typename Kernel::Shared& shared,
                            typename Kernel::Local& local) {
  Kernel::phase(Phase<I>{}, args, place, shared, local);
  if constexpr (I + 1 < Kernel::kPhases) {
    __syncthreads();
    run_phases<Kernel, I + 1>(args, place, shared, local);
  }
}

template <class Kernel>
FUSEDRES_HD void run(const typename Kernel::Args& args) {
  __shared__ typename Kernel::Shared shared;
  typename Kernel::Local local;
  const Place place{int(threadIdx.x), i64(blockIdx.x), i64(blockIdx.y), i64(gridDim.x)};
  run_phases<Kernel>(args, place, shared, local);
}

#endif

}  // namespace gpu
}  // namespace fusedres
