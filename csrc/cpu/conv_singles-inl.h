// Pixels and tiles of float32, whose units are single numbers (conv_operand-inl.h). conv_pairs-inl.h has the same
// functions for bfloat16.
#pragma once

#include <cstdint>
#include <cstring>

#include "conv_grid-inl.h"
#include "conv_pixel-inl.h"
#include "conv_stats-inl.h"

namespace fusedres {
namespace FUSEDRES_CAPABILITY {
namespace {

// `width` units of `count` pixels that lie `step` apart, side by side.
inline void load_units_of_line(const Source& s, int64_t pixel, int64_t step, int64_t count, int64_t first,
                               int64_t width, float* dst) {
  load_line(s, pixel, step, count, first, width, dst);
}

// A finished tile's way to the output, whose pixels lie side by side, and the statistics of what is stored there.

void write_tile(const ForwardArgs& a, const Tile& where, int64_t first, int64_t columns, float* c, int64_t ldc,
                bool in_place, const TileStats& stats) {
  if (!in_place)
    for (int64_t m = 0; m < where.pixels; ++m)
      std::memcpy(a.out.data + where.pixel[m] * a.out.stride + first, c + m * ldc, columns * sizeof(float));
  if (stats) column_stats(c, ldc, where.pixels, columns, stats);
}

// The operands of a tile for the weight gradient.
void load_tile(const Problem& p, const Source& s, int64_t tile, Chunk chunk, float* scratch);
void load_operand(const Problem& p, const Source& s, int64_t tile, Chunk chunk, float* scratch) {
  load_tile(p, s, tile, chunk, scratch);
}

int64_t locate_units(const Problem&, int64_t, const Tile& where) { return where.pixels; }

void load_panels(const Source& s, const Tile& where, int64_t first, int64_t columns, float* gradient);
void load_gradient(const Problem&, const Source& s, const Tile& where, int64_t, int64_t first, int64_t columns,
                   float* gradient) {
  load_panels(s, where, first, columns, gradient);
}

}  // namespace
}  // namespace FUSEDRES_CAPABILITY
}  // namespace fusedres
