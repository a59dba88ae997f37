// One pixel of a convolution's operand, with whatever is pending applied while it is loaded.
#pragma once

#include <cstdint>

#include "activation-inl.h"
#include "conv_operand-inl.h"

namespace fusedres {
namespace FUSEDRES_CAPABILITY {
namespace {

// `width` channels of a pixel from `first` on, in float.
inline void load_pixel(const Source& s, int64_t pixel, int64_t first, int64_t width, float* dst) {
  const Value* x = s.map.data + pixel * s.map.stride + first;
  if (s.scale == nullptr) {
    if (s.act.is_relu()) {
      for (int64_t c = 0; c < width; ++c) dst[c] = to_float(x[c]) <= 0.f ? 0.f : to_float(x[c]);
    } else {
      for (int64_t c = 0; c < width; ++c) dst[c] = to_float(x[c]);
      if (s.act.is_other()) activate_row(dst, width, s.act);
    }
    return;
  }
  const float* scale = s.scale + first;
  const float* shift = s.shift + first;
  if (s.q != nullptr && s.second.data != nullptr) {
    const Value* raw = s.second.data + pixel * s.second.stride + first;
    const float* q = s.q + first;
    for (int64_t c = 0; c < width; ++c) dst[c] = scale[c] * to_float(x[c]) + (q[c] * to_float(raw[c]) + shift[c]);
  } else if (s.act.is_relu()) {
    for (int64_t c = 0; c < width; ++c) {
      const float z = scale[c] * to_float(x[c]) + shift[c];
      dst[c] = z <= 0.f ? 0.f : z;  // NaN passes
    }
  } else {
    for (int64_t c = 0; c < width; ++c) dst[c] = scale[c] * to_float(x[c]) + shift[c];
    if (s.act.is_other()) activate_row(dst, width, s.act);
  }
}

}  // namespace
}  // namespace FUSEDRES_CAPABILITY
}  // namespace fusedres
