// The transforms of Winograd's algorithm F(m x m, 3 x 3): a tile of m x m pixels of a 3 x 3 convolution's output from
// (m + 2)^2 products instead of 9 m^2, and, with m = 2, its transpose for the weight gradient. Lavin and Gray 2015
// (arXiv 1509.09308), section 4.
//
//   output tile     = A^T [ sum over channels (G w G^T) * (B^T d B) ] A      d: the input pixels under the tile
//   weight gradient = G^T [ sum over tiles (A dy A^T) * (B^T d B) ] G        dy: the tile's output gradients
//
// The products are matrix products, one per position of a grid of (m + 2) x (m + 2). Both operands are taken for
// polynomials along each axis; a position is the point where their product is evaluated, or infinity, where that is
// its highest coefficient (Toom and Cook). The rows of B^T are the polynomials that vanish at all other points.
//
// With m = 2 a number reaches those outputs alone that it reaches directly; with m = 3 it leaves roundings in others of
// its tile. Where one is infinite, or so large that the transforms overflow, what they make of it is NaN: such results
// are computed again, directly.
#pragma once

#include <cstdint>

#include "conv_grid-inl.h"

namespace fusedres {
namespace FUSEDRES_CAPABILITY {
namespace {

// Every transform is the same along both axes: f maps a line of `kFrom` vectors to a line of `kTo`. First down the
// columns, then along the rows. read(i, j) gives the input, write(i, j, v) takes the result.
template <int kFrom, int kTo, class Read, class F, class Write>
inline __attribute__((always_inline)) void both_axes(Read&& read, F&& f, Write&& write) {
  vec half[kTo][kFrom];
#pragma GCC unroll 6
  for (int j = 0; j < kFrom; ++j) {
    vec line[kFrom], result[kTo];
#pragma GCC unroll 6
    for (int i = 0; i < kFrom; ++i) line[i] = read(i, j);
    f(line, result);
#pragma GCC unroll 6
    for (int i = 0; i < kTo; ++i) half[i][j] = result[i];
  }
#pragma GCC unroll 6
  for (int i = 0; i < kTo; ++i) {
    vec result[kTo];
    f(half[i], result);
#pragma GCC unroll 6
    for (int j = 0; j < kTo; ++j) write(i, j, result[j]);
  }
}

// m = 2, points 0, 1, -1 and infinity: multiplications by 0, 1 and 1/2 only, and sums that are shorter than the direct
// ones (channels instead of nine times as many). Rounding is no worse than the direct convolution's.
struct WinogradTwo {
  static constexpr int kTile = 2, kPositions = 4;

  // B^T d
  static void input(const vec (&d)[4], vec (&v)[4]) {
    v[0] = d[0] - d[2];
    v[1] = d[1] + d[2];
    v[2] = d[2] - d[1];
    v[3] = d[1] - d[3];
  }
  // A^T m
  static void output(const vec (&m)[4], vec (&y)[2]) {
    y[0] = m[0] + m[1] + m[2];
    y[1] = m[1] - m[2] - m[3];
  }
  // A dy
  static void gradient(const vec (&dy)[2], vec (&v)[4]) {
    v[0] = dy[0];
    v[1] = dy[0] + dy[1];
    v[2] = dy[0] - dy[1];
    v[3] = -dy[1];
  }
  // G w
  static void weight(const vec (&w)[3], vec (&u)[4]) {
    const vec ends = (w[0] + w[2]) * 0.5f, middle = w[1] * 0.5f;
    u[0] = w[0];
    u[1] = ends + middle;
    u[2] = ends - middle;
    u[3] = w[2];
  }
  // G^T u
  static void weight_gradient(const vec (&u)[4], vec (&dw)[3]) {
    const vec ends = (u[1] + u[2]) * 0.5f;
    dw[0] = u[0] + ends;
    dw[1] = (u[1] - u[2]) * 0.5f;
    dw[2] = ends + u[3];
  }
};

// m = 3, points 0, -1, a, 1/a and infinity. Reciprocals of one sign keep the matrices' numbers near one (Barabasz,
// Anderson, Soodhalter and Gregg 2020, arXiv 1803.10986, on the choice of points): with 3/5 and 5/3 the roundings of
// the products' sums are magnified least, and still magnified: the sums are kept short (Problem::sum_channels).
struct WinogradThree {
  static constexpr int kTile = 3, kPositions = 5;
  static constexpr float a = 3.0 / 5, b = 5.0 / 3, a2 = 9.0 / 25, b2 = 25.0 / 9;
  static constexpr float s = 34.0 / 15;  // x^2 - s x + 1 vanishes at a and b
  // 1 over the products of a point's distances from the others
  static constexpr float of_one = -15.0 / 64, of_a = -125.0 / 128, of_b = 27.0 / 128;

  // B^T d
  static void input(const vec (&d)[5], vec (&v)[5]) {
    v[0] = (d[0] + d[3]) + (1 - s) * (d[1] + d[2]);
    v[1] = (d[1] + d[3]) - s * d[2];
    v[2] = (d[3] - b * d[1]) + (1 - b) * d[2];
    v[3] = (d[3] - a * d[1]) + (1 - a) * d[2];
    v[4] = (d[1] + d[4]) + (1 - s) * (d[2] + d[3]);
  }
  // A^T m
  static void output(const vec (&m)[5], vec (&y)[3]) {
    y[0] = (m[0] + m[1]) + (m[2] + m[3]);
    y[1] = (a * m[2] - m[1]) + b * m[3];
    y[2] = (m[1] + m[4]) + (a2 * m[2] + b2 * m[3]);
  }
  // G w
  static void weight(const vec (&w)[3], vec (&u)[5]) {
    u[0] = w[0];
    u[1] = (w[0] + w[2] - w[1]) * of_one;
    u[2] = (w[0] + a * w[1] + a2 * w[2]) * of_a;
    u[3] = (w[0] + b * w[1] + b2 * w[2]) * of_b;
    u[4] = w[2];
  }
};

// m = 4, points 0, 1, -1, 2, -2 and infinity, as in the paper. Roundings are magnified more than with m = 3, and stay
// far below those of what is stored in bfloat16.
struct WinogradFour {
  static constexpr int kTile = 4, kPositions = 6;

  // B^T d
  static void input(const vec (&d)[6], vec (&v)[6]) {
    const vec even = d[4] - 4 * d[2], odd = d[3] - 4 * d[1], far_even = d[4] - d[2], far_odd = 2 * (d[3] - d[1]);
    v[0] = 4 * (d[0] - d[2]) + far_even;
    v[1] = even + odd;
    v[2] = even - odd;
    v[3] = far_even + far_odd;
    v[4] = far_even - far_odd;
    v[5] = (d[5] - d[3]) - 2 * far_odd;
  }
  // A^T m
  static void output(const vec (&m)[6], vec (&y)[4]) {
    const vec even = m[1] + m[2], odd = m[1] - m[2], far_even = m[3] + m[4], far_odd = m[3] - m[4];
    y[0] = m[0] + even + far_even;
    y[1] = odd + 2 * far_odd;
    y[2] = even + 4 * far_even;
    y[3] = (odd + m[5]) + 8 * far_odd;
  }
  // A dy
  static void gradient(const vec (&dy)[4], vec (&v)[6]) {
    const vec even = dy[0] + dy[2], odd = dy[1] + dy[3], far_even = dy[0] + 4 * dy[2], far_odd = 2 * dy[1] + 8 * dy[3];
    v[0] = dy[0];
    v[1] = even + odd;
    v[2] = even - odd;
    v[3] = far_even + far_odd;
    v[4] = far_even - far_odd;
    v[5] = dy[3];
  }
  // G w
  static void weight(const vec (&w)[3], vec (&u)[6]) {
    const vec even = (w[0] + w[2]) * (-1.f / 6), odd = w[1] * (-1.f / 6),
              far_even = w[0] * (1.f / 24) + w[2] * (1.f / 6), far_odd = w[1] * (1.f / 12);
    u[0] = w[0] * 0.25f;
    u[1] = even + odd;
    u[2] = even - odd;
    u[3] = far_even + far_odd;
    u[4] = far_even - far_odd;
    u[5] = w[2];
  }
  // G^T u
  static void weight_gradient(const vec (&u)[6], vec (&dw)[3]) {
    const vec even = (u[1] + u[2]) * (-1.f / 6), far_even = u[3] + u[4];
    dw[0] = u[0] * 0.25f + (even + far_even * (1.f / 24));
    dw[1] = (u[2] - u[1]) * (1.f / 6) + (u[3] - u[4]) * (1.f / 12);
    dw[2] = (even + far_even * (1.f / 6)) + u[5];
  }
};

// f(the transforms of a problem that Winograd's algorithm takes).
template <class F>
inline void with_winograd(const Problem& p, F&& f) {
  if constexpr (kPairs)
    if (p.winograd == 4) return f(WinogradFour{});
  if (p.winograd == 2) f(WinogradTwo{});
  else f(WinogradThree{});
}

// Writes the positions of one patch and one vector of channels, `step` floats apart; and reads them.
template <class Winograd>
inline auto store_positions(float* to, int64_t step) {
  return [=](int i, int j, vec v) { store(to + (i * Winograd::kPositions + j) * step, v); };
}

template <class Winograd>
inline auto load_positions(const float* from, int64_t step) {
  return [=](int i, int j) { return load(from + (i * Winograd::kPositions + j) * step); };
}

// Winograd's patches of a tile: its output tiles, and the source pixels under each. Where the tile's rows or columns
// end within a patch, its other rows or columns are no outputs; what it reads of the source then is repeated, and never
// reaches an output.
struct Patch {
  int64_t index, row, last_row, column;  // row and column in the scratch
  int64_t pixel;                         // of the tile, the first of the patch
  int64_t rows, columns;                 // that are outputs
};

template <class F>
void each_patch(const Problem& p, int64_t tile, F&& f) {
  const int64_t edge = p.winograd, begin = p.first_row(tile), end = p.first_row(tile + 1);
  int64_t index = 0, pixel = 0, scratch_row = 0;
  for (int64_t row = begin; row < end;) {
    const int64_t count = least(end - row, p.h.grid - row % p.h.grid), in_rows = p.h.scratch_size(count);
    for (int64_t i = 0; i < count; i += edge)
      for (int64_t j = 0; j < p.w.grid; j += edge)
        f(Patch{index++, scratch_row + i, scratch_row + in_rows - 1, j, pixel + i * p.w.grid + j,
                least(edge, count - i), least(edge, p.w.grid - j)});
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
template <class Winograd>
void transform_input(const Problem& p, int64_t tile, const float* scratch, int64_t width, float* to, int64_t step) {
  constexpr int kEdge = Winograd::kPositions;
  each_patch(p, tile, [&](const Patch& patch) {
    const float* row[kEdge];
    int64_t column[kEdge];
    for (int i = 0; i < kEdge; ++i) {
      row[i] = scratch + least(patch.row + i, patch.last_row) * p.scratch_w * width;
      column[i] = least(patch.column + i, p.scratch_w - 1) * width;
    }
    for (int64_t c = 0; c < width; c += kLanes)
      both_axes<kEdge, kEdge>([&](int i, int j) { return load(row[i] + column[j] + c); }, Winograd::input,
                              store_positions<Winograd>(to + patch.index * width + c, step));
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
template <class Winograd>
bool transform_output(const Problem& p, int64_t tile, const float* from, int64_t width, int64_t step, float* c,
                      int64_t ldc) {
  Finite finite;
  each_patch(p, tile, [&](const Patch& patch) {
    float* to = c + patch.pixel * ldc;
    for (int64_t n = 0; n < width; n += kLanes)
      both_axes<Winograd::kPositions, Winograd::kTile>(load_positions<Winograd>(from + patch.index * width + n, step),
                                                       Winograd::output, [&](int i, int j, vec y) {
                                                         finite.see(y);
                                                         if (i < patch.rows && j < patch.columns)
                                                           store(to + (i * p.w.grid + j) * ldc + n, y);
                                                       });
  });
  return static_cast<bool>(finite);
}

// The output gradients of a tile (rows of `width`), transformed for the weight gradient.
template <class Winograd>
void transform_gradient(const Problem& p, int64_t tile, const float* gradient, int64_t width, float* to, int64_t step) {
  each_patch(p, tile, [&](const Patch& patch) {
    const float* from = gradient + patch.pixel * width;
    for (int64_t n = 0; n < width; n += kLanes)
      both_axes<Winograd::kTile, Winograd::kPositions>(
          [&](int i, int j) {
            return i < patch.rows && j < patch.columns ? load(from + (i * p.w.grid + j) * width + n) : vec{};
          },
          Winograd::gradient, store_positions<Winograd>(to + patch.index * width + n, step));
  });
}

// Between positions: their distance in cache is no power of two, which would put all of them into the same few sets.
int64_t position_step(int64_t patches, int64_t width) { return patches * width + kLanes; }

}  // namespace
}  // namespace FUSEDRES_CAPABILITY
}  // namespace fusedres
