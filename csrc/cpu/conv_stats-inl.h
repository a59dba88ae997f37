// The statistics of a convolution's output, taken tile by tile while it is in cache and merged in the order of the
// tiles.
#pragma once

#include <cstdint>

#include "conv_grid-inl.h"
#include "parallel.h"

namespace fusedres {
namespace FUSEDRES_CAPABILITY {
namespace {

// The statistics of the rows of a tile, per channel. The mean is mean + rest: where it is far above the deviation, a
// float alone would be too coarse for what the tiles' means differ by.
struct TileStats {
  float *mean = nullptr, *rest, *m2;

  explicit operator bool() const { return mean != nullptr; }
  TileStats from(int64_t channel) const { return {mean + channel, rest + channel, m2 + channel}; }
};

constexpr int kTileStats = 3;

// Those of tile `tile` in `partial`, which may be null.
inline TileStats tile_stats(float* partial, const Problem& p, int64_t tile) {
  if (partial == nullptr) return {};
  float* own = partial + tile * kTileStats * p.channels();
  return {own, own + p.channels(), own + 2 * p.channels()};
}

// The sums of a second visit: deviations from an average that is the mean but for rounding, and their squares.
struct Deviations {
  vec sum = {}, squares = {};

  void add(vec deviation) {
    sum += deviation;
    squares += deviation * deviation;
  }
  void add(const Deviations& more) {
    sum += more.sum;
    squares += more.squares;
  }
  void put(vec average, float rows, const TileStats& to) const {
    const vec rest = sum / rows;
    store(to.mean, average);
    store(to.rest, rest);
    store(to.m2, squares - sum * rest);
  }
};

// The second visit, of a few rows at a time, whose sums are then added: a sum is rounded as often as something is added
// to it.
template <int V, class T>
void deviations_block(const T* x, int64_t pitch, int64_t rows, const vec (&average)[V], const TileStats& to) {
  constexpr int64_t kRows = 16;
  Deviations all[V];
  for (int64_t begin = 0; begin < rows; begin += kRows) {
    Deviations few[V];
    for (int64_t m = begin; m < least(rows, begin + kRows); ++m)
      for (int j = 0; j < V; ++j) few[j].add(load(x + m * pitch + j * kLanes) - average[j]);
    for (int j = 0; j < V; ++j) all[j].add(few[j]);
  }
  for (int j = 0; j < V; ++j) all[j].put(average[j], static_cast<float>(rows), to.from(j * kLanes));
}

// Two visits of values that are in cache, several vectors at once, because one chain of additions would wait for
// itself.
template <int V>
void stats_block(const float* c, int64_t ldc, int64_t rows, const TileStats& to) {
  const float inverse = 1.f / static_cast<float>(rows);
  vec average[V];
  for (int j = 0; j < V; ++j) average[j] = vec{};
  for (int64_t m = 0; m < rows; ++m)
    for (int j = 0; j < V; ++j) average[j] += load(c + m * ldc + j * kLanes);
  for (int j = 0; j < V; ++j) average[j] *= inverse;
  deviations_block<V>(c, ldc, rows, average, to);
}

void column_stats(const float* c, int64_t ldc, int64_t rows, int64_t columns, const TileStats& to) {
  int64_t n = 0;
  for (; n + 4 * kLanes <= columns; n += 4 * kLanes) stats_block<4>(c + n, ldc, rows, to.from(n));
  for (; n + kLanes <= columns; n += kLanes) stats_block<1>(c + n, ldc, rows, to.from(n));
  for (; n < columns; ++n) {
    double sum = 0, squares = 0;
    for (int64_t m = 0; m < rows; ++m) sum += c[m * ldc + n];
    const double average = sum / static_cast<double>(rows);
    for (int64_t m = 0; m < rows; ++m) {
      const double d = c[m * ldc + n] - average;
      squares += d * d;
    }
    to.mean[n] = static_cast<float>(average);
    to.rest[n] = static_cast<float>(average - to.mean[n]);
    to.m2[n] = static_cast<float>(squares);
  }
}

// Chan, Golub and LeVeque (1983): merge (count, mean, M2) of the tiles, in order.
void merge_stats(const Problem& p, float* partial, float* mean, float* m2, Parallel parallel) {
  const int64_t channels = p.channels(), blocks = div_up(channels, 64);
  run_parallel(parallel, blocks, p.tiles * channels, [&](int64_t b) {
    for (int64_t n = b * 64; n < least(channels, b * 64 + 64); ++n) {
      double count = 0, average = 0, squares = 0;
      for (int64_t t = 0; t < p.tiles; ++t) {
        const TileStats own = tile_stats(partial, p, t).from(n);
        const double extra = static_cast<double>(pixels_of(p, t)), total = count + extra;
        const double delta = double(*own.mean) + double(*own.rest) - average;
        average += delta * extra / total;
        squares += *own.m2 + delta * delta * count * extra / total;
        count = total;
      }
      mean[n] = static_cast<float>(average);
      m2[n] = static_cast<float>(squares);
    }
  });
}

}  // namespace
}  // namespace FUSEDRES_CAPABILITY
}  // namespace fusedres
