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

// What is pending on a vector of channels, as far as it has these.
struct Terms {
  vec scale = {}, shift = {}, q = {};
};

// The operands that models have most, a vector of channels at a time: read(pixel, c) is those of a pixel from channel
// `first` + c on, which is what apply() makes of the numbers there.
struct Plain {
  static constexpr bool kPending = false, kSecond = false;
  const Value* x = nullptr;
  int64_t stride = 0;
  Plain() = default;
  Plain(const Source& s, int64_t first) : x(s.map.data + first), stride(s.map.stride) {}
  static vec apply(vec value, vec, const Terms&) { return value; }
  vec read(int64_t pixel, int64_t c) const { return load(x + pixel * stride + c); }
};
struct ScaleShift : Plain {
  static constexpr bool kPending = true;
  const float *scale = nullptr, *shift = nullptr;
  ScaleShift() = default;
  ScaleShift(const Source& s, int64_t first) : Plain(s, first), scale(s.scale + first), shift(s.shift + first) {}
  static vec apply(vec value, vec, const Terms& t) { return t.scale * value + t.shift; }
  // their terms from channel c on, as `load` loads them
  template <class F>
  void terms(int64_t c, F&& load, Terms* to) const {
    to->scale = load(scale + c);
    to->shift = load(shift + c);
  }
  vec read(int64_t pixel, int64_t c) const {
    return apply(Plain::read(pixel, c), vec{}, {load(scale + c), load(shift + c)});
  }
};
struct ScaleShiftRelu : ScaleShift {
  using ScaleShift::ScaleShift;
  static vec apply(vec value, vec, const Terms& t) { return relu(ScaleShift::apply(value, vec{}, t)); }
  vec read(int64_t pixel, int64_t c) const { return relu(ScaleShift::read(pixel, c)); }
};
struct Gradient : ScaleShift {
  static constexpr bool kSecond = true;
  Plain raw;
  const float* q = nullptr;
  Gradient() = default;
  Gradient(const Source& s, int64_t first) : ScaleShift(s, first), q(s.q + first) {
    raw.x = s.second.data + first;
    raw.stride = s.second.stride;
  }
  static vec apply(vec value, vec other, const Terms& t) { return t.scale * value + (t.q * other + t.shift); }
  template <class F>
  void terms(int64_t c, F&& load, Terms* to) const {
    ScaleShift::terms(c, load, to);
    to->q = load(q + c);
  }
  vec read(int64_t pixel, int64_t c) const {
    return apply(Plain::read(pixel, c), raw.read(pixel, c), {load(scale + c), load(shift + c), load(q + c)});
  }
};

// body(which of them it is), not at all for another.
template <class F>
inline void with_pending(const Source& s, F&& body) {
  if (s.act.is_other() || (s.scale == nullptr && s.act.is_relu())) return;
  if (s.scale == nullptr) return body(Plain{});
  if (s.q != nullptr && s.second.data != nullptr) return body(Gradient{});
  if (s.act.is_relu()) return body(ScaleShiftRelu{});
  body(ScaleShift{});
}

// `width` channels of `count` pixels from channel `first` on, side by side, as numbers that were rounded as in storage.
// pixel(m) is one of them.
template <class F>
inline void load_pixels(const Source& s, F&& pixel, int64_t count, int64_t first, int64_t width, float* dst) {
  int64_t done = 0;  // channels
  with_pending(s, [&](auto pending) {
    const decltype(pending) from(s, first);
    const int64_t whole = width / kLanes * kLanes;
    for (int64_t m = 0; m < count; ++m) {
      const int64_t of = pixel(m);
      float* to = dst + m * width;
      for (int64_t c = 0; c < whole; c += kLanes) store(to + c, as_stored(from.read(of, c)));
    }
    done = whole;
  });
  if (done == width) return;
  for (int64_t m = 0; m < count; ++m) {
    float* to = dst + m * width;
    load_pixel(s, pixel(m), first + done, width - done, to + done);
    for (int64_t c = done; c < width; ++c) to[c] = as_stored(to[c]);
  }
}

// Those of pixels that lie `step` apart.
inline void load_line(const Source& s, int64_t pixel, int64_t step, int64_t count, int64_t first, int64_t width,
                      float* dst) {
  load_pixels(s, [=](int64_t j) { return pixel + j * step; }, count, first, width, dst);
}

}  // namespace
}  // namespace FUSEDRES_CAPABILITY
}  // namespace fusedres
