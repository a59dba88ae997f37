// The transforms of Winograd's F(2x2, 3x3): a 2 x 2 tile of a 3 x 3 convolution's output from 16 products instead of 36, and its transpose
// for the weight gradient. Lavin and Gray 2015 (arXiv 1509.09308), section 4.1.
//
//   output tile     = A^T [ sum over channels (G w G^T) * (B^T d B) ] A      d: the 4 x 4 input pixels under the tile
//   weight gradient = G^T [ sum over tiles (A dy A^T) * (B^T d B) ] G        dy: the 2 x 2 output gradients
//
// The products are 16 matrix products, one per position of the 4 x 4 grid. Sums are shorter than the direct ones (channels instead of nine
// times as many), and the transforms multiply by 0, 1 and 1/2 only: rounding is no worse than the direct convolution's.
//
// Included by conv_engine.h, within its namespace, behind its vectors.

constexpr int kPositions = 16;

// Every transform is the same along both axes: f maps a line of `from` vectors to a line of `to`. First down the columns, then along the rows.
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
