// The transforms of Winograd's F(2x2, 3x3): a 2 x 2 tile of a 3 x 3 convolution's output from 16 products instead of
// 36, and its transpose for the weight gradient. Lavin and Gray 2015 (arXiv 1509.09308), section 4.1.
//
//   output tile     = A^T [ sum over channels (G w G^T) * (B^T d B) ] A      d: the 4 x 4 input pixels under the tile
//   weight gradient = G^T [ sum over tiles (A dy A^T) * (B^T d B) ] G        dy: the 2 x 2 output gradients
//
// The products are 16 matrix products, one per position of the 4 x 4 grid. Sums are shorter than the direct ones
// (channels instead of nine times as many), and the transforms multiply by 0, 1 and 1/2 only: rounding is no worse than
// the direct convolution's. A number reaches those outputs alone that it reaches directly; but where one is infinite,
// or so large that the transforms overflow, what they make of it is NaN: such results are computed again, directly.
#pragma once

#include <cstdint>

#include "conv_grid-inl.h"

namespace fusedres {
namespace FUSEDRES_CAPABILITY {
namespace {

// Every transform is the same along both axes: f maps a line of `from` vectors to a line of `to`. First down the
// columns, then along the rows.
template <int kFrom, int kTo, class F>
inline void both_axes(const vec (&in)[kFrom][kFrom], vec (&out)[kTo][kTo], F&& f) {
  vec half[kTo][kFrom];
#pragma GCC unroll 4
  for (int j = 0; j < kFrom; ++j) {
    vec line[kFrom], result[kTo];
#pragma GCC unroll 4
    for (int i = 0; i < kFrom; ++i) line[i] = in[i][j];
    f(line, result);
#pragma GCC unroll 4
    for (int i = 0; i < kTo; ++i) half[i][j] = result[i];
  }
#pragma GCC unroll 4
  for (int i = 0; i < kTo; ++i) f(half[i], out[i]);
}

// B^T d
inline void input_line(const vec (&d)[4], vec (&v)[4]) {
  v[0] = d[0] - d[2];
  v[1] = d[1] + d[2];
  v[2] = d[2] - d[1];
  v[3] = d[1] - d[3];
}

// A^T m
inline void output_line(const vec (&m)[4], vec (&y)[2]) {
  y[0] = m[0] + m[1] + m[2];
  y[1] = m[1] - m[2] - m[3];
}

// A dy
inline void gradient_line(const vec (&dy)[2], vec (&v)[4]) {
  v[0] = dy[0];
  v[1] = dy[0] + dy[1];
  v[2] = dy[0] - dy[1];
  v[3] = -dy[1];
}

// G w
inline void weight_line(const vec (&w)[3], vec (&u)[4]) {
  const vec ends = (w[0] + w[2]) * 0.5f, middle = w[1] * 0.5f;
  u[0] = w[0];
  u[1] = ends + middle;
  u[2] = ends - middle;
  u[3] = w[2];
}

// G^T u
inline void weight_gradient_line(const vec (&u)[4], vec (&dw)[3]) {
  const vec ends = (u[1] + u[2]) * 0.5f;
  dw[0] = u[0] + ends;
  dw[1] = (u[1] - u[2]) * 0.5f;
  dw[2] = ends + u[3];
}

// Writes the positions of one tile and one vector of channels, `step` floats apart.
inline void store_positions(const vec (&v)[4][4], float* to, int64_t step) {
#pragma GCC unroll 16
  for (int i = 0; i < kPositions; ++i) store(to + i * step, v[i / 4][i % 4]);
}

inline void load_positions(const float* from, int64_t step, vec (&v)[4][4]) {
#pragma GCC unroll 16
  for (int i = 0; i < kPositions; ++i) v[i / 4][i % 4] = load(from + i * step);
}

// Winograd's patches of a tile: 2 x 2 output pixels and the 4 x 4 source pixels under them. Where a tile's rows or
// columns end on an odd one, the patch's second row or column is not an output; what it reads of the source then is
// repeated, and never reaches an output.
struct Patch {
  int64_t index, row, last_row, column;  // row and column in the scratch
  int64_t pixel;                         // of the tile, the first of the four
  bool second_row, second_column;
};

template <class F>
void each_patch(const Problem& p, int64_t tile, F&& f) {
  const int64_t begin = tile * p.tile_rows, end = least(p.rows(), begin + p.tile_rows);
  int64_t index = 0, pixel = 0, scratch_row = 0;
  for (int64_t row = begin; row < end;) {
    const int64_t count = least(end - row, p.h.grid - row % p.h.grid), in_rows = p.h.scratch_size(count);
    for (int64_t i = 0; i < count; i += 2)
      for (int64_t j = 0; j < p.w.grid; j += 2)
        f(Patch{index++, scratch_row + i, scratch_row + in_rows - 1, j, pixel + i * p.w.grid + j, i + 1 < count,
                j + 1 < p.w.grid});
    scratch_row += in_rows;
    pixel += count * p.w.grid;
    row += count;
  }
}

int64_t patches_of(const Problem& p, int64_t tile) {
  int64_t count = 0;
  each_patch(p, tile, [&](const Patch&) { ++count; });
  return count;
}

// The loaded scratch of a tile, transformed: positions `step` floats apart, patches `width`.
void transform_input(const Problem& p, int64_t tile, const float* scratch, int64_t width, float* to, int64_t step) {
  each_patch(p, tile, [&](const Patch& patch) {
    const float* source[4][4];
    for (int i = 0; i < 4; ++i)
      for (int j = 0; j < 4; ++j)
        source[i][j] =
            scratch +
            (least(patch.row + i, patch.last_row) * p.scratch_w + least(patch.column + j, p.scratch_w - 1)) * width;
    for (int64_t c = 0; c < width; c += kLanes) {
      vec d[4][4], v[4][4];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) d[i / 4][i % 4] = load(source[i / 4][i % 4] + c);
      both_axes(d, v, input_line);
      store_positions(v, to + patch.index * width + c, step);
    }
  });
}

// Whether every number that was shown to it is finite: infinity and NaN times zero are NaN, which a sum keeps.
struct Finite {
  vec sum = {};
  void see(vec v) { sum += v * 0.f; }
  explicit operator bool() const {
    for (int i = 0; i < kLanes; ++i)
      if (sum[i] != 0.f) return false;
    return true;
  }
};

// The products of a tile, transformed back to its pixels. Returns whether they are finite.
bool transform_output(const Problem& p, int64_t tile, const float* from, int64_t width, int64_t step, float* c,
                      int64_t ldc) {
  Finite finite;
  each_patch(p, tile, [&](const Patch& patch) {
    float* to = c + patch.pixel * ldc;
    for (int64_t n = 0; n < width; n += kLanes) {
      vec m[4][4], y[2][2];
      load_positions(from + patch.index * width + n, step, m);
      both_axes(m, y, output_line);
      for (const auto& line : y)
        for (const vec v : line) finite.see(v);
      store(to + n, y[0][0]);
      if (patch.second_column) store(to + ldc + n, y[0][1]);
      if (patch.second_row) {
        store(to + p.w.grid * ldc + n, y[1][0]);
        if (patch.second_column) store(to + (p.w.grid + 1) * ldc + n, y[1][1]);
      }
    }
  });
  return static_cast<bool>(finite);
}

// The output gradients of a tile (rows of `width`), transformed for the weight gradient.
void transform_gradient(const Problem& p, int64_t tile, const float* gradient, int64_t width, float* to, int64_t step) {
  each_patch(p, tile, [&](const Patch& patch) {
    const float* from = gradient + patch.pixel * width;
    for (int64_t n = 0; n < width; n += kLanes) {
      vec dy[2][2] = {}, v[4][4];
      dy[0][0] = load(from + n);
      if (patch.second_column) dy[0][1] = load(from + width + n);
      if (patch.second_row) {
        dy[1][0] = load(from + p.w.grid * width + n);
        if (patch.second_column) dy[1][1] = load(from + (p.w.grid + 1) * width + n);
      }
      both_axes(dy, v, gradient_line);
      store_positions(v, to + patch.index * width + n, step);
    }
  });
}

// Between positions: their distance in cache is no power of two, which would put all 16 into the same few sets.
int64_t position_step(int64_t patches, int64_t width) { return patches * width + kLanes; }

}  // namespace
}  // namespace FUSEDRES_CAPABILITY
}  // namespace fusedres
