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

// As many numbers as lie in a vector of units.
constexpr int64_t kOfVector = 2 * kLanes;
// Numbers, or units, that go through floats at once where channels fill no vector or anything else is pending.
constexpr int64_t kPiece = 256;

// The terms of numbers at even and at odd places.
template <class P>
struct TermHalves {
  Terms even, odd;

  TermHalves(const P& from, int64_t c) {
    if constexpr (P::kPending) {
      from.terms(c, [](const float* p) { return halves(p).even; }, &even);
      from.terms(c, [](const float* p) { return halves(p).odd; }, &odd);
    }
  }
};

inline bits read_units(const Plain& from, int64_t pixel, int64_t c) {
  return read<bits>(from.x + pixel * from.stride + c);
}

// The numbers of a pixel from channel c on. They are widened where they lie, not moved.
template <class P>
inline Halves read_halves(const P& from, int64_t pixel, int64_t c, const TermHalves<P>& terms) {
  const Halves x = halves(read_units(from, pixel, c));
  Halves raw = {};
  if constexpr (P::kSecond) raw = halves(read_units(from.raw, pixel, c));
  return {P::apply(x.even, raw.even, terms.even), P::apply(x.odd, raw.odd, terms.odd)};
}

// Units of two pixels' channels [first, first + n); `second` may be -1 for zeros.
inline void interleave_pixels(const Source& s, int64_t one, int64_t second, int64_t first, int64_t n, float* units) {
  float values[2 * kPiece];
  for (int64_t c = 0; c < n; c += kPiece) {
    const int64_t width = least(kPiece, n - c);
    load_pixel(s, one, first + c, width, values);
    if (second >= 0) load_pixel(s, second, first + c, width, values + kPiece);
    interleave(values, second >= 0 ? values + kPiece : nullptr, width, units + c);
  }
}

// Those of each two of `count` pixels that follow one another, `pitch` units apart. pixel(m) is one of them.
template <class F>
void interleave_line(const Source& s, F&& pixel, int64_t count, int64_t first, int64_t n, int64_t pitch, float* units) {
  int64_t done = 0;  // channels, of pixels that are not alone
  with_pending(s, [&](auto pending) {
    using P = decltype(pending);
    const P from(s, first);
    for (; done + kOfVector <= n; done += kOfVector) {
      const TermHalves<P> terms(from, done);
      float* to = units + done;
      for (int64_t m = 0; m + 1 < count; m += 2, to += pitch) {
        if constexpr (P::kPending) {
          const Halves a = read_halves(from, pixel(m), done, terms), b = read_halves(from, pixel(m + 1), done, terms);
          const Shorts even = round_to_shorts(a.even, b.even), odd = round_to_shorts(a.odd, b.odd);
          store(to, units_in_turn<0>(even, odd, kEveryShort));
          store(to + kLanes, units_in_turn<kLanes / 2>(even, odd, kEveryShort));
        } else {
          const auto a = bit_cast<Shorts>(read_units(from, pixel(m), done)),
                     b = bit_cast<Shorts>(read_units(from, pixel(m + 1), done));
          store(to, units_of<0>(a, b, kEveryShort));
          store(to + kLanes, units_of<kLanes>(a, b, kEveryShort));
        }
      }
    }
  });
  for (int64_t m = 0; m < count; m += 2, units += pitch) {
    const bool two = m + 1 < count;
    const int64_t from = two ? done : 0;
    interleave_pixels(s, pixel(m), two ? pixel(m + 1) : -1, first + from, n - from, units + from);
  }
}

// `width` units of `count` pixels that lie `step` apart, side by side, from unit `first` on.
inline void load_units_of_line(const Source& s, int64_t pixel, int64_t step, int64_t count, int64_t first,
                               int64_t width, float* dst) {
  int64_t done = 0;  // units
  with_pending(s, [&](auto pending) {
    using P = decltype(pending);
    const P from(s, 2 * first);
    for (; done + kLanes <= width; done += kLanes) {
      const TermHalves<P> terms(from, 2 * done);
      for (int64_t j = 0; j < count; ++j) {
        float* to = dst + j * width + done;
        const int64_t of = pixel + j * step;
        if constexpr (P::kPending) {
          const Halves x = read_halves(from, of, 2 * done, terms);
          const Shorts both = round_to_shorts(x.even, x.odd);
          store(to, units_of_halves(both, kEveryShort));
        } else {
          store(to, bit_cast<vec>(read_units(from, of, 2 * done)));
        }
      }
    }
  });
  if (done == width) return;
  float values[2 * kPiece];
  for (int64_t j = 0; j < count; ++j) {
    for (int64_t c = done; c < width; c += kPiece) {
      const int64_t units = least(kPiece, width - c);
      load_pixel(s, pixel + j * step, 2 * (first + c), 2 * units, values);
      round_row(values, units, dst + j * width + c);
    }
  }
}

// A block of a finished tile on its way to the output, and the statistics of what is stored there: the product is read
// once, and the second visit is to the output, which is half as large. A unit's numbers are widened where they lie,
// which makes a vector of those at even and one of those at odd places.
template <int U>
void write_block(const float* c, int64_t ldc, int64_t rows, Value* out, int64_t stride, const TileStats& to) {
  constexpr int V = 2 * U;
  VecStats found[V];
  const auto split = [](bits units, vec* x) {
    const Halves numbers = halves(units);
    x[0] = numbers.even;
    x[1] = numbers.odd;
  };
  measure(
      rows, found,
      [&](int64_t m, vec(&x)[V]) {
        for (int u = 0; u < U; ++u) {
          const float* from = c + m * ldc + u * kOfVector;
          const bits units = bit_cast<bits>(round_to_units(load(from), load(from + kLanes)));
          write(out + m * stride + u * kOfVector, units);
          split(units, x + 2 * u);
        }
      },
      [&](int64_t m, vec(&x)[V]) {
        for (int u = 0; u < U; ++u) split(read<bits>(out + m * stride + u * kOfVector), x + 2 * u);
      });
  for (int j = 0; j < V; ++j) {
    for (int i = 0; i < kLanes; ++i) {
      const int64_t column = j / 2 * kOfVector + 2 * i + j % 2;
      to.mean[column] = found[j].mean[i];
      to.rest[column] = found[j].rest[i];
      to.m2[column] = found[j].m2[i];
    }
  }
}

void write_tile(const ForwardArgs& a, const Tile& where, int64_t first, int64_t columns, float* c, int64_t ldc, bool,
                const TileStats& stats) {
  const int64_t rows = where.pixels, stride = a.out.stride;
  Value* out = a.out.data + where.pixel[0] * stride + first;
  int64_t n = 0;
  if (stats) {
    for (; n + 2 * kOfVector <= columns; n += 2 * kOfVector)
      write_block<2>(c + n, ldc, rows, out + n, stride, stats.from(n));
    for (; n + kOfVector <= columns; n += kOfVector) write_block<1>(c + n, ldc, rows, out + n, stride, stats.from(n));
  }
  for (int64_t m = 0; m < rows; ++m) {
    float* from = c + m * ldc;
    Value* to = out + m * stride;
    int64_t i = n;
    for (; i + kLanes <= columns; i += kLanes) {
      const vec v = load(from + i);
      store(to + i, v);
      if (stats) store(from + i, as_stored(v));
    }
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
    int64_t* source = scratch_strided.get((end - begin) * p.w.grid);
    for (int64_t row = begin; row < end; ++row) {
      const int64_t line = (row / p.h.grid * p.h.src_size + row % p.h.grid * p.h.step) * p.w.src_size;
      for (int64_t j = 0; j < p.w.grid; ++j) source[pixel++] = line + j * p.w.step;
    }
    return interleave_line(s, [=](int64_t m) { return source[m]; }, pixel, chunk.first, width, width, scratch);
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
  each_panel(columns, units, gradient, [&](int64_t begin, int64_t valid, int64_t width, float* to) {
    float* of_line = to;
    for (int64_t start = 0; start < where.pixels; start += line, of_line += div_up(line, 2) * width)
      interleave_line(s, [&](int64_t m) { return where.pixel[start + m]; }, line, first + begin, valid, width, of_line);
    for (int64_t i = 0; valid < width && i < units; ++i)
      for (int64_t n = valid; n < width; ++n) to[i * width + n] = 0.f;
  });
}

}  // namespace
}  // namespace FUSEDRES_CAPABILITY
}  // namespace fusedres
