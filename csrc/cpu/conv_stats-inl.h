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

// Vectors of a tile's statistics.
struct VecStats {
  vec mean, rest, m2;
};

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
  VecStats around(vec average, float rows) const {
    const vec rest = sum / rows;
    return {average, rest, squares - sum * rest};
  }
};

// The second visit, of a few rows at a time, whose sums are then added: a sum is rounded as often as something is added
// to it. read(m, x) sets the vectors of row m.
template <int V, class Read>
inline void add_deviations(int64_t rows, const vec (&average)[V], Deviations (&all)[V], Read&& read) {
  constexpr int64_t kRows = 16;
  for (int64_t begin = 0; begin < rows; begin += kRows) {
    Deviations few[V];
    for (int64_t m = begin; m < least(rows, begin + kRows); ++m) {
      vec x[V];
      read(m, x);
      for (int j = 0; j < V; ++j) few[j].add(x[j] - average[j]);
    }
    for (int j = 0; j < V; ++j) all[j].add(few[j]);
  }
}

// The statistics of V vectors of columns, in two visits of values that are in cache, several vectors at once, because
// one chain of additions would wait for itself. first(m, x) and second(m, x) set the vectors of row m, at either visit.
template <int V, class First, class Second>
inline void measure(int64_t rows, VecStats (&found)[V], First&& first, Second&& second) {
  const float inverse = 1.f / static_cast<float>(rows);
  vec average[V] = {};
  for (int64_t m = 0; m < rows; ++m) {
    vec x[V];
    first(m, x);
    for (int j = 0; j < V; ++j) average[j] += x[j];
  }
  for (int j = 0; j < V; ++j) average[j] *= inverse;
  Deviations all[V];
  add_deviations(rows, average, all, second);
  for (int j = 0; j < V; ++j) found[j] = all[j].around(average[j], static_cast<float>(rows));
}

template <int V>
void stats_block(const float* c, int64_t ldc, int64_t rows, const TileStats& to) {
  VecStats found[V];
  const auto read = [&](int64_t m, vec(&x)[V]) {
    for (int j = 0; j < V; ++j) x[j] = load(c + m * ldc + j * kLanes);
  };
  measure(rows, found, read, read);
  for (int j = 0; j < V; ++j) {
    store(to.mean + j * kLanes, found[j].mean);
    store(to.rest + j * kLanes, found[j].rest);
    store(to.m2 + j * kLanes, found[j].m2);
  }
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

constexpr int64_t kMerged = 64;  // channels that are merged side by side, tile by tile, in vectors

// Chan, Golub and LeVeque (1983): merge (count, mean, M2) of the tiles, in order.
void merge_stats(const Problem& p, float* partial, float* mean, float* m2, Parallel parallel) {
  const int64_t channels = p.channels();
  run_parallel(parallel, div_up(channels, kMerged), p.tiles * channels, [&](int64_t b) {
    const int64_t first = b * kMerged, width = least(kMerged, channels - first);
    double average[kMerged] = {}, squares[kMerged] = {};
    int64_t count = 0;
    for (int64_t t = 0; t < p.tiles; ++t) {
      const TileStats own = tile_stats(partial, p, t).from(first);
      const int64_t before = count, extra = pixels_of(p, t);
      count += extra;
      const double share = static_cast<double>(extra) / static_cast<double>(count),
                   weight = share * static_cast<double>(before);
      for (int64_t n = 0; n < width; ++n) {
        const double delta = double(own.mean[n]) + double(own.rest[n]) - average[n];
        average[n] += delta * share;
        squares[n] += own.m2[n] + delta * delta * weight;
      }
    }
    for (int64_t n = 0; n < width; ++n) {
      mean[first + n] = static_cast<float>(average[n]);
      m2[first + n] = static_cast<float>(squares[n]);
    }
  });
}

}  // namespace
}  // namespace FUSEDRES_CAPABILITY
}  // namespace fusedres
