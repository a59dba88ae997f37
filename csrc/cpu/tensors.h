// What the bindings share: tensors and activations, checked and taken apart, and torch's threads.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>

#include "activation.h"
#include "passes.h"

namespace fusedres {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline void parallel(int64_t n, void (*body)(void*, int64_t, int64_t), void* context) {
  torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) { body(context, begin, end); });
}

// The dtype of arithmetic and per-channel tensors for maps of `dtype`.
inline ScalarType accum_of(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Row `row` of a [rows, channels] per-channel tensor, possibly a column slice of a wider one.
inline void* row_of(const Tensor& t, int64_t rows, int64_t row, int64_t channels, ScalarType dtype, const char* name) {
  STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == rows && t.size(1) == channels, name, " must be [", rows, ", ", channels,
                  "], found ", t.dim(), " dimensions of ", t.numel(), " elements");
  STD_TORCH_CHECK(t.scalar_type() == dtype, name, " must be ", dtype == ScalarType::Double ? "float64" : "float32",
                  ", the dtype of arithmetic for the map");
  STD_TORCH_CHECK(channels <= 1 || t.stride(1) == 1, name,
                  " must hold its channels side by side (stride(1) == 1), found a stride of ", t.stride(1));
  const int64_t bytes = dtype == ScalarType::Double ? 8 : 4;
  return static_cast<char*>(t.data_ptr()) + row * t.stride(0) * bytes;
}

// A channels_last map or channel slice; dimensions of one element have any stride.
inline Rows map_of(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.dim() == 4, name, " must have 4 dimensions, found ", t.dim());
  const auto size = t.sizes(), stride = t.strides();
  const int64_t n = size[0], c = size[1], h = size[2], w = size[3];
  const int64_t pitch = w > 1 ? stride[3] : h > 1 ? stride[2] : n > 1 ? stride[0] : c;
  const bool rows = t.numel() == 0 || ((c == 1 || stride[1] == 1) && pitch >= c && (h == 1 || stride[2] == w * pitch) &&
                                       (n == 1 || stride[0] == h * w * pitch));
  STD_TORCH_CHECK(rows, name, " must be channels_last or a channel slice of a channels_last map, found sizes (", n,
                  ", ", c, ", ", h, ", ", w, ") with strides (", stride[0], ", ", stride[1], ", ", stride[2], ", ",
                  stride[3], "); call .contiguous(memory_format=torch.channels_last)");
  return {t.data_ptr(), pitch};
}

// That a map has the shape of another.
inline void check_shape(const Tensor& t, const Tensor& like, const char* name) {
  const auto found = t.sizes(), expected = like.sizes();
  for (int i = 0; i < 4; ++i)
    STD_TORCH_CHECK(found[i] == expected[i], name, " must have the shape of the other maps: found ", found[i],
                    " in dimension ", i, ", expected ", expected[i]);
}

inline Activation activation_of(int64_t act, double slope) {
  STD_TORCH_CHECK(act >= 0 && act < kActivations, "no activation has the number ", act, ": there are ", kActivations);
  return {static_cast<Act>(act), slope};
}

}  // namespace fusedres
