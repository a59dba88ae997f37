// The kernels of csrc/cuda on a host: blocks and threads in a shuffled order, phase by phase, behind a function of the
// type of CUDA's cuLaunchKernel.
#include <cstdint>
#include <memory>
#include <numeric>
#include <type_traits>
#include <vector>

#include "kernels.cuh"

namespace {

using namespace fusedres::gpu;

// n numbers in another order at every call.
class Shuffled {
 public:
  explicit Shuffled(i64 n) : n_(n), at_(n > 0 ? i64(next() % u64(n)) : 0) {
    do step_ = n > 1 ? 1 + i64(next() % u64(n - 1)) : 1;
    while (std::gcd(step_, n) != 1);
  }
  i64 operator()() { return at_ = (at_ + step_) % n_; }

 private:
  static u64 next() {
    thread_local u64 state = 0x9e3779b97f4a7c15u;
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return state;
  }
  i64 n_, at_, step_;
};

template <class Kernel, int I = 0>
void run_phases(const typename Kernel::Args& args, Place place, typename Kernel::Shared& shared,
                std::vector<typename Kernel::Local>& locals) {
  Shuffled threads(kThreads);
  for (int t = 0; t < kThreads; ++t) {
    place.thread = int(threads());
    Kernel::phase(Phase<I>{}, args, place, shared, locals[place.thread]);
  }
  if constexpr (I + 1 < Kernel::kPhases) run_phases<Kernel, I + 1>(args, place, shared, locals);
}

template <class Kernel>
void run_blocks(const void* parameters, i64 x, i64 y) {
  using Args = typename Kernel::Args;
  static_assert(std::is_trivially_copyable_v<Args> && sizeof(Args) % 8 == 0);
  Args args;
  std::memcpy(&args, parameters, sizeof args);
  Shuffled blocks(x * y);
  for (i64 b = 0; b < x * y; ++b) {
    const i64 block = blocks();
    const auto shared = std::make_unique<typename Kernel::Shared>();
    std::vector<typename Kernel::Local> locals(kThreads);
    // whatever nobody has written is NaN
    std::memset(static_cast<void*>(shared.get()), 0xff, sizeof *shared);
    std::memset(static_cast<void*>(locals.data()), 0xff, kThreads * sizeof(typename Kernel::Local));
    run_phases<Kernel>(args, Place{0, block % x, block / x, x}, *shared, locals);
  }
}

using Run = void (*)(const void* parameters, i64 x, i64 y);

}  // namespace

#define FUSEDRES_ENTRY(NAME, TYPE, V) \
  extern "C" void NAME(const void* parameters, i64 x, i64 y) { run_blocks<TYPE<Stored, V>>(parameters, x, y); }
FUSEDRES_MAP_KERNELS(FUSEDRES_ENTRY)
FUSEDRES_CHANNEL_KERNELS(FUSEDRES_ENTRY)

// As cuLaunchKernel, of a `function` that is one of those above; what it is asked for beyond a grid is an error.
extern "C" int fusedres_launch(void* function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned threads_y,
                               unsigned threads_z, unsigned shared, void*, void** parameters, void** extra) {
  if (z != 1 || threads != kThreads || threads_y != 1 || threads_z != 1 || shared != 0 || extra != nullptr) return 1;
  reinterpret_cast<Run>(function)(parameters[0], x, y);
  return 0;
}
