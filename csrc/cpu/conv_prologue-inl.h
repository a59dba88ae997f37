// The prologue: the source pixels that a tile needs are loaded into a scratch that stays in L2, padded with zeros, and
// whatever is pending (scale_shift and activation, or the gradient's p * g + q * raw + r) is applied on the way.
#pragma once

#include <cstdint>
#include <cstring>

#include "conv_grid-inl.h"
#ifdef FUSEDRES_PAIRS
#include "conv_pairs-inl.h"
#else
#include "conv_singles-inl.h"
#endif

namespace fusedres {
namespace FUSEDRES_CAPABILITY {
namespace {

void load_tile(const Problem& p, const Source& s, int64_t tile, Chunk chunk, float* scratch) {
  const int64_t begin = p.first_row(tile), end = p.first_row(tile + 1);
  float* dst = scratch;
  for (int64_t row = begin; row < end;) {
    const int64_t n = row / p.h.grid, first = row % p.h.grid;
    const int64_t count = least(end - row, p.h.grid - first);
    const int64_t in_rows = p.h.scratch_size(count);
    for (int64_t i = 0; i < in_rows; ++i) {
      const int64_t y = p.h.source(first, i);
      if (y < 0 || y >= p.h.src_size) {
        std::memset(dst, 0, p.scratch_w * chunk.width * sizeof(float));
        dst += p.scratch_w * chunk.width;
        continue;
      }
      const int64_t line = (n * p.h.src_size + y) * p.w.src_size;
      // the pixels of the line that are inside the source, and zeros on both sides
      const int64_t step = p.w.taps == 1 ? p.w.step : 1, left = p.w.source(0, 0),
                    begin_inside = least(p.scratch_w, left < 0 ? div_up(-left, step) : 0),
                    end_inside = most(begin_inside, least(p.scratch_w, div_up(p.w.src_size - left, step)));
      const auto pad = [&](int64_t from, int64_t to) {
        std::memset(dst + from * chunk.width, 0, (to - from) * chunk.width * sizeof(float));
      };
      pad(0, begin_inside);
      (p.winograd || p.abreast > 1 ? load_line : load_units_of_line)(s, line + left + begin_inside * step, step,
                                                                     end_inside - begin_inside, chunk.first,
                                                                     chunk.width, dst + begin_inside * chunk.width);
      pad(end_inside, p.scratch_w);
      dst += p.scratch_w * chunk.width;
    }
    row += count;
  }
}

// The operand of groups abreast, one vector of channels behind the other: what a register kernel reads stays in L1.
// Groups that fill no vector lie closer: what lanes behind them read is of the next pixel, and is written nowhere.
void load_abreast(const Problem& p, const Source& s, int64_t tile, float* scratch) {
  for (int64_t first = 0; first < p.dst_c; first += kLanes)
    load_tile(p, s, tile, {first, least(kLanes, p.dst_c - first), 0}, scratch + first * p.scratch_pixels);
}

// Columns of a tile's output gradients as numbers, panel by panel: what a register kernel reads lies side by side.
void load_panels(const Source& s, const Tile& where, int64_t first, int64_t columns, float* gradient) {
  each_panel(columns, where.pixels, gradient, [&](int64_t begin, int64_t valid, int64_t width, float* to) {
    if (valid == width)
      return load_pixels(s, [&](int64_t m) { return where.pixel[m]; }, where.pixels, first + begin, width, to);
    for (int64_t m = 0; m < where.pixels; ++m) {
      load_line(s, where.pixel[m], 0, 1, first + begin, valid, to + m * width);
      for (int64_t n = valid; n < width; ++n) to[m * width + n] = 0.f;
    }
  });
}

}  // namespace
}  // namespace FUSEDRES_CAPABILITY
}  // namespace fusedres
