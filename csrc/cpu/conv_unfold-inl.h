// Few pixels against a weight that lies as PyTorch allocates it, with a kernel's positions side by side. Unfolded, each
// output pixel has next to it all that it reads, in the weight's own order: a 1x1 convolution of as many channels as an
// output has weights, whose kernels read the weight as it lies (conv_few-inl.h). Packing it, position by position,
// would take several times as long.
#pragma once

#include <cstdint>
#include <cstring>

#include "conv_few-inl.h"
#include "conv_grid-inl.h"
#include "conv_pixel-inl.h"

namespace fusedres {
namespace FUSEDRES_CAPABILITY {
namespace {

// of the calling thread: the operand that other threads read
thread_local Buffer<float> unfolded_operand;

inline Geometry2d unfolded(const Geometry2d& g) {
  return {g.batch, g.out_h, g.out_w, g.in_c * g.kernel_h * g.kernel_w, g.out_h, g.out_w, g.out_c, 1, 1, 1, 1, 0,
          0,       1,       1};
}

inline Weight unfolded(const Weight& w) { return {w.data, w.so, 1, 1, 1}; }

// Whether the 1x1 convolution reads the weight as it lies, of up to `most_pixels`; `rest`: where the last of its
// vectors may overlap the one before.
inline bool unfolds(const Geometry2d& g, const Weight& w, int64_t most_pixels, bool rest = false) {
  const int64_t taps = g.kernel_h * g.kernel_w;
  if (taps == 1 || w.sw != 1 || w.sh != g.kernel_w || w.si != taps) return false;
  const Geometry2d u = unfolded(g);
  Problem p{forward_axis(u.in_h, u.out_h, 1, 1, 0, 1),
            forward_axis(u.in_w, u.out_w, 1, 1, 0, 1),
            u.batch,
            u.in_c,
            u.out_c,
            u.out_h,
            u.out_w};
  return p.plan_few(unfolded(w), rest ? with_rest(u.in_c) : u.in_c, most_pixels);
}

// The operand of all groups unfolded, with what is pending applied and padding as zeros.
inline Source unfold(const Geometry2d& g, int64_t groups, const Source& s, Parallel parallel) {
  const int64_t channels = groups * g.in_c, taps = g.kernel_h * g.kernel_w, depth = channels * taps,
                pixels = g.batch * g.out_h * g.out_w;
  float* to = unfolded_operand.get(pixels * depth);
  run_parallel(parallel, pixels, pixels * depth, [&](int64_t pixel) {
    const int64_t n = pixel / (g.out_h * g.out_w), row = pixel / g.out_w % g.out_h, column = pixel % g.out_w;
    float* window = scratch_a.get(depth);
    float* at = window;
    for (int64_t i = 0; i < g.kernel_h; ++i) {
      const int64_t y = row * g.stride_h - g.pad_h + i * g.dilation_h;
      for (int64_t j = 0; j < g.kernel_w; ++j, at += channels) {
        const int64_t x = column * g.stride_w - g.pad_w + j * g.dilation_w;
        if (y < 0 || y >= g.in_h || x < 0 || x >= g.in_w) std::memset(at, 0, channels * sizeof(float));
        else load_pixel(s, (n * g.in_h + y) * g.in_w + x, 0, channels, at);
      }
    }
    float* own = to + pixel * depth;
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t t = 0; t < taps; ++t) own[c * taps + t] = window[t * channels + c];
  });
  return {{reinterpret_cast<Value*>(to), depth}, {nullptr, 0}, nullptr, nullptr, nullptr, {Act::none, 0}};
}

}  // namespace
}  // namespace FUSEDRES_CAPABILITY
}  // namespace fusedres
