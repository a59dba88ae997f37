// Pooling. A work item is a range of pixels and a chunk of channels; for each pixel the windows' pixels that exist are
// listed first.
#pragma once

#include <cstdint>
#include <cstring>

#include "pass_ops-inl.h"
#include "pass_plan-inl.h"

namespace fusedres {
namespace FUSEDRES_CAPABILITY {
namespace {

// One vector through an activation beyond ReLU, which few pooled maps have.
template <class A, class V>
inline V activated_vector(V z, const Activation& act) {
  alignas(64) A lanes[sizeof(V) / sizeof(A)];
  store(lanes, z);
  activate_row(lanes, sizeof(V) / sizeof(A), act);
  return load(lanes);
}
template <class A, class V>
inline V gradient_vector(V dy, V z, const Activation& act) {
  alignas(64) A lanes[2][sizeof(V) / sizeof(A)];
  store(lanes[0], dy);
  store(lanes[1], z);
  gradient_row(lanes[0], lanes[1], sizeof(V) / sizeof(A), act);
  return load(lanes[0]);
}

constexpr int kMaxWindow = 256;  // positions that a uint8 index can tell apart

// A pixel and its successors in memory.
struct Pixel {
  int64_t height, width, image, y, x;
  Pixel(int64_t r, int64_t height, int64_t width)
      : height(height), width(width), image(r / (height * width)), y(r / width % height), x(r % width) {}
  void operator++() {
    if (++x < width) return;
    x = 0;
    if (++y < height) return;
    y = 0;
    ++image;
  }
};

// Along one axis, the outputs whose window holds a pixel: o * stride - pad <= at < o * stride - pad + kernel.
class Windows {
 public:
  struct Range {
    int64_t first, last;
  };
  Windows(int64_t in, int64_t out, int64_t kernel, int64_t stride, int64_t pad) : ranges_(in) {
    for (int64_t at = 0; at < in; ++at)
      ranges_.data[at] = {at + pad < kernel ? 0 : (at + pad - kernel) / stride + 1,
                          least(out - 1, (at + pad) / stride)};
  }
  const Range& at(int64_t pixel) const { return ranges_.data[pixel]; }

 private:
  Buffer<Range> ranges_;
};

template <class E, int kLanes>
struct Integers {
  typedef E type __attribute__((vector_size(sizeof(E) * kLanes)));
};

// Between bytes and integers of a vector's lanes, by one doubling or halving after the other: compilers have
// instructions for that, and take a longer step value by value.
template <int kLanes, class I>
inline auto halved(I v) {
  constexpr int kBytes = sizeof(I) / kLanes;
  if constexpr (kBytes == 8) return __builtin_convertvector(v, typename Integers<uint32_t, kLanes>::type);
  else if constexpr (kBytes == 4) return __builtin_convertvector(v, typename Integers<uint16_t, kLanes>::type);
  else return __builtin_convertvector(v, typename Integers<uint8_t, kLanes>::type);
}
template <int kLanes, class I>
inline auto bytes_of(I v) {
  if constexpr (sizeof(I) == kLanes) return v;
  else return bytes_of<kLanes>(halved<kLanes>(v));
}
template <int kLanes, class I>
inline I from_bytes(typename Integers<uint8_t, kLanes>::type bytes) {
  const auto two = __builtin_convertvector(bytes, typename Integers<uint16_t, kLanes>::type);
  if constexpr (sizeof(I) == 4 * kLanes) return __builtin_convertvector(two, I);
  else return __builtin_convertvector(__builtin_convertvector(two, typename Integers<uint32_t, kLanes>::type), I);
}

template <int kLanes, class I>
inline I load_index(const uint8_t* p, int n) {
  using Bytes = typename Integers<uint8_t, kLanes>::type;
  if (n == kLanes) return from_bytes<kLanes, I>(read<Bytes>(p));
  uint8_t values[kLanes] = {};
  for (int i = 0; i < n; ++i) values[i] = p[i];
  return from_bytes<kLanes, I>(read<Bytes>(values));
}
template <int kLanes, class I>
inline void store_index(uint8_t* p, I index, int n) {
  const auto narrow = bytes_of<kLanes>(index);
  if (n == kLanes) return write(p, narrow);
  uint8_t values[kLanes];
  write(values, narrow);
  for (int i = 0; i < n; ++i) p[i] = values[i];
}

// k: scale, shift.
template <class T, bool kMax>
struct PoolForward {
  using A = AccumOf<T>;
  using V = VecOf<T>;
  using I = typename Vector<A>::integer;
  static constexpr int kLanes = kLanesOf<T>;
  static constexpr int kGroup = 8;  // pixels of a mean that are added in registers

  const PoolArgs& a;
  const Plan& plan;
  const Constants<A>& constants;
  const Partials& partials;

  template <bool kPart>
  inline V activated(const T* x, V scale, V shift, V floor, int n) const {
    const V z = load_lanes<T, kPart>(x, n) * scale + shift;
    return a.pass.act.is_other() ? activated_vector<A>(z, a.pass.act) : relu(z, floor);
  }

  template <bool kPart>
  inline void maximum(const T* const* window, const int* position, int count, int64_t from, int c, int n, T* y,
                      uint8_t* index) const {
    const V scale = load(constants.at(0) + from + c), shift = load(constants.at(1) + from + c);
    const V floor = V{} + (a.pass.act.is_relu() ? A(0) : -A(__builtin_inf()));
    V best = V{} - A(__builtin_inf());
    I at = I{} + position[0];
    for (int i = 0; i < count; ++i) {
      const V z = activated<kPart>(window[i] + c, scale, shift, floor, n);
      const I better = (z > best) | (z != z);
      best = better ? z : best;
      at = better ? I{} + position[i] : at;
    }
    store_lanes<T, kPart>(y + c, best, n);
    store_index<kLanes>(index + c, at, n);
  }

  template <bool kPart>
  inline void add(const T* const* window, int count, int64_t from, int c, int n, A* total) const {
    const V scale = load(constants.at(0) + from + c), shift = load(constants.at(1) + from + c);
    const V floor = V{} + (a.pass.act.is_relu() ? A(0) : -A(__builtin_inf()));
    V sum = V{};
    for (int i = 0; i < count; ++i) sum += activated<kPart>(window[i] + c, scale, shift, floor, n);
    store(total + c, load(total + c) + sum);
  }

  void pixel(const Pixel& p, int64_t r, int64_t from, int n) const {
    const T* window[kMaxWindow];
    int position[kMaxWindow], count = 0, c = 0;
    alignas(64) A total[kChunk + kPad];
    T* y = row<T>(a.pass.out, r, 1) + from;
    if (!kMax) std::memset(total, 0, sizeof(total));
    const int64_t top = p.y * a.stride_h - a.pad_h, left = p.x * a.stride_w - a.pad_w;
    for (int64_t i = most(0, -top); i < least(a.kernel_h, a.in_h - top); ++i)
      for (int64_t j = most(0, -left); j < least(a.kernel_w, a.in_w - left); ++j) {
        window[count] = row<T>(a.pass.in[0], (p.image * a.in_h + top + i) * a.in_w + left + j, 1) + from;
        position[count++] = int(i * a.kernel_w + j);
        if (!kMax && count == kGroup) {
          accumulate(window, count, from, n, total);
          count = 0;
        }
      }
    if constexpr (kMax) {
      uint8_t* index = a.index + r * a.index_pitch + from;
      for (; c + kLanes <= n; c += kLanes) maximum<false>(window, position, count, from, c, kLanes, y, index);
      if (c < n) maximum<true>(window, position, count, from, c, n - c, y, index);
    } else {
      accumulate(window, count, from, n, total);
      const V size = V{} + A(a.kernel_h * a.kernel_w);
      for (; c + kLanes <= n; c += kLanes) store(y + c, load(total + c) / size);
      if (c < n) store_part(y + c, load(total + c) / size, n - c);
    }
  }

  inline void accumulate(const T* const* window, int count, int64_t from, int n, A* total) const {
    int c = 0;
    for (; c + kLanes <= n; c += kLanes) add<false>(window, count, from, c, kLanes, total);
    if (c < n) add<true>(window, count, from, c, n - c, total);
  }

  void item(int64_t tile, int64_t chunk) const {
    const int64_t from = chunk * kChunk, start = tile * plan.tile, rows = plan.count(tile);
    const int n = int(least(kChunk, plan.lanes - from));
    Moments<T> moments;
    Pixel p(start, a.out_h, a.out_w);
    for (int64_t r = 0; r < rows; r += plan.block) {
      const int64_t height = least(plan.block, rows - r);
      for (int64_t j = 0; j < height; ++j, ++p) pixel(p, start + r + j, from, n);
      if (a.pass.measured.data != nullptr)
        measure_block<T>(row<T>(a.pass.measured, start + r, 1) + from, a.pass.measured.pitch, height, n, r,
                         partials.at(tile, 0) + from, partials.at(tile, 1) + from, moments);
    }
  }
};

// k: scale, shift, mean, p, q, r. s: dz, dz * (x - mean).
template <class T, bool kMax, bool kReduce, bool kWrite>
struct PoolBackward {
  using A = AccumOf<T>;
  using V = VecOf<T>;
  using I = typename Vector<A>::integer;
  static constexpr int kLanes = kLanesOf<T>;

  const PoolArgs& a;
  const Plan& plan;
  const Constants<A>& constants;
  const Partials& partials;
  const Windows along_h{a.in_h, a.out_h, a.kernel_h, a.stride_h, a.pad_h};
  const Windows along_w{a.in_w, a.out_w, a.kernel_w, a.stride_w, a.pad_w};

  // The windows of a pixel: their gradients and indices, and the pixel's position in them.
  struct Held {
    const T* grad[kMaxWindow];
    const uint8_t* index[kMaxWindow];
    int position[kMaxWindow], count = 0;
  };

  // kCount: the number of windows, where that is known; else -1.
  template <int kCount, bool kPart>
  inline void lanes(const Held& held, const T* x, T* dx, int64_t from, int c, int n, A* sums) const {
    const auto k = [&](int i) __attribute__((always_inline)) { return load(constants.at(i) + from + c); };
    const V value = load_lanes<T, kPart>(x + c, n);
    V dz = V{};
    const int count = kCount < 0 ? held.count : kCount;
#pragma GCC unroll 4
    for (int i = 0; i < count; ++i) {
      const V g = load_lanes<T, kPart>(held.grad[i] + c, n);
      if constexpr (kMax) dz += load_index<kLanes, I>(held.index[i] + c, n) == I{} + held.position[i] ? g : V{};
      else dz += g / (V{} + A(a.kernel_h * a.kernel_w));
    }
    if (a.pass.act.is_relu()) dz = blocked(dz, value * k(0) + k(1));
    else if (a.pass.act.is_other()) dz = gradient_vector<A>(dz, value * k(0) + k(1), a.pass.act);
    if constexpr (kReduce) {
      A *first = sums + c, *second = sums + kChunk + kPad + c;
      store(first, load(first) + dz);
      store(second, load(second) + dz * (value - k(2)));
    }
    if constexpr (kWrite) store_lanes<T, kPart>(dx + c, dz * k(3) + (value * k(4) + k(5)), n);
  }

  template <int kCount>
  inline void whole(const Held& held, const T* x, T* dx, int64_t from, int n, A* sums) const {
    int c = 0;
    for (; c + kLanes <= n; c += kLanes) lanes<kCount, false>(held, x, dx, from, c, kLanes, sums);
    if (c < n) lanes<kCount, true>(held, x, dx, from, c, n - c, sums);
  }

  void pixel(const Pixel& p, int64_t r, int64_t from, int n, A* sums) const {
    Held held;
    const auto [first_h, last_h] = along_h.at(p.y);
    const auto [first_w, last_w] = along_w.at(p.x);
    for (int64_t i = first_h; i <= last_h; ++i)
      for (int64_t j = first_w; j <= last_w; ++j) {
        const int64_t o = (p.image * a.out_h + i) * a.out_w + j;
        held.grad[held.count] = row<T>(a.pass.in[1], o, 1) + from;
        held.index[held.count] = kMax ? a.index + o * a.index_pitch + from : nullptr;
        held.position[held.count++] =
            int((p.y + a.pad_h - i * a.stride_h) * a.kernel_w + p.x + a.pad_w - j * a.stride_w);
      }
    const T* x = row<T>(a.pass.in[0], r, 1) + from;
    T* dx = kWrite ? row<T>(a.pass.out, r, 1) + from : nullptr;
    switch (held.count) {  // those of common poolings
      case 1: return whole<1>(held, x, dx, from, n, sums);
      case 2: return whole<2>(held, x, dx, from, n, sums);
      case 4: return whole<4>(held, x, dx, from, n, sums);
      default: return whole<-1>(held, x, dx, from, n, sums);
    }
  }

  void item(int64_t tile, int64_t chunk) const {
    const int64_t from = chunk * kChunk, start = tile * plan.tile, rows = plan.count(tile);
    const int n = int(least(kChunk, plan.lanes - from));
    alignas(64) A sums[2 * (kChunk + kPad)];
    double* totals[2] = {};
    for (int i = 0; i < (kReduce ? 2 : 0); ++i) {
      totals[i] = partials.at(tile, i) + from;
      for (int c = 0; c < n; ++c) totals[i][c] = 0;
    }
    Pixel p(start, a.in_h, a.in_w);
    for (int64_t r = 0; r < rows; r += plan.block) {
      const int64_t height = least(plan.block, rows - r);
      if (kReduce) std::memset(sums, 0, sizeof(sums));
      for (int64_t j = 0; j < height; ++j, ++p) pixel(p, start + r + j, from, n, sums);
      for (int i = 0; i < (kReduce ? 2 : 0); ++i)
        for (int c = 0; c < n; ++c) totals[i][c] += double(sums[i * (kChunk + kPad) + c]);
    }
  }
};

template <class Pass, class T>
void run_pool(const PoolArgs& a, int constant_count, int sums, int64_t window, Parallel parallel) {
  using A = AccumOf<T>;
  const Plan plan = plan_of(a.pass.rows, a.pass.channels, 1, most(1, 2 * kMostBlockRows / window));
  const Constants<A> constants(plan, a.pass.constants, constant_count);
  const Partials partials(plan, sums + (a.pass.measured.data != nullptr ? 2 : 0));
  Pass pass{a, plan, constants, partials};
  run_parallel(parallel, plan.tiles * plan.chunks, a.pass.rows * a.pass.channels * window,
               [&](int64_t i) { pass.item(i / plan.chunks, i % plan.chunks); });
  merge<A>(a.pass, plan, partials, sums, parallel);
}

template <class T>
void pool_forward_of(const PoolArgs& a, Parallel parallel) {
  const int64_t window = a.kernel_h * a.kernel_w;
  if (a.index != nullptr) run_pool<PoolForward<T, true>, T>(a, 2, 0, window, parallel);
  else run_pool<PoolForward<T, false>, T>(a, 2, 0, window, parallel);
}

template <class T, bool kReduce, bool kWrite>
void pool_backward_of(const PoolArgs& a, Parallel parallel) {
  if (a.index != nullptr) run_pool<PoolBackward<T, true, kReduce, kWrite>, T>(a, 6, kReduce ? 2 : 0, 1, parallel);
  else run_pool<PoolBackward<T, false, kReduce, kWrite>, T>(a, 6, kReduce ? 2 : 0, 1, parallel);
}

template <class T>
void pool_backward_modes(const PoolArgs& a, bool sums, bool write, Parallel parallel) {
  if (sums && write) pool_backward_of<T, true, true>(a, parallel);
  else if (sums) pool_backward_of<T, true, false>(a, parallel);
  else pool_backward_of<T, false, true>(a, parallel);
}

}  // namespace
}  // namespace FUSEDRES_CAPABILITY
}  // namespace fusedres
