#include "capability.h"

#include "conv.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace fusedres {
namespace {

#if defined(__x86_64__)
// Read from the CPU itself: compilers learnt these names late.
struct Leaf {
  unsigned a = 0, b = 0, c = 0, d = 0;
  explicit Leaf(unsigned sub) {
    if (!__get_cpuid_count(7, sub, &a, &b, &c, &d)) a = b = c = d = 0;
  }
};
bool has_avx512_bf16() { return Leaf(0).a >= 1 && Leaf(1).a >> 5 & 1; }
bool has_amx_bf16() { return Leaf(0).d >> 22 & 1; }
#else
bool has_amx_bf16() { return false; }
#endif

Capability choose() {
  const char* asked = std::getenv("FUSEDRES_CPU_CAPABILITY");
  if (asked == nullptr || *asked == '\0') {
    Capability best = Capability::baseline;
    for (Capability c : kCapabilities)
      if (capability_supported(c) && !(c == Capability::avx512_bf16 && has_amx_bf16())) best = c;
    return best;
  }
  for (Capability c : kCapabilities) {
    if (std::string(asked) != capability_name(c)) continue;
    if (!capability_supported(c))
      throw std::invalid_argument(std::string("FUSEDRES_CPU_CAPABILITY=") + asked +
                                  " is not supported by this CPU; unset it, or set it to default");
    return c;
  }
  throw std::invalid_argument(std::string("FUSEDRES_CPU_CAPABILITY=") + asked +
                              " is not known: expected default, avx2, avx512 or avx512_bf16");
}

}  // namespace

Capability cpu_capability() {
  static const Capability chosen = choose();
  return chosen;
}

const char* capability_name(Capability capability) {
  switch (capability) {
    case Capability::baseline: return "default";
    case Capability::avx2: return "avx2";
    case Capability::avx512: return "avx512";
    case Capability::avx512_bf16: return "avx512_bf16";
  }
  return nullptr;  // of no enumerator
}

bool capability_supported(Capability capability) {
  if (capability == Capability::baseline) return true;
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (capability == Capability::avx2) return avx2;
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return capability == Capability::avx512 ? avx512
                                          : avx512 && has_avx512_bf16() && conv_kernels_avx512_bf16.forward != nullptr;
#else
  return false;
#endif
}

}  // namespace fusedres
