// Fresh tensors on a CPU.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <vector>

namespace fusedres {

// Uninitialised; large ones lie in memory that stays here (map_memory.h). `strides` are not negative.
torch::stable::Tensor fresh(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides,
                            torch::headeronly::ScalarType dtype);

}  // namespace fusedres
