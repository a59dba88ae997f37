// What the bindings share: tensors and activations, checked and taken apart.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>

#include "activation.h"

namespace fusedres {

using torch::stable::Tensor;
using torch::headeronly::ScalarType;
using OptionalTensor = std::optional<Tensor>;

// The dtype of arithmetic and per-channel tensors for maps of `dtype`.
inline ScalarType accum_of(ScalarType dtype) { return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float; }

// Row `row` of a [rows, channels] per-channel tensor, possibly a column slice of a wider one.
inline void* row_of(const Tensor& t, int64_t rows, int64_t row, int64_t channels, ScalarType dtype, const char* name) {
  STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == rows && t.size(1) == channels, name, " must be [", rows, ", ", channels, "], found ",
                  t.dim(), " dimensions of ", t.numel(), " elements");
  STD_TORCH_CHECK(t.scalar_type() == dtype, name, " must be ", dtype == ScalarType::Double ? "float64" : "float32",
                  ", the dtype of arithmetic for the map");
  STD_TORCH_CHECK(channels <= 1 || t.stride(1) == 1, name, " must hold its channels side by side (stride(1) == 1), found a stride of ",
                  t.stride(1));
  const int64_t bytes = dtype == ScalarType::Double ? 8 : 4;
  return static_cast<char*>(t.data_ptr()) + row * t.stride(0) * bytes;
}

inline Activation activation_of(int64_t act, double slope) {
  STD_TORCH_CHECK(act >= 0 && act < kActs, "no activation has the number ", act);
  return {static_cast<Act>(act), slope};
}

}  // namespace fusedres
