// Depthwise convolutions: every group reads one channel and writes one.
//
// There is nothing to multiply but a few taps, so that a map's way through the caches is what counts. A task goes down
// some rows of an image, for a chunk of channels. The rows of the operand that the taps reach lie in a ring, with what
// is pending applied and zeros around them, one vector of channels behind the other; every row of the map is loaded
// into it once. A vector that is read from a row is multiplied by all of the row's taps that want it.
#pragma once

#include <cstdint>
#include <cstring>

#include "conv_dgrad-inl.h"
#include "conv_forward-inl.h"
#include "conv_wgrad-inl.h"

namespace fusedres {
namespace FUSEDRES_CAPABILITY {
namespace {

constexpr int kPhases = kDepthwiseStride;  // of the rows and columns of an input gradient
#if FUSEDRES_LANES == 8 || (FUSEDRES_LANES == 4 && defined(__x86_64__))
constexpr int depthwise_pixels(int taps) { return taps <= 4 ? 8 : 6; }  // of 16 registers, beside the taps
#else
constexpr int depthwise_pixels(int) { return 8; }
#endif
constexpr int64_t kRingFloats = 32 * 1024;     // of a task: half of it for the rows, half for what is made of them
constexpr int64_t kDepthwiseTilePixels = 256;  // whose epilogue runs at once
constexpr int64_t kDepthwiseTasks = 32;        // wanted: enough to share out evenly

// body(r, t) for the outputs r of kPixels that read, by tap t of kTaps, place j of a row, kStep places apart.
template <int kTaps, int kStep, int kPixels, class F>
inline __attribute__((always_inline)) void each_reader(int j, F&& body) {
#pragma GCC unroll 8
  for (int r = 0; r < kPixels; ++r)
    if (j - r * kStep >= 0 && j - r * kStep < kTaps) body(r, j - r * kStep);
}

// c[kPixels] = the sums over `count` rows of their taps.
template <int kTaps, int kStep, int kPixels>
inline __attribute__((always_inline)) void multiply_taps(const float* const* rows, const float* const* weights,
                                                         int count, int64_t from, float* c, int64_t ldc) {
  vec acc[kPixels];
#pragma GCC unroll 8
  for (int r = 0; r < kPixels; ++r) acc[r] = vec{};
  for (int i = 0; i < count; ++i) {
    const float* row = rows[i] + from;
    vec taps[kTaps];
#pragma GCC unroll 8
    for (int t = 0; t < kTaps; ++t) taps[t] = load(weights[i] + t * kLanes);
#pragma GCC unroll 32
    for (int j = 0; j < (kPixels - 1) * kStep + kTaps; ++j) {
      const vec value = load(row + j * kLanes);
      each_reader<kTaps, kStep, kPixels>(
          j, [&](int r, int t) __attribute__((always_inline)) { acc[r] += value * taps[t]; });
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kPixels; ++r) store(c + r * ldc, acc[r]);
}

// A row of `pixels` outputs.
template <int kTaps, int kStep>
__attribute__((noinline)) void multiply_row(const float* const* rows, const float* const* weights, int count,
                                            int64_t pixels, float* c, int64_t ldc) {
  constexpr int kMany = depthwise_pixels(kTaps);
  int64_t m = 0;
  for (; m + kMany <= pixels; m += kMany)
    multiply_taps<kTaps, kStep, kMany>(rows, weights, count, m * kStep * kLanes, c + m * ldc, ldc);
  for (; m + 2 <= pixels; m += 2)
    multiply_taps<kTaps, kStep, 2>(rows, weights, count, m * kStep * kLanes, c + m * ldc, ldc);
  if (m < pixels) multiply_taps<kTaps, kStep, 1>(rows, weights, count, m * kStep * kLanes, c + m * ldc, ldc);
}

// sums[kTaps] += the products of kPixels gradients with what their taps read.
template <int kTaps, int kStep, int kPixels>
inline __attribute__((always_inline)) void add_products(const float* row, const float* gradient, vec (&sums)[kTaps]) {
  vec g[kPixels];
#pragma GCC unroll 8
  for (int r = 0; r < kPixels; ++r) g[r] = load(gradient + r * kLanes);
#pragma GCC unroll 32
  for (int j = 0; j < (kPixels - 1) * kStep + kTaps; ++j) {
    const vec value = load(row + j * kLanes);
    each_reader<kTaps, kStep, kPixels>(j,
                                       [&](int r, int t) __attribute__((always_inline)) { sums[t] += value * g[r]; });
  }
}

// to[kTaps vectors] += the products of a row of gradients with the row that their taps read.
template <int kTaps, int kStep>
__attribute__((noinline)) void outer_row(const float* row, const float* gradient, int64_t pixels, float* to) {
  constexpr int kMany = 4;
  vec sums[kTaps];
#pragma GCC unroll 8
  for (int t = 0; t < kTaps; ++t) sums[t] = vec{};
  int64_t m = 0;
  for (; m + kMany <= pixels; m += kMany)
    add_products<kTaps, kStep, kMany>(row + m * kStep * kLanes, gradient + m * kLanes, sums);
  for (; m < pixels; ++m) add_products<kTaps, kStep, 1>(row + m * kStep * kLanes, gradient + m * kLanes, sums);
#pragma GCC unroll 8
  for (int t = 0; t < kTaps; ++t) store(to + t * kLanes, load(to + t * kLanes) + sums[t]);
}

struct DepthwiseKernels {
  void (*multiply)(const float* const*, const float* const*, int, int64_t, float*, int64_t);
  void (*outer)(const float*, const float*, int64_t, float*);
};

template <int kTaps>
inline DepthwiseKernels depthwise_kernels_of(int64_t step) {
  if (step == 1) return {multiply_row<kTaps, 1>, outer_row<kTaps, 1>};
  return {multiply_row<kTaps, 2>, outer_row<kTaps, 2>};
}

inline DepthwiseKernels depthwise_kernels(int taps, int64_t step) {
  switch (taps) {
    case 0:
    case 1: return depthwise_kernels_of<1>(step);
    case 2: return depthwise_kernels_of<2>(step);
    case 3: return depthwise_kernels_of<3>(step);
    case 4: return depthwise_kernels_of<4>(step);
    case 5: return depthwise_kernels_of<5>(step);
    case 6: return depthwise_kernels_of<6>(step);
    default: return depthwise_kernels_of<7>(step);
  }
}

// Which rows and columns of the source an output reads: by the phase of its row, and of its column.
struct DepthwiseGrid {
  Axis h[kPhases], w[kPhases];
  int64_t h_phases, w_phases;
  int64_t low, span;    // rows of the source that an output's taps may reach, from that of its position on
  int64_t left, width;  // columns of the ring: from `left` of the source on

  DepthwiseGrid(const Geometry2d& g, bool gradient)
      : h_phases(gradient ? g.stride_h : 1), w_phases(gradient ? g.stride_w : 1) {
    int64_t high = 0, right = 0;
    for (int64_t i = 0; i < h_phases; ++i) {
      h[i] = gradient ? dgrad_axis(g.in_h, g.out_h, g.kernel_h, g.stride_h, g.pad_h, g.dilation_h, i)
                      : forward_axis(g.in_h, g.out_h, g.kernel_h, g.stride_h, g.pad_h, g.dilation_h);
      low = i == 0 ? h[i].low : least(low, h[i].low);
      high = i == 0 ? h[i].low + h[i].span : most(high, h[i].low + h[i].span);
    }
    for (int64_t i = 0; i < w_phases; ++i) {
      w[i] = gradient ? dgrad_axis(g.in_w, g.out_w, g.kernel_w, g.stride_w, g.pad_w, g.dilation_w, i)
                      : forward_axis(g.in_w, g.out_w, g.kernel_w, g.stride_w, g.pad_w, g.dilation_w);
      const int64_t end = most(0, w[i].grid - 1) * w[i].step + w[i].low + w[i].span;
      left = i == 0 ? w[i].low : least(left, w[i].low);
      right = i == 0 ? end : most(right, end);
    }
    span = high - low;
    width = right - left;
  }

  int64_t row_floats() const { return width * kLanes; }
  // The row of the source that the first of an output's taps may read.
  int64_t first_source(int64_t row) const { return row / h_phases * h[0].step + low; }
};

// The weight, vector by vector: for each phase of the columns, each row of the kernel, its taps.
struct DepthwiseWeights {
  const DepthwiseGrid& grid;
  int64_t rows, columns;  // of the kernel
  float* data;

  float* at(int64_t vector, int64_t phase, int64_t row) const {
    float* to = data + vector * rows * columns * kLanes;
    for (int64_t i = 0; i < phase; ++i) to += grid.w[i].taps * rows * kLanes;
    return to + row * grid.w[phase].taps * kLanes;
  }
  // f(where a tap of a vector is, the tap's row and column)
  template <class F>
  void each_tap(int64_t vector, F&& f) const {
    for (int64_t phase = 0; phase < grid.w_phases; ++phase)
      for (int64_t i = 0; i < rows; ++i)
        for (int t = 0; t < grid.w[phase].taps; ++t) f(at(vector, phase, i) + t * kLanes, i, grid.w[phase].kernel[t]);
  }
};

// A weight, packed into the calling thread's buffer.
DepthwiseWeights pack_depthwise(const DepthwiseGrid& grid, const Geometry2d& g, const Weight& weight,
                                int64_t channels) {
  const DepthwiseWeights to{grid, g.kernel_h, g.kernel_w,
                            packed_weights.get(round_up(channels, kLanes) * g.kernel_h * g.kernel_w)};
  for (int64_t first = 0; first < channels; first += kLanes)
    to.each_tap(first / kLanes, [&](float* tap, int64_t i, int64_t j) {
      const Value* from = weight.data + first * weight.so + i * weight.sh + j * weight.sw;
      for (int64_t c = 0; c < kLanes; ++c) tap[c] = first + c < channels ? to_float(from[c * weight.so]) : 0.f;
    });
  return to;
}

// `count` pixels that lie side by side, a vector of channels behind the other, `pitch` floats apart. Those `ahead`
// pixels further are asked for: they are loaded next.
void load_planes(const Source& s, int64_t pixel, int64_t count, int64_t ahead, int64_t first, int64_t channels,
                 int64_t pitch, float* to) {
  Source linear = s;  // an activation beyond ReLU comes behind, of whole planes
  if (s.act.is_other()) linear.act = {Act::none, 0};
  int64_t done = 0;
  with_pending(linear, [&](auto pending) {
    const decltype(pending) from(linear, first);
    done = channels / kLanes * kLanes;
    for (int64_t m = 0; m < count; ++m)
      for (int64_t c = 0; c < done; c += kLanes) {
        store(to + c / kLanes * pitch + m * kLanes, from.read(pixel + m, c));
        __builtin_prefetch(s.map.data + (pixel + m + ahead) * s.map.stride + first + c, 0, 2);
        if (s.second.data != nullptr)
          __builtin_prefetch(s.second.data + (pixel + m + ahead) * s.second.stride + first + c, 0, 2);
      }
  });
  for (int64_t c = done; c < channels; c += kLanes) {
    const int64_t valid = least(kLanes, channels - c);
    for (int64_t m = 0; m < count; ++m) {
      float* values = to + c / kLanes * pitch + m * kLanes;
      load_pixel(linear, pixel + m, first + c, valid, values);
      for (int64_t i = valid; i < kLanes; ++i) values[i] = 0.f;
    }
  }
  if (!kPairs && !s.act.is_other()) return;
  for (float* plane = to; plane < to + div_up(channels, kLanes) * pitch; plane += pitch) {
    if (s.act.is_other()) activate_row(plane, count * kLanes, s.act);
    for (int64_t i = 0; kPairs && i < count * kLanes; i += kLanes) store(plane + i, as_stored(load(plane + i)));
  }
}

// The rows of an image that a task's taps reach at the moment.
struct Ring {
  const DepthwiseGrid& grid;
  const Source& source;
  int64_t first, channels, vectors;  // of the task
  float* data;
  int64_t image = 0, height = 0, line = 0, begin = 0, next = 0;

  // Rows from `row` of the source on, of an image of `height` rows of `line` pixels.
  void start(int64_t of_image, int64_t of_height, int64_t of_line, int64_t row) {
    image = of_image;
    height = of_height;
    line = of_line;
    begin = next = row;
  }
  float* row(int64_t y, int64_t vector) const {
    return data + ((y - begin) % grid.span * vectors + vector) * grid.row_floats();
  }
  bool is_inside(int64_t y) const { return y >= 0 && y < height; }
  void load_up_to(int64_t end) {
    // what lies between is read by nobody
    for (next = most(next, end - grid.span); next < end; ++next) load_row(next);
  }
  void load_row(int64_t y) {
    float* to = row(y, 0);
    const int64_t pitch = grid.row_floats();
    if (!is_inside(y)) return void(std::memset(to, 0, vectors * pitch * sizeof(float)));
    const int64_t inside = least(grid.width, most(0, -grid.left)),
                  count = most(0, least(grid.width, line - grid.left) - inside), rest = grid.width - inside - count;
    for (int64_t v = 0; v < vectors; ++v) {
      std::memset(to + v * pitch, 0, inside * kLanes * sizeof(float));
      std::memset(to + v * pitch + (inside + count) * kLanes, 0, rest * kLanes * sizeof(float));
    }
    load_planes(source, (image * height + y) * line + grid.left + inside, count, line, first, channels, pitch,
                to + inside * kLanes);
  }
};

// How the outputs' rows and channels are cut into tasks: `p` has the tiles, which lie within an image.
struct DepthwisePlan {
  Problem p;
  int64_t channels, chunk, chunks, of_image, each, parts;  // tiles of an image; of a task; tasks of an image

  DepthwisePlan(const DepthwiseGrid& grid, int64_t batch, int64_t rows, int64_t columns, int64_t of_channels)
      : p{}, channels(of_channels) {
    p.h = forward_axis(rows, rows, 1, 1, 0, 1);
    p.w = forward_axis(columns, columns, 1, 1, 0, 1);
    p.batch = batch;
    p.src_c = 1;
    p.dst_c = channels;
    p.dst_h = rows;
    p.dst_w = columns;
    p.line_rows = most(1, least(rows, kDepthwiseTilePixels / most(1, columns)));
    p.tile_lines = 1;
    p.tiles = p.lines();
    p.tile_pixels = p.line_rows * columns;
    const int64_t vectors = div_up(channels, kLanes),
                  of_vector = grid.span * grid.row_floats() + p.tile_pixels * kLanes,
                  fit = most(1, least(vectors, kRingFloats / most(1, of_vector)));
    chunk = div_up(vectors, div_up(vectors, fit)) * kLanes;
    chunks = div_up(channels, chunk);
    of_image = div_up(rows, p.line_rows);
    const int64_t wanted = most(1, least(of_image, kDepthwiseTasks / most(1, batch * chunks)));
    each = most(1, div_up(of_image, wanted));
    parts = div_up(of_image, each);
  }

  int64_t tasks() const { return p.batch * parts * chunks; }
  int64_t values() const { return p.rows() * p.w.grid * channels * 8; }
};

// Asks for what the epilogue of `count` pixels will read.
inline void prefetch_pixels(const Map& map, int64_t pixel, int64_t count, int64_t first, int64_t channels) {
  if (map.data == nullptr) return;
  for (int64_t m = 0; m < count; ++m)
    for (int64_t c = 0; c < channels; c += 64 / int64_t(sizeof(Value)))
      __builtin_prefetch(map.data + (pixel + m) * map.stride + first + c, 0, 2);
}

// body(first channel, channels, tile, c, ldc, where): a tile of outputs, in `scratch_c` or where `place(first,
// channels, where, &ldc)` says. `ahead(pixel, count, first, channels)` comes in front of every row.
template <class Place, class Prefetch, class F>
void each_depthwise_tile(const DepthwisePlan& plan, const DepthwiseGrid& grid, const DepthwiseWeights& weights,
                         const Source& s, int64_t height, int64_t line, Parallel parallel, Place&& place,
                         Prefetch&& ahead, F&& body) {
  run_parallel(parallel, plan.tasks(), plan.values(), [&](int64_t task) {
    const int64_t first = task % plan.chunks * plan.chunk, columns = least(plan.chunk, plan.channels - first),
                  vectors = div_up(columns, kLanes), image = task / (plan.chunks * plan.parts),
                  begin = task / plan.chunks % plan.parts * plan.each, end = least(plan.of_image, begin + plan.each);
    Ring ring{grid, s, first, columns, vectors, scratch_a.get(grid.span * vectors * grid.row_floats())};
    ring.start(image, height, line, grid.first_source(begin * plan.p.line_rows));
    for (int64_t t = begin; t < end; ++t) {
      const int64_t tile = image * plan.of_image + t;
      const Tile where = locate(plan.p, tile, 1);
      int64_t ldc = vectors * kLanes;
      float* c = place(first, columns, where, &ldc);
      if (c == nullptr) c = scratch_c.get(plan.p.tile_pixels * ldc);
      const int64_t rows = where.pixels / plan.p.w.grid;
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t y = t * plan.p.line_rows + i, position = y / grid.h_phases;
        const Axis& h = grid.h[y % grid.h_phases];
        ring.load_up_to(grid.first_source(y) + grid.span);
        ahead(where.pixel[i * plan.p.w.grid], plan.p.w.grid, first, columns);
        for (int64_t v = 0; v < vectors; ++v) {
          float* to = c + i * plan.p.w.grid * ldc + v * kLanes;
          for (int64_t phase = 0; phase < grid.w_phases; ++phase) {
            const Axis& w = grid.w[phase];
            const float *from[kMaxTaps], *taps[kMaxTaps];
            int count = 0;
            for (int k = 0; k < h.taps && w.taps > 0; ++k) {
              const int64_t source = position * h.step + h.offset[k];
              if (!ring.is_inside(source)) continue;
              from[count] = ring.row(source, v) + (w.low - grid.left) * kLanes;
              taps[count++] = weights.at(first / kLanes + v, phase, h.kernel[k]);
            }
            depthwise_kernels(w.taps, w.step)
                .multiply(from, taps, count, w.grid, to + w.dst_first * ldc, w.dst_step * ldc);
          }
        }
      }
      body(first, columns, tile, c, ldc, where);
    }
  });
}

void depthwise_forward(const ForwardArgs& a, Parallel parallel) {
  const Geometry2d& g = a.g;
  const DepthwiseGrid grid(g, false);
  const DepthwisePlan plan(grid, g.batch, g.out_h, g.out_w, a.groups);
  const DepthwiseWeights weights = pack_depthwise(grid, g, a.weight, a.groups);
  float* stats = a.mean == nullptr ? nullptr : partial_sums.get(plan.p.tiles * kTileStats * a.groups);
  const auto is_in_place = [](int64_t columns) { return !kPairs && columns % kLanes == 0; };
  each_depthwise_tile(
      plan, grid, weights, a.x, g.in_h, g.in_w, parallel,
      [&](int64_t first, int64_t columns, const Tile& where, int64_t* ldc) -> float* {
        if (!is_in_place(columns)) return nullptr;
        *ldc = a.out.stride;
        return reinterpret_cast<float*>(a.out.data) + where.pixel[0] * a.out.stride + first;
      },
      [&](int64_t pixel, int64_t count, int64_t first, int64_t columns) {
        prefetch_pixels(a.residual, pixel, count, first, columns);
      },
      [&](int64_t first, int64_t columns, int64_t tile, float* c, int64_t ldc, const Tile& where) {
        finish_forward(a, where, first, columns, c, ldc);
        const TileStats own = tile_stats(stats, plan.p, tile);
        write_tile(a, where, first, columns, c, ldc, is_in_place(columns), own ? own.from(first) : own);
      });
  if (stats != nullptr) merge_stats(plan.p, stats, a.mean, a.m2, parallel);
}

void depthwise_dgrad(const DgradArgs& a, Parallel parallel) {
  const Geometry2d& g = a.g;
  const DepthwiseGrid grid(g, true);
  const DepthwisePlan plan(grid, g.batch, g.in_h, g.in_w, a.groups);
  const DepthwiseWeights weights = pack_depthwise(grid, g, a.weight, a.groups);
  float* sums = a.sum_dz == nullptr ? nullptr : partial_sums.get(plan.p.tiles * 2 * a.groups);
  each_depthwise_tile(
      plan, grid, weights, a.grad, g.out_h, g.out_w, parallel,
      [](int64_t, int64_t, const Tile&, int64_t*) -> float* { return nullptr; },
      [&](int64_t pixel, int64_t count, int64_t first, int64_t columns) {
        prefetch_pixels(a.x, pixel, count, first, columns);
        prefetch_pixels(a.base, pixel, count, first, columns);
        prefetch_pixels(a.dx, pixel, count, first, columns);
      },
      [&](int64_t first, int64_t columns, int64_t tile, float* c, int64_t ldc, const Tile& where) {
        float* own = from(sums, tile * 2 * a.groups + first);
        finish_dgrad(a, where, first, columns, c, ldc, own, from(own, a.groups));
      });
  if (sums != nullptr) merge_sums(a, sums, plan.p.tiles, a.groups, parallel);
}

// Adds what a row of gradients that are not all finite makes of one tap: what is not inside of the map counts nothing.
inline void outer_inside_row(const float* row, const float* gradient, const DepthwiseGrid& grid, int64_t line,
                             float* to) {
  const Axis& w = grid.w[0];
  for (int64_t m = 0; m < w.grid; ++m)
    for (int t = 0; t < w.taps; ++t) {
      const int64_t x = m * w.step + w.offset[t];
      if (x < 0 || x >= line) continue;
      store(to + t * kLanes,
            load(to + t * kLanes) + load(row + (x - grid.left) * kLanes) * load(gradient + m * kLanes));
    }
}

void depthwise_wgrad(const WgradArgs& a, Parallel parallel) {
  const Geometry2d& g = a.g;
  const DepthwiseGrid grid(g, false);
  const DepthwisePlan plan(grid, g.batch, g.out_h, g.out_w, a.groups);
  const Problem& p = plan.p;
  const int64_t of_vector = g.kernel_h * g.kernel_w * kLanes, all = div_up(a.groups, kLanes) * of_vector,
                // tasks of different rows have sums of their own
      sets = most(1, least(p.tiles, div_up(kDepthwiseTasks, plan.chunks))), of_set = div_up(p.tiles, sets);
  const DepthwiseKernels kernels = depthwise_kernels(grid.w[0].taps, grid.w[0].step);
  const int64_t pitch = g.out_w * kLanes;
  float* sums = partial_sums.get(sets * all);
  run_parallel(parallel, sets * plan.chunks, plan.values(), [&](int64_t task) {
    const int64_t first = task % plan.chunks * plan.chunk, columns = least(plan.chunk, a.groups - first),
                  vectors = div_up(columns, kLanes), set = task / plan.chunks, begin = set * of_set,
                  end = least(p.tiles, begin + of_set);
    const DepthwiseWeights own{grid, g.kernel_h, g.kernel_w, sums + set * all};
    std::memset(own.at(first / kLanes, 0, 0), 0, vectors * of_vector * sizeof(float));
    Ring ring{grid, a.x, first, columns, vectors, scratch_a.get(grid.span * vectors * grid.row_floats())};
    float* gradient = scratch_b.get(vectors * pitch);
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t image = tile / plan.of_image, top = tile % plan.of_image * p.line_rows;
      if (tile == begin || top == 0) ring.start(image, g.in_h, g.in_w, grid.first_source(top));
      for (int64_t y = top; y < least(g.out_h, top + p.line_rows); ++y) {
        ring.load_up_to(grid.first_source(y) + grid.span);
        load_planes(a.grad, (image * g.out_h + y) * g.out_w, g.out_w, g.out_w, first, columns, pitch, gradient);
        const bool finite = !is_padded(g) || is_finite(gradient, vectors * pitch);
        for (int64_t v = 0; v < vectors; ++v)
          for (int k = 0; k < grid.h[0].taps; ++k) {
            const int64_t source = y * grid.h[0].step + grid.h[0].offset[k];
            if (!ring.is_inside(source)) continue;
            float* to = own.at(first / kLanes + v, 0, k);
            if (finite) kernels.outer(ring.row(source, v), gradient + v * pitch, g.out_w, to);
            else outer_inside_row(ring.row(source, v), gradient + v * pitch, grid, g.in_w, to);
          }
      }
    }
  });
  run_parallel(parallel, div_up(a.groups, kLanes), sets * all, [&](int64_t v) {
    const int64_t first = v * kLanes, valid = least(kLanes, a.groups - first);
    const DepthwiseWeights own{grid, g.kernel_h, g.kernel_w, sums};
    own.each_tap(v, [&](float* tap, int64_t i, int64_t j) {
      for (int64_t c = 0; c < valid; ++c) {
        double sum = 0;
        for (int64_t set = 0; set < sets; ++set) sum += tap[c + set * all];
        put(a.dweight.data + (first + c) * a.dweight.so + i * a.dweight.sh + j * a.dweight.sw, static_cast<float>(sum));
      }
    });
  });
}

}  // namespace
}  // namespace FUSEDRES_CAPABILITY
}  // namespace fusedres
