#include "memory.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace fusedres {

void* allocate(int64_t bytes) {
  constexpr int64_t kVector = 64;
  void* data = std::aligned_alloc(kVector, static_cast<size_t>((bytes + 2 * kVector - 1) / kVector * kVector));
  if (data == nullptr)
    throw std::runtime_error("fusedres: not enough memory for " + std::to_string(bytes) + " bytes of scratch");
  return data;
}

}  // namespace fusedres
