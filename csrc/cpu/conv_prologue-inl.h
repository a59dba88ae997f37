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
      for (int64_t j = 0; j < p.scratch_w; ++j, dst += chunk.width) {
        const int64_t x = p.w.source(0, j);
        if (x < 0 || x >= p.w.src_size) {
          for (int64_t c = 0; c < chunk.width; ++c) dst[c] = 0.f;
        } else {
          (p.winograd ? load_numbers_of_pixel : load_units_of_pixel)(s, line + x, chunk.first, chunk.width, dst);
        }
      }
    }
    row += count;
  }
}

// The output gradients of a tile, `ldg` numbers a pixel.
void load_numbers(const Source& s, const Tile& where, int64_t first, int64_t columns, int64_t ldg, float* gradient) {
  for (int64_t m = 0; m < where.pixels; ++m) {
    load_numbers_of_pixel(s, where.pixel[m], first, columns, gradient + m * ldg);
    for (int64_t n = columns; n < ldg; ++n) gradient[m * ldg + n] = 0.f;
  }
}

}  // namespace
}  // namespace FUSEDRES_CAPABILITY
}  // namespace fusedres
