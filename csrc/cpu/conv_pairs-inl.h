// Pixels and tiles of bfloat16, in units of two numbers (conv_operand-inl.h): along the channels where a product sums
// over channels, along the pixels in the weight gradient. conv_singles-inl.h has the same functions for float32.
#pragma once

#include <cstdint>
#include <cstring>

#include "conv_grid-inl.h"
#include "conv_pixel-inl.h"
#include "conv_stats-inl.h"

namespace fusedres {
namespace FUSEDRES_CAPABILITY {
namespace {

// Units of two pixels' channels [first, first + n); `second` may be -1 for zeros. `values` has room for both.
void interleave_pixels(const Source& s, int64_t one, int64_t second, int64_t first, int64_t n, float* values,
                       float* units) {
  int64_t c = 0;
  if (second >= 0) {
    with_pending(s, [&](auto pending) {
      const decltype(pending) from(s, first);
      for (; c + kLanes <= n; c += kLanes)
        store(units + c,
              make_units(widen(round_to_bfloat16(from.read(one, c))), widen(round_to_bfloat16(from.read(second, c)))));
    });
  }
  if (c == n) return;
  load_pixel(s, one, first + c, n - c, values);
  if (second >= 0) load_pixel(s, second, first + c, n - c, values + n);
  interleave(values, second >= 0 ? values + n : nullptr, n - c, units + c);
}

// `width` units of a pixel from unit `first` on.
inline void load_units_of_pixel(const Source& s, int64_t pixel, int64_t first, int64_t width, float* dst) {
  int64_t c = 0;
  with_pending(s, [&](auto pending) {
    const decltype(pending) from(s, 2 * first);
    for (; c + kLanes <= width; c += kLanes)
      store(dst + c, round_to_units(from.read(pixel, 2 * c), from.read(pixel, 2 * c + kLanes)));
  });
  constexpr int64_t kPiece = 256;
  float values[2 * kPiece];
  for (; c < width; c += kPiece) {
    const int64_t units = least(kPiece, width - c);
    load_pixel(s, pixel, 2 * (first + c), 2 * units, values);
    round_row(values, units, dst + c);
  }
}

// `width` units of `count` pixels that lie `step` apart, side by side.
inline void load_units_of_line(const Source& s, int64_t pixel, int64_t step, int64_t count, int64_t first,
                               int64_t width, float* dst) {
  for (int64_t j = 0; j < count; ++j) load_units_of_pixel(s, pixel + j * step, first, width, dst + j * width);
}

// The product is read once; the second visit of the statistics is to the output, which is half as large.
template <int V>
void write_block(const float* c, int64_t ldc, int64_t rows, Value* out, int64_t stride, const TileStats& to) {
  const float inverse = 1.f / static_cast<float>(rows);
  vec average[V];
  for (int j = 0; j < V; ++j) average[j] = vec{};
  for (int64_t m = 0; m < rows; ++m) {
    for (int j = 0; j < V; ++j) {
      const VecH rounded = round_to_bfloat16(load(c + m * ldc + j * kLanes));
      write(out + m * stride + j * kLanes, rounded);
      average[j] += bit_cast<vec>(widen(rounded) << 16);
    }
  }
  for (int j = 0; j < V; ++j) average[j] *= inverse;
  deviations_block<V>(out, stride, rows, average, to);
}

void write_tile(const ForwardArgs& a, const Tile& where, int64_t first, int64_t columns, float* c, int64_t ldc, bool,
                const TileStats& stats) {
  const int64_t rows = where.pixels, stride = a.out.stride;
  Value* out = a.out.data + where.pixel[0] * stride + first;
  int64_t n = 0;
  if (stats) {
    for (; n + 4 * kLanes <= columns; n += 4 * kLanes) write_block<4>(c + n, ldc, rows, out + n, stride, stats.from(n));
    for (; n + kLanes <= columns; n += kLanes) write_block<1>(c + n, ldc, rows, out + n, stride, stats.from(n));
  }
  for (int64_t m = 0; m < rows; ++m) {
    float* from = c + m * ldc;
    Value* to = out + m * stride;
    int64_t i = n;
    for (; i + kLanes <= columns; i += kLanes) store(to + i, load(from + i));
    for (; i < columns; ++i) {
      put(to + i, from[i]);
      from[i] = to_float(to[i]);
    }
  }
  if (stats) column_stats(c + n, ldc, rows, columns - n, stats.from(n));
}

// The operand of a tile for the weight gradient: units of a pixel and the one that the next output pixel reads through
// the same tap.
void load_operand(const Problem& p, const Source& s, int64_t tile, Chunk chunk, float* scratch) {
  const int64_t width = chunk.width, begin = p.first_row(tile), end = p.first_row(tile + 1);
  float* const values = scratch_v.get(most(2, p.scratch_w) * width);
  const auto load = [&](int64_t line, int64_t j, float* to) {
    const int64_t x = p.w.source(0, j);
    if (line < 0 || x < 0 || x >= p.w.src_size) std::memset(to, 0, width * sizeof(float));
    else load_pixel(s, line + x, chunk.first, width, to);
  };
  int64_t pixel = 0;
  if (p.one_to_one()) {
    int64_t before = -1;
    for (int64_t row = begin; row < end; ++row) {
      const int64_t line = (row / p.h.grid * p.h.src_size + row % p.h.grid * p.h.step) * p.w.src_size;
      for (int64_t j = 0; j < p.w.grid; ++j, ++pixel) {
        const int64_t now = line + j * p.w.step;
        if (pixel % 2 == 1) interleave_pixels(s, before, now, chunk.first, width, values, scratch + pixel / 2 * width);
        before = now;
      }
    }
    if (pixel % 2 == 1) interleave_pixels(s, before, -1, chunk.first, width, values, scratch + pixel / 2 * width);
    return;
  }
  for (int64_t row = begin; row < end;) {
    const int64_t n = row / p.h.grid, first = row % p.h.grid, count = least(end - row, p.h.grid - first),
                  in_rows = p.h.scratch_size(count);
    for (int64_t i = 0; i < in_rows; ++i) {
      const int64_t y = p.h.source(first, i),
                    line = y < 0 || y >= p.h.src_size ? -1 : (n * p.h.src_size + y) * p.w.src_size;
      float* to = scratch + pixel * width;
      pixel += p.scratch_w;
      if (line < 0) {
        std::memset(to, 0, p.scratch_w * width * sizeof(float));
        continue;
      }
      for (int64_t j = 0; j < p.scratch_w; ++j) load(line, j, values + j * width);
      const int64_t next = p.w.scratch_step();
      for (int64_t j = 0; j < p.scratch_w; ++j)
        interleave(values + j * width, j + next < p.scratch_w ? values + (j + next) * width : nullptr, width,
                   to + j * width);
    }
    row += count;
  }
}

// The pixels that pair up: of a whole tile or of a row.
int64_t line_pixels(const Problem& p, int64_t pixels) { return p.one_to_one() ? pixels : p.w.grid; }

// How many units a tile has; their bases replace those of its pixels.
int64_t locate_units(const Problem& p, int64_t width, const Tile& where) {
  const int64_t line = line_pixels(p, where.pixels);
  int64_t* base = scratch_base.data;
  int64_t units = 0;
  for (int64_t start = 0; start < where.pixels; start += line)
    for (int64_t j = 0; j < line; j += 2, ++units) base[units] = p.one_to_one() ? units * width : base[start + j];
  return units;
}

void load_gradient(const Problem& p, const Source& s, const Tile& where, int64_t units, int64_t first, int64_t columns,
                   float* gradient) {
  const int64_t line = line_pixels(p, where.pixels);
  float* const values = scratch_v.get(2 * kPanel);
  each_panel(columns, units, gradient, [&](int64_t begin, int64_t valid, int64_t width, float* to) {
    for (int64_t start = 0; start < where.pixels; start += line) {
      for (int64_t j = 0; j < line; j += 2, to += width) {
        const bool two = j + 1 < line;
        interleave_pixels(s, where.pixel[start + j], two ? where.pixel[start + j + 1] : -1, first + begin, valid,
                          values, to);
        for (int64_t n = valid; n < width; ++n) to[n] = 0.f;
      }
    }
  });
}

}  // namespace
}  // namespace FUSEDRES_CAPABILITY
}  // namespace fusedres
