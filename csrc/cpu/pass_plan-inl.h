// How a pass over rows is cut into work items, and what those leave behind: per-channel constants, partial sums and
// statistics, and their merge in the order of the tiles.
#pragma once

#include <cstdint>
#include <cstring>

#include "memory.h"
#include "passes.h"
#include "storage-inl.h"
#include "util-inl.h"

namespace fusedres {
namespace FUSEDRES_CAPABILITY {
namespace {

constexpr int kChunk = 512;  // lanes of a work item: its accumulators and vectors stay in L1
constexpr int kBlockValues =
    8192;  // of one map between two flushes into double: 32 KiB of float, still in L1 or L2 for the statistics
constexpr int kMostBlockRows = 32;
constexpr int kItems = 64;    // work items aimed at: enough to balance threads, few enough to merge
constexpr int kPad = 64 / 4;  // full vectors may be read behind the end of a per-channel vector

struct Plan {
  int64_t channels;
  int64_t fold;    // rows of the map in one row of the plan
  int64_t lanes;   // of a row of the plan
  int64_t rows;    // of the plan
  int64_t rest;    // lanes of the incomplete row behind them, which is a tile of its own
  int64_t tile;    // rows of a tile
  int64_t tiles;   // without that of the rest
  int64_t chunks;  // of kChunk lanes
  int64_t block;   // rows between two flushes

  int64_t all_tiles() const { return tiles + (rest > 0); }
  // first row of a tile; the rest stands behind all whole rows
  int64_t start(int64_t t) const { return t < tiles ? t * tile : rows; }
  // rows of the map behind one value of a tile's partial statistics
  int64_t count(int64_t t) const { return t < tiles ? least(tile, rows - t * tile) : 1; }
  int64_t lanes_of(int64_t t) const { return t < tiles ? lanes : rest; }
};

// Rows folded into one: a multiple of 16 lanes where that is within reach, and at least 128 lanes.
inline int64_t fold_of(int64_t channels) {
  int64_t fold = 1;
  while (fold < 16 && channels * fold % 16 != 0) ++fold;
  if (channels * fold > 4096) return 1;
  return fold * div_up(128, channels * fold);
}

inline Plan plan_of(int64_t rows, int64_t channels, int64_t fold, int64_t least_rows) {
  Plan p;
  p.channels = channels;
  p.fold = fold;
  p.lanes = channels * fold;
  p.rows = rows / fold;
  p.rest = rows % fold * channels;
  p.chunks = div_up(p.lanes, kChunk);
  p.tile = most(least_rows, div_up(p.rows, most(8, kItems / p.chunks)));
  p.tiles = div_up(p.rows, p.tile);
  p.block = most(4, least(kMostBlockRows, kBlockValues / least(p.lanes, kChunk)));
  return p;
}

// Row `r` of a map folded so.
template <class T>
inline T* row(const Rows& map, int64_t r, int64_t fold) {
  return static_cast<T*>(map.data) + r * fold * map.pitch;
}

// The first `count` of a pass's constants in arithmetic precision, repeated along the fold, with room for full vectors
// behind the end.
template <class A>
struct Constants {
  int64_t pitch;
  Buffer<A> storage;

  __attribute__((noinline)) Constants(const Plan& p, const Constant* constants, int count)
      : pitch(p.lanes + kPad), storage(count * pitch) {
    for (int i = 0; i < count; ++i) {
      A* to = storage.data + i * pitch;
      const A* from = static_cast<const A*>(constants[i].data);
      for (int64_t c = 0; c < p.channels; ++c) to[c] = from == nullptr ? A(constants[i].otherwise) : from[c];
      for (int64_t f = 1; f < p.fold; ++f) std::memcpy(to + f * p.channels, to, sizeof(A) * p.channels);
      for (int64_t c = p.lanes; c < pitch; ++c) to[c] = A(0);
    }
  }
  const A* at(int i) const { return storage.data + i * pitch; }
};

// The partial results of the tiles: sums, then mean and M2 where they are taken.
struct Partials {
  int kinds;
  int64_t lanes;
  Buffer<double> storage;

  Partials(const Plan& p, int kinds) : kinds(kinds), lanes(p.lanes), storage(p.all_tiles() * kinds * p.lanes) {}
  double* at(int64_t tile, int kind) const { return storage.data + (tile * kinds + kind) * lanes; }
};

template <class T>
struct Moments {
  using A = AccumOf<T>;
  alignas(64) A shift[kChunk + kPad];   // a value near the mean
  alignas(64) A first[kChunk + kPad];   // sum of x - shift over a block
  alignas(64) A second[kChunk + kPad];  // sum of its squares
};

template <class T, bool kPart>
inline void sum_lanes(const T* x, int n, AccumOf<T>* sum) {
  store(sum, load(sum) + load_lanes<T, kPart>(x, n));
}

// Of kRows rows, which are added to each other before they are added to the block's sums: a sum is rounded as often as
// something is added to it.
template <class T, int kRows, bool kPart>
inline void measure_lanes(const T* x, int64_t pitch, int n, const AccumOf<T>* shift, AccumOf<T>* first,
                          AccumOf<T>* second) {
  const VecOf<T> from = load(shift);
  VecOf<T> sum = {}, squares = {};
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    const VecOf<T> d = load_lanes<T, kPart>(x + r * pitch, n) - from;
    sum += d;
    squares += d * d;
  }
  store(first, load(first) + sum);
  store(second, load(second) + squares);
}

template <class T>
inline void sum_rows(const T* x, int64_t pitch, int64_t rows, int n, AccumOf<T>* sum) {
  constexpr int kLanes = kLanesOf<T>;
  for (int64_t r = 0; r < rows; ++r, x += pitch) {
    int c = 0;
    for (; c + kLanes <= n; c += kLanes) sum_lanes<T, false>(x + c, kLanes, sum + c);
    if (c < n) sum_lanes<T, true>(x + c, n - c, sum + c);
  }
}

template <class T, int kRows>
inline void measure_rows(const T* x, int64_t pitch, int n, Moments<T>& m) {
  constexpr int kLanes = kLanesOf<T>;
  int c = 0;
  for (; c + kLanes <= n; c += kLanes)
    measure_lanes<T, kRows, false>(x + c, pitch, kLanes, m.shift + c, m.first + c, m.second + c);
  if (c < n) measure_lanes<T, kRows, true>(x + c, pitch, n - c, m.shift + c, m.first + c, m.second + c);
}

// Merges a block of rows into (mean, M2), which are over `seen` rows so far.
//
// Deviations are taken from the mean of the rows seen, and for the first block from its own. Where that is delta off
// the block's mean, the block's M2 carries a rounding error of eps * rows * delta^2; Chan's merge adds at least rows *
// delta^2 / 2 to the M2 of the whole, so that the error stays a rounding of the result.
template <class T>
__attribute__((noinline)) void measure_block(const T* x, int64_t pitch, int64_t rows, int n, int64_t seen, double* mean,
                                             double* m2, Moments<T>& m) {
  using A = AccumOf<T>;
  if (seen == 0) {
    std::memset(m.shift, 0, sizeof(m.shift));
    sum_rows<T>(x, pitch, rows, n, m.shift);
    const A inverse = A(1) / A(rows);
    for (int c = 0; c < n; ++c) {
      m.shift[c] *= inverse;
      mean[c] = 0;
      m2[c] = 0;
    }
  }
  std::memset(m.first, 0, sizeof(m.first));
  std::memset(m.second, 0, sizeof(m.second));
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) measure_rows<T, 4>(x + r * pitch, pitch, n, m);
  for (; r < rows; ++r) measure_rows<T, 1>(x + r * pitch, pitch, n, m);
  const double inverse = 1.0 / double(rows), part = double(rows) / double(seen + rows), weight = double(seen) * part;
  for (int c = 0; c < n; ++c) {
    const double offset = double(m.first[c]) * inverse;
    const double delta = double(m.shift[c]) + offset - mean[c];
    const double merged = mean[c] + delta * part;
    m2[c] += double(m.second[c]) - double(m.first[c]) * offset + delta * delta * weight;
    mean[c] = merged;
    m.shift[c] = A(merged);
  }
}

template <class A>
void merge_sums(const Plan& p, const Partials& partials, int kind, const Sum& sum, int64_t begin, int64_t end) {
  if (sum.data == nullptr) return;
  A* to = static_cast<A*>(sum.data);
  const A* factor = static_cast<const A*>(sum.factor);
  double total[kPad];
  for (int64_t c0 = begin; c0 < end; c0 += kPad) {
    const int n = int(least(kPad, end - c0));
    for (int i = 0; i < n; ++i) total[i] = 0;
    for (int64_t t = 0; t < p.all_tiles(); ++t) {
      const double* from = partials.at(t, kind) + c0;
      for (int64_t f = 0; f < p.lanes_of(t); f += p.channels)
        for (int i = 0; i < n; ++i) total[i] += from[f + i];
    }
    for (int i = 0; i < n; ++i) to[c0 + i] = A(factor == nullptr ? total[i] : total[i] * double(factor[c0 + i]));
  }
}

template <class A>
void merge_statistics(const Plan& p, const Partials& partials, int kind, void* mean_to, void* m2_to, int64_t begin,
                      int64_t end) {
  A* to[2] = {static_cast<A*>(mean_to), static_cast<A*>(m2_to)};
  double mean[kPad], m2[kPad];
  for (int64_t c0 = begin; c0 < end; c0 += kPad) {
    const int n = int(least(kPad, end - c0));
    int64_t seen = 0;
    for (int i = 0; i < n; ++i) mean[i] = m2[i] = 0;
    for (int64_t t = 0; t < p.all_tiles(); ++t) {
      const double *from = partials.at(t, kind) + c0, *from_m2 = partials.at(t, kind + 1) + c0;
      const int64_t count = p.count(t);
      for (int64_t f = 0; f < p.lanes_of(t); f += p.channels) {
        const double part = double(count) / double(seen + count), weight = double(seen) * part;
        for (int i = 0; i < n; ++i) {
          const double delta = from[f + i] - mean[i];
          mean[i] += delta * part;
          m2[i] += from_m2[f + i] + delta * delta * weight;
        }
        seen += count;
      }
    }
    for (int i = 0; i < n; ++i) {
      to[0][c0 + i] = A(mean[i]);
      to[1][c0 + i] = A(m2[i]);
    }
  }
}

// Partial results into what the pass was asked for.
template <class A>
__attribute__((noinline)) void merge(const PassArgs& a, const Plan& plan, const Partials& partials, int sums,
                                     Parallel parallel) {
  if (partials.kinds == 0) return;
  // groups of kPad channels, which no two threads share
  run_parallel(parallel, div_up(plan.channels, kPad), plan.all_tiles() * partials.kinds * plan.lanes,
               [&](int64_t group) {
                 const int64_t begin = group * kPad, end = least(begin + kPad, plan.channels);
                 for (int s = 0; s < sums; ++s) merge_sums<A>(plan, partials, s, a.sums[s], begin, end);
                 if (a.measured.data != nullptr) merge_statistics<A>(plan, partials, sums, a.mean, a.m2, begin, end);
               });
}

}  // namespace
}  // namespace FUSEDRES_CAPABILITY
}  // namespace fusedres
