#include "capability.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace fusedres {
namespace {

constexpr Capability kAll[] = {Capability::baseline, Capability::avx2, Capability::avx512};

Capability choose() {
  const char* asked = std::getenv("FUSEDRES_CPU_CAPABILITY");
  if (asked == nullptr || *asked == '\0') {
    Capability best = Capability::baseline;
    for (Capability c : kAll)
      if (capability_supported(c)) best = c;
    return best;
  }
  for (Capability c : kAll) {
    if (std::string(asked) != capability_name(c)) continue;
    if (!capability_supported(c))
      throw std::invalid_argument(std::string("FUSEDRES_CPU_CAPABILITY=") + asked +
                                  " is not supported by this CPU; unset it, or set it to default");
    return c;
  }
  throw std::invalid_argument(std::string("FUSEDRES_CPU_CAPABILITY=") + asked + " is not known: expected default, avx2 or avx512");
}

}  // namespace

Capability cpu_capability() {
  static const Capability chosen = choose();
  return chosen;
}

const char* capability_name(Capability capability) {
  switch (capability) {
    case Capability::avx2: return "avx2";
    case Capability::avx512: return "avx512";
    default: return "default";
  }
}

bool capability_supported(Capability capability) {
  if (capability == Capability::baseline) return true;
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (capability == Capability::avx2) return avx2;
  return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl");
#else
  return false;
#endif
}

}  // namespace fusedres
