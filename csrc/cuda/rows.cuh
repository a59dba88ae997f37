// What passes over maps share: which rows and channels a thread walks, the numbers per channel that it needs, and how a
// block's threads put their sums and moments together.
//
// A map is a matrix of rows (its pixels) of `channels` values, `pitch` values apart. A block has `lanes` threads side
// by side, each with V neighbouring channels, and as many rows of them as there is room for; block (x, y) walks the
// x-th `chunk` of rows of the y-th lanes * V channels, each of its threads every step-th row.
#pragma once

#include "activation.cuh"
#include "phases.cuh"

namespace fusedres {
namespace gpu {

// The most lanes of a block.
constexpr int kMostLanes = 64;
// Rows whose loads a thread starts before it needs the first.
constexpr int kTogether = 2;

struct Grid {
  i64 rows, channels, lanes, chunk;
};

// Channel `channel` of row `row` of a map.
template <class T>
struct Map {
  T* data;
  i64 pitch;
  FUSEDRES_HD T* at(i64 row, i64 channel) const { return data + row * pitch + channel; }
  FUSEDRES_HD explicit operator bool() const { return data != nullptr; }
};

template <int V>
struct Walk {
  int lanes, x, y, step;
  i64 origin, channel;  // the block's first channel, and the thread's
  i64 first, end;       // the block's rows
  bool inside;

  FUSEDRES_HD Walk(const Grid& grid, const Place& place) {
    lanes = int(grid.lanes);
    x = place.thread % lanes;
    y = place.thread / lanes;
    step = kThreads / lanes;
    origin = place.y * lanes * V;
    channel = origin + x * V;
    first = place.x * grid.chunk;
    end = least(first + grid.chunk, grid.rows);
    inside = y < step && channel < grid.channels;
  }

  // How many rows the threads at a `y` have.
  FUSEDRES_HD i64 rows_at(int y) const { return first + y < end ? ceiling(end - first - y, step) : 0; }
};

// ---- numbers per channel -----------------------------------------------------------------------------------------

// N vectors of a block's channels, read once, where a thread finds those of its V channels without a conflict of banks.
template <class A, int V, int N>
struct Constants {
  A values[N][kMostLanes * V];

  // Vector n, `otherwise` where there is none.
  FUSEDRES_HD void read(int n, const A* from, A otherwise, const Grid& grid, const Place& place) {
    const Walk<V> walk(grid, place);
    for (int i = place.thread; i < walk.lanes * V; i += kThreads) {
      const i64 channel = walk.origin + i;
      values[n][i % V * walk.lanes + i / V] = from != nullptr && channel < grid.channels ? from[channel] : otherwise;
    }
  }

  FUSEDRES_HD A of(int n, int i, const Walk<V>& walk) const { return values[n][i * walk.lanes + walk.x]; }
};

// z = scale * raw + shift, by the vectors n and n + 1.
template <class T, int V, int N>
FUSEDRES_HD void normalize(AccumOf<T> (&z)[V], const Vec<T, V>& raw, const Constants<AccumOf<T>, V, N>& constants,
                           int n, const Walk<V>& walk) {
  FUSEDRES_UNROLL
  for (int i = 0; i < V; ++i) z[i] = loaded(raw.v[i]) * constants.of(n, i, walk) + constants.of(n + 1, i, walk);
}

template <class T, int V>
FUSEDRES_HD Vec<T, V> rounded_vector(const AccumOf<T> (&z)[V]) {
  Vec<T, V> found;
  FUSEDRES_UNROLL
  for (int i = 0; i < V; ++i) found.v[i] = rounded<T>(z[i]);
  return found;
}

// ---- reductions of a block ---------------------------------------------------------------------------------------

// Where threads leave K numbers per channel: of the threads at y, row y. In two steps, so that no thread adds up long
// columns alone: row s gets what the rows s, s + segments, s + 2 segments, ... have, then one thread reads the first
// rows of a channel. The order depends on the sizes alone. These few additions are of double: sums of either sign
// cancel.
template <class A, int V, int K>
struct Columns {
  A values[K][kThreads * V];

  FUSEDRES_HD static int width(const Walk<V>& walk) { return walk.lanes * V; }
  FUSEDRES_HD static int segments(const Walk<V>& walk) {
    const int most = kThreads / width(walk);
    return most < 1 ? 1 : least(most, walk.step);
  }
  // Where a channel, counted from the block's first, is in a row.
  FUSEDRES_HD static int place_of(int channel, const Walk<V>& walk) { return channel % V * walk.lanes + channel / V; }

  FUSEDRES_HD void put(int k, const A (&own)[V], const Walk<V>& walk) {
    if (walk.y >= walk.step) return;
    FUSEDRES_UNROLL
    for (int i = 0; i < V; ++i) values[k][(walk.y * V + i) * walk.lanes + walk.x] = own[i];
  }

  FUSEDRES_HD void add_segments(int k, const Walk<V>& walk, const Place& place) {
    const int n = segments(walk), wide = width(walk);
    for (int u = place.thread; u < n * wide; u += kThreads) {
      double sum = values[k][u];
      for (int y = u / wide + n; y < walk.step; y += n) sum += values[k][y * wide + u % wide];
      values[k][u] = A(sum);
    }
  }

  FUSEDRES_HD double total(int k, int channel, const Walk<V>& walk) const {
    const int n = segments(walk), wide = width(walk), at = place_of(channel, walk);
    double sum = values[k][at];
    for (int s = 1; s < n; ++s) sum += values[k][s * wide + at];
    return sum;
  }
};

// The count of rows, their mean and the sum of squared deviations from it. The mean is mean + rest, of which rest is
// what mean cannot hold, so that deviations from a large mean keep their digits.
template <class A>
struct Moments {
  A count, mean, rest, m2;

  FUSEDRES_HD static Moments of(A count, double mean, A m2) {
    const A most = A(mean);
    return {count, most, A(mean - most), m2};
  }
  FUSEDRES_HD double whole_mean() const { return double(mean) + double(rest); }

  // Chan, Golub and LeVeque 1979.
  FUSEDRES_HD void merge(const Moments& other) {
    if (other.count == A(0)) return;
    if (count == A(0)) {
      *this = other;
      return;
    }
    const A total = count + other.count, share = other.count / total;
    const A delta = (other.mean - mean) + (other.rest - rest);
    m2 += other.m2 + delta * delta * (count * share);
    count = total;
    // the larger part first, so that the rounding of the sum is known
    rest += delta * share;
    const A sum = mean + rest;
    rest -= sum - mean;
    mean = sum;
  }
};

// As Columns, of moments.
template <class A, int V>
struct MomentColumns {
  Columns<A, V, 3> columns;
  A merged_counts[kThreads];

  FUSEDRES_HD Moments<A> at(int row, int place, A count, const Walk<V>& walk) const {
    const int i = row * columns.width(walk) + place;
    return {count, columns.values[0][i], columns.values[1][i], columns.values[2][i]};
  }

  FUSEDRES_HD void merge_segments(const Walk<V>& walk, const Place& place) {
    const int n = columns.segments(walk), wide = columns.width(walk);
    for (int u = place.thread; u < n * wide; u += kThreads) {
      const int s = u / wide, column = u % wide;
      Moments<A> found = at(s, column, A(walk.rows_at(s)), walk);
      for (int y = s + n; y < walk.step; y += n) found.merge(at(y, column, A(walk.rows_at(y)), walk));
      columns.values[0][u] = found.mean;
      columns.values[1][u] = found.rest;
      columns.values[2][u] = found.m2;
      if (column == 0) merged_counts[s] = found.count;
    }
  }

  FUSEDRES_HD Moments<A> total(int channel, const Walk<V>& walk) const {
    const int n = columns.segments(walk), place = columns.place_of(channel, walk);
    Moments<A> found = at(0, place, merged_counts[0], walk);
    for (int s = 1; s < n; ++s) found.merge(at(s, place, merged_counts[s], walk));
    return found;
  }
};

// A number of the block x for a channel, as partials[k, x, channel].
template <class A>
FUSEDRES_HD A& partial(A* partials, int k, i64 channel, const Grid& grid, const Place& place) {
  return partials[(k * place.blocks + place.x) * grid.channels + channel];
}

// What a thread knows of the rows that it has written, by Welford's updates (1962) of deviations from the first of
// them.
template <class T, int V>
struct Measure {
  using A = AccumOf<T>;
  A first[V], rest[V], m2[V];
  int seen;

  FUSEDRES_HD void begin() {
    seen = 0;
    FUSEDRES_UNROLL
    for (int i = 0; i < V; ++i) first[i] = rest[i] = m2[i] = A(0);
  }

  // Of what is stored, so that statistics normalise exactly what the next reader loads.
  FUSEDRES_HD void add(const Vec<T, V>& stored) {
    const A share = A(1) / A(++seen);
    FUSEDRES_UNROLL
    for (int i = 0; i < V; ++i) {
      if (seen == 1) first[i] = loaded(stored.v[i]);
      const A deviation = loaded(stored.v[i]) - first[i], delta = deviation - rest[i];
      rest[i] += delta * share;
      m2[i] += delta * (deviation - rest[i]);
    }
  }

  // The three phases behind the walk.
  FUSEDRES_HD void put(MomentColumns<A, V>& to, const Walk<V>& walk) const {
    to.columns.put(0, first, walk);
    to.columns.put(1, rest, walk);
    to.columns.put(2, m2, walk);
  }

  FUSEDRES_HD static void finish(const MomentColumns<A, V>& from, A* partials, const Grid& grid, const Place& place) {
    const Walk<V> walk(grid, place);
    for (int j = place.thread; j < walk.lanes * V && walk.origin + j < grid.channels; j += kThreads) {
      const Moments<A> found = from.total(j, walk);
      partial(partials, 0, walk.origin + j, grid, place) = found.mean;
      partial(partials, 1, walk.origin + j, grid, place) = found.m2;
      partial(partials, 2, walk.origin + j, grid, place) = found.rest;
    }
  }
};

}  // namespace gpu
}  // namespace fusedres
