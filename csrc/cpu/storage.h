// The numbers that maps may hold.
#pragma once

#include <cstdint>

namespace fusedres {

enum class Storage { f32, f64, bf16, f16 };

// The 16-bit numbers as they are stored: distinct names for overloading, no arithmetic.
struct Bfloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

}  // namespace fusedres
