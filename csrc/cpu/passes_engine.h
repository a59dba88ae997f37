// The passes over channels_last maps, compiled once per CPU capability (FUSEDRES_CAPABILITY names the namespace, FUSEDRES_LANES the floats
// of a register).
//
// One mechanism for all of them. The rows are cut into tiles and the channels into chunks; a thread takes one (tile, chunk) after the other
// and walks it row by row: every map is read and written once, in the order of memory (several rows at a time would reload the per-channel
// vectors less often, but measured three times slower, because prefetchers and store buffers follow one stream per map). Where a map has
// few channels, several rows are folded into one long row with repeated per-channel vectors. Some rows make a block.
//
// Sums are taken in float over one block and in double from there on. Statistics are (count, mean, M2) per block, merged by Chan's formula
// in double (Chan, Golub and LeVeque 1983). Partial results are merged in the order of the tiles, and the tiles depend on shapes
// alone: the result has the same bits for any number of threads.
//
// No template of the standard library is instantiated here: such functions are shared between translation units at link time, and a copy
// compiled for AVX-512 could be the one that an older machine runs.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "activation_engine.h"
#include "passes.h"
#include "simd.h"

namespace fusedres {
namespace FUSEDRES_CAPABILITY {
namespace {

constexpr int kChunk = 512;         // lanes of a work item: its accumulators and vectors stay in L1
constexpr int kBlockValues = 8192;  // of one map between two flushes into double: 32 KiB of float, still in L1 or L2 for the statistics
constexpr int kMostBlockRows = 32;
constexpr int kItems = 64;          // work items aimed at: enough to balance threads, few enough to merge
constexpr int kPad = 64 / 4;        // full vectors may be read behind the end of a per-channel vector

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t div_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// ---------------------------------------------------------------------------------------------------------------------------------
// Operations: apply() makes one output vector from x (inputs) and k (constants), and adds to s (sums). relu() and blocked() let NaN
// through: a comparison with NaN is false.
//
// Activations beyond ReLU are a step before apply(), on whole rows: what pending() makes of x and k, activated (kStep::value) or the first
// input times the derivative there (kStep::gradient), is one more x, behind the inputs.

template <class V>
inline V relu(V z, V floor) {
  return z < floor ? floor : z;
}
template <class V>
inline V blocked(V dz, V z) {
  return z <= V{} ? V{} : dz;
}

enum class Step { none, value, gradient };

// x: none. For passes that only measure.
struct Nothing {
  static constexpr int kInputs = 0, kConstants = 0, kSums = 0;
  static constexpr Step kStep = Step::none;
  static constexpr bool kWrites = false, kMeasures = true;
  template <class V>
  static V apply(const V*, const V*, V*, V) {
    return V{};
  }
};

enum class Residual { none, plain, affine };

// What stands before a gradient: nothing, ReLU, another activation.
enum class Mask { none, relu, other };

// x: raw, residual. k: scale, shift, residual's scale, residual's shift.
template <bool kAffine, Residual kResidual, bool kOther>
struct JoinForward {
  static constexpr int kInputs = kResidual == Residual::none ? 1 : 2, kConstants = 4, kSums = 0;
  static constexpr bool kWrites = true, kMeasures = true;
  static constexpr Step kStep = kOther ? Step::value : Step::none;
  template <class V>
  static V pending(const V* x, const V* k) {
    V z = kAffine ? x[0] * k[0] + k[1] : x[0];
    if constexpr (kResidual == Residual::plain) z = z + x[1];
    if constexpr (kResidual == Residual::affine) z = z + (x[1] * k[2] + k[3]);
    return z;
  }
  template <class V>
  static V apply(const V* x, const V* k, V*, V floor) {
    if constexpr (kOther) return x[kInputs];
    else return relu(pending(x, k), floor);
  }
};

// x: grad, then raw (masked or sums), then the residual (in the mask or three sums). k: scale, shift, mean, residual's scale, shift and
// mean. s: dz, dz * (raw - mean), dz * (residual - its mean).
template <Mask kMask, Residual kResidual, int kSumCount>
struct JoinBackward {
  static constexpr bool kMasked = kMask != Mask::none;
  static constexpr bool kSecond = kSumCount == 3 || (kMasked && kResidual != Residual::none);
  static constexpr int kInputs = kSecond ? 3 : kMasked || kSumCount > 0 ? 2 : 1;
  static constexpr int kConstants = 6, kSums = kSumCount;
  static constexpr bool kWrites = kMasked, kMeasures = false;
  static constexpr Step kStep = kMask == Mask::other ? Step::gradient : Step::none;
  template <class V>
  static V pending(const V* x, const V* k) {
    V z = x[1] * k[0] + k[1];
    if constexpr (kResidual == Residual::plain) z = z + x[2];
    if constexpr (kResidual == Residual::affine) z = z + (x[2] * k[3] + k[4]);
    return z;
  }
  template <class V>
  static V apply(const V* x, const V* k, V* s, V) {
    V dz = kMask == Mask::other ? x[kInputs] : x[0];
    if constexpr (kMask == Mask::relu) dz = blocked(dz, pending(x, k));
    if constexpr (kSumCount >= 2) {
      s[0] += dz;
      s[1] += dz * (x[1] - k[2]);
    }
    if constexpr (kSumCount == 3) s[2] += dz * (x[2] - k[5]);
    return dz;
  }
};

// x: raw, gate, carry. k: scale, shift, gate's scale, gate's shift.
template <bool kRelu>
struct HighwayForward {
  static constexpr int kInputs = 3, kConstants = 4, kSums = 0;
  static constexpr bool kWrites = true, kMeasures = false;
  static constexpr Step kStep = Step::none;
  template <class V>
  static V apply(const V* x, const V* k, V*, V) {
    V h = x[0] * k[0] + k[1];
    if constexpr (kRelu) h = relu(h, V{});
    const Sigmoid<V> t(x[1] * k[2] + k[3]);
    return t.value * h + t.rest * x[2];
  }
};

// x: grad, raw, gate, carry. k: scale, shift, mean, and the same of the gate. s: dz, dz * (raw - mean), dgate, dgate * (gate - its mean).
// Writes dz, and behind it dgate and dcarry.
template <bool kRelu>
struct HighwayBackward {
  static constexpr int kInputs = 4, kConstants = 6, kSums = 4;
  static constexpr bool kWrites = true, kMeasures = false;
  static constexpr Step kStep = Step::none;
  template <class V>
  static V apply(const V* x, const V* k, V* s, V, V* more) {
    const V z = x[1] * k[0] + k[1];
    const Sigmoid<V> t(x[2] * k[3] + k[4]);
    V h = z, dz = x[0] * t.value;
    if constexpr (kRelu) {
      h = relu(z, V{});
      dz = blocked(dz, z);
    }
    const V dgate = x[0] * (h - x[3]) * (t.value * t.rest);
    s[0] += dz;
    s[1] += dz * (x[1] - k[2]);
    s[2] += dgate;
    s[3] += dgate * (x[2] - k[5]);
    more[0] = dgate;
    more[1] = x[0] * t.rest;
    return dz;
  }
};

// The outputs of an operation behind the first.
template <class Op>
constexpr int kMore = 0;
template <bool kRelu>
constexpr int kMore<HighwayBackward<kRelu>> = 2;

// x: grad, raw. k: p, q, r.
template <bool kRaw>
struct GradAffine {
  static constexpr Step kStep = Step::none;
  static constexpr int kInputs = kRaw ? 2 : 1, kConstants = 3, kSums = 0;
  static constexpr bool kWrites = true, kMeasures = false;
  template <class V>
  static V apply(const V* x, const V* k, V*, V) {
    V g = x[0] * k[0] + k[2];
    if constexpr (kRaw) g = g + x[1] * k[1];
    return g;
  }
};

// x: da, then base, then x (mask or sums). k: scale, shift, mean, factor of dz. s: dz, dz * (x - mean).
template <Mask kMask, bool kReduce, bool kBase>
struct DgradEpilogue {
  static constexpr int kX = kBase ? 2 : 1;
  static constexpr int kInputs = kMask != Mask::none || kReduce ? kX + 1 : kX, kConstants = 4, kSums = kReduce ? 2 : 0;
  static constexpr bool kWrites = true, kMeasures = false;
  static constexpr Step kStep = kMask == Mask::other ? Step::gradient : Step::none;
  template <class V>
  static V pending(const V* x, const V* k) {
    return x[kX] * k[0] + k[1];
  }
  template <class V>
  static V apply(const V* x, const V* k, V* s, V) {
    V dz = kMask == Mask::other ? x[kInputs] : x[0];
    if constexpr (kMask == Mask::relu) dz = blocked(dz, pending(x, k));
    if constexpr (kReduce) {
      s[0] += dz;
      s[1] += dz * (x[kX] - k[2]);
    }
    dz = dz * k[3];
    if constexpr (kBase) dz = dz + x[1];
    return dz;
  }
};

// ---------------------------------------------------------------------------------------------------------------------------------
// How a pass is cut up.

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

// Per-channel vectors in arithmetic precision, repeated along the fold, with room for full vectors behind the end.
template <class A>
struct Constants {
  A* storage;
  int64_t pitch;
  A* at(int i) const { return storage + i * pitch; }
};

template <class A>
inline Constants<A> gather_constants(const Plan& p, const Constant* constants, int count) {
  Constants<A> result;
  result.pitch = p.lanes + kPad;
  result.storage = static_cast<A*>(std::malloc(sizeof(A) * (count * result.pitch + 1)));
  for (int i = 0; i < count; ++i) {
    A* to = result.at(i);
    const A* from = static_cast<const A*>(constants[i].data);
    for (int64_t c = 0; c < p.channels; ++c) to[c] = from == nullptr ? A(constants[i].otherwise) : from[c];
    for (int64_t f = 1; f < p.fold; ++f) std::memcpy(to + f * p.channels, to, sizeof(A) * p.channels);
    for (int64_t c = p.lanes; c < result.pitch; ++c) to[c] = A(0);
  }
  return result;
}

// The partial results of the tiles: sums, then mean and M2 where they are taken.
struct Partials {
  double* storage;
  int kinds;
  int64_t lanes;
  double* at(int64_t tile, int kind) const { return storage + (tile * kinds + kind) * lanes; }
};

inline Partials new_partials(const Plan& p, int kinds) {
  return {static_cast<double*>(std::malloc(sizeof(double) * (p.all_tiles() * kinds * p.lanes + 1))), kinds, p.lanes};
}

// ---------------------------------------------------------------------------------------------------------------------------------
// Statistics of a block of rows.

template <class T>
struct Moments {
  using A = AccumOf<T>;
  alignas(64) A shift[kChunk + kPad];    // a value near the mean
  alignas(64) A first[kChunk + kPad];    // sum of x - shift over a block
  alignas(64) A second[kChunk + kPad];   // sum of its squares
};

template <class T, bool kPart>
inline void sum_lanes(const T* x, int n, AccumOf<T>* sum) {
  store(sum, load(sum) + load_lanes<T, kPart>(x, n));
}

template <class T, bool kPart>
inline void measure_lanes(const T* x, int n, const AccumOf<T>* shift, AccumOf<T>* first, AccumOf<T>* second) {
  const VecOf<T> d = load_lanes<T, kPart>(x, n) - load(shift);
  store(first, load(first) + d);
  store(second, load(second) + d * d);
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

template <class T>
inline void measure_rows(const T* x, int64_t pitch, int64_t rows, int n, Moments<T>& m) {
  constexpr int kLanes = kLanesOf<T>;
  for (int64_t r = 0; r < rows; ++r, x += pitch) {
    int c = 0;
    for (; c + kLanes <= n; c += kLanes) measure_lanes<T, false>(x + c, kLanes, m.shift + c, m.first + c, m.second + c);
    if (c < n) measure_lanes<T, true>(x + c, n - c, m.shift + c, m.first + c, m.second + c);
  }
}

// Merges a block of rows into (mean, M2), which are over `seen` rows so far.
//
// Deviations are taken from the mean of the rows seen, and for the first block from its own. Where that is delta off the block's mean, the
// block's M2 carries a rounding error of eps * rows * delta^2; Chan's merge adds at least rows * delta^2 / 2 to the M2 of the whole, so
// that the error stays a rounding of the result.
template <class T>
__attribute__((noinline)) void measure_block(const T* x, int64_t pitch, int64_t rows, int n, int64_t seen, double* mean, double* m2, Moments<T>& m) {
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
  measure_rows<T>(x, pitch, rows, n, m);
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

// ---------------------------------------------------------------------------------------------------------------------------------
// Merges of the tiles, in their order.

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
void merge_statistics(const Plan& p, const Partials& partials, int kind, void* mean_to, void* m2_to, int64_t begin, int64_t end) {
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

template <class A>
struct Merge {
  const PassArgs& a;
  const Plan& plan;
  const Partials& partials;
  int sums;

  void run(int64_t begin, int64_t end) const {
    for (int s = 0; s < sums; ++s) merge_sums<A>(plan, partials, s, a.sums[s], begin, end);
    if (a.measured.data != nullptr) merge_statistics<A>(plan, partials, sums, a.mean, a.m2, begin, end);
  }
  // groups of kPad channels, which no two threads share
  static void body(void* context, int64_t begin, int64_t end) {
    const Merge& m = *static_cast<const Merge*>(context);
    m.run(begin * kPad, least(end * kPad, m.plan.channels));
  }
};

// Waking the threads costs some microseconds: work on fewer values than this is done at once by the caller.
constexpr int64_t kParallelValues = 16384;

inline void distribute(int64_t values, int64_t items, void (*body)(void*, int64_t, int64_t), void* context, Parallel parallel) {
  if (items == 0) return;
  if (values < kParallelValues || items == 1) body(context, 0, items);
  else parallel(items, body, context);
}

template <class A>
void merge(const PassArgs& a, const Plan& plan, const Partials& partials, int sums, Parallel parallel) {
  if (partials.kinds == 0) return;
  Merge<A> m{a, plan, partials, sums};
  distribute(plan.all_tiles() * partials.kinds * plan.lanes, div_up(plan.channels, kPad), Merge<A>::body, &m, parallel);
}

// ---------------------------------------------------------------------------------------------------------------------------------
// The passes over rows.

template <class T>
inline T* row(const Rows& map, int64_t r, int64_t fold) {
  return static_cast<T*>(map.data) + r * fold * map.pitch;
}

template <class Op, class T>
struct RowPass {
  using A = AccumOf<T>;
  using V = VecOf<T>;
  static constexpr int kLanes = kLanesOf<T>;

  const PassArgs& a;
  const Plan& plan;
  const Constants<A>& constants;
  const Partials& partials;
  int64_t in_pitch[kMaxInputs], out_pitch, more_pitch[kMaxMore];  // of a row of the plan

  // One block of a work item: the pointers stand at its first row and lane.
  struct Block {
    const T* in[kMaxInputs];
    T* out;
    T* more[kMaxMore];
    const A* k[kMaxConstants];
    A* sums;  // kChunk + kPad apart
  };

  // What the step before apply() works on.
  struct Row {
    alignas(64) A pending[kChunk + kPad], result[kChunk + kPad];
  };

  template <bool kPart>
  inline void load_operands(const Block& b, int64_t r, int c, int n, V* x, V* k) const {
    for (int i = 0; i < Op::kInputs; ++i) x[i] = load_lanes<T, kPart>(b.in[i] + r * in_pitch[i] + c, n);
    for (int i = 0; i < Op::kConstants; ++i) k[i] = load(b.k[i] + c);
  }

  template <bool kPart>
  inline void pend(const Block& b, int64_t r, int c, int n, Row& row) const {
    V x[Op::kInputs + 1], k[Op::kConstants + 1];
    load_operands<kPart>(b, r, c, n, x, k);
    store((Op::kStep == Step::value ? row.result : row.pending) + c, Op::pending(x, k));
    if constexpr (Op::kStep == Step::gradient) store(row.result + c, x[0]);
  }

  inline void step(const Block& b, int64_t r, int n, Row& row) const {
    int c = 0;
    for (; c + kLanes <= n; c += kLanes) pend<false>(b, r, c, kLanes, row);
    if (c < n) pend<true>(b, r, c, n - c, row);
    if constexpr (Op::kStep == Step::value) activate_row(row.result, n, a.act);
    else gradient_row(row.result, row.pending, n, a.act);
  }

  template <bool kPart>
  inline void lanes(const Block& b, int64_t r, int c, int n, V floor, [[maybe_unused]] const Row& row) const {
    V x[Op::kInputs + 1], k[Op::kConstants + 1], s[Op::kSums + 1];
    load_operands<kPart>(b, r, c, n, x, k);
    if constexpr (Op::kStep != Step::none) x[Op::kInputs] = load(row.result + c);
    for (int i = 0; i < Op::kSums; ++i) s[i] = load(b.sums + i * (kChunk + kPad) + c);
    V y;
    if constexpr (kMore<Op> > 0) {
      V more[kMore<Op>];
      y = Op::apply(x, k, s, floor, more);
      for (int i = 0; i < kMore<Op>; ++i) store_lanes<T, kPart>(b.more[i] + r * more_pitch[i] + c, more[i], n);
    } else {
      y = Op::apply(x, k, s, floor);
    }
    if constexpr (Op::kWrites) store_lanes<T, kPart>(b.out + r * out_pitch + c, y, n);
    for (int i = 0; i < Op::kSums; ++i) store(b.sums + i * (kChunk + kPad) + c, s[i]);
  }

  void item(int64_t tile, int64_t chunk) const {
    const int64_t from = chunk * kChunk;
    const int n = int(least(kChunk, plan.lanes_of(tile) - from));
    if (n <= 0) return;  // a chunk behind the end of the rest
    alignas(64) A sums[(Op::kSums + 1) * (kChunk + kPad)];
    double* totals[Op::kSums + 1];
    for (int i = 0; i < Op::kSums; ++i) {
      totals[i] = partials.at(tile, i) + from;
      for (int c = 0; c < n; ++c) totals[i][c] = 0;
    }
    [[maybe_unused]] const V floor = V{} + (a.act.is_relu() ? A(0) : -A(__builtin_inf()));
    [[maybe_unused]] Moments<T> moments;
    [[maybe_unused]] Row row_of_step;
    const int64_t start = plan.start(tile), rows = plan.count(tile);
    for (int64_t r = 0; r < rows; r += plan.block) {
      const int64_t height = least(plan.block, rows - r);
      if constexpr (Op::kInputs > 0) {
        Block b;
        for (int i = 0; i < Op::kInputs; ++i) b.in[i] = row<T>(a.in[i], start + r, plan.fold) + from;
        b.out = Op::kWrites ? row<T>(a.out, start + r, plan.fold) + from : nullptr;
        for (int i = 0; i < kMore<Op>; ++i) b.more[i] = row<T>(a.more[i], start + r, plan.fold) + from;
        for (int i = 0; i < Op::kConstants; ++i) b.k[i] = constants.at(i) + from;
        b.sums = sums;
        std::memset(sums, 0, sizeof(sums));
        for (int64_t j = 0; j < height; ++j) {
          if constexpr (Op::kStep != Step::none) step(b, j, n, row_of_step);
          int c = 0;
          for (; c + kLanes <= n; c += kLanes) lanes<false>(b, j, c, kLanes, floor, row_of_step);
          if (c < n) lanes<true>(b, j, c, n - c, floor, row_of_step);
        }
        for (int i = 0; i < Op::kSums; ++i)
          for (int c = 0; c < n; ++c) totals[i][c] += double(sums[i * (kChunk + kPad) + c]);
      }
      if constexpr (Op::kMeasures)
        if (a.measured.data != nullptr)
          measure_block<T>(row<T>(a.measured, start + r, plan.fold) + from, a.measured.pitch * plan.fold, height, n, r,
                           partials.at(tile, Op::kSums) + from, partials.at(tile, Op::kSums + 1) + from, moments);
    }
  }

  static void body(void* context, int64_t begin, int64_t end) {
    const RowPass& pass = *static_cast<const RowPass*>(context);
    for (int64_t i = begin; i < end; ++i) pass.item(i / pass.plan.chunks, i % pass.plan.chunks);
  }
};

template <class Op, class T>
void run_rows(const PassArgs& a, Parallel parallel) {
  using A = AccumOf<T>;
  bool dense = a.measured.data == nullptr || a.measured.pitch == a.channels;
  for (int i = 0; i < Op::kInputs; ++i) dense = dense && a.in[i].pitch == a.channels;
  if (Op::kWrites) dense = dense && a.out.pitch == a.channels;
  for (int i = 0; i < kMore<Op>; ++i) dense = dense && a.more[i].pitch == a.channels;
  const Plan plan = plan_of(a.rows, a.channels, dense ? fold_of(a.channels) : 1, 2 * kMostBlockRows);
  const Constants<A> constants = gather_constants<A>(plan, a.constants, Op::kConstants);
  const Partials partials = new_partials(plan, Op::kSums + (a.measured.data != nullptr ? 2 : 0));
  RowPass<Op, T> pass{a, plan, constants, partials, {}, a.out.pitch * plan.fold, {}};
  for (int i = 0; i < Op::kInputs; ++i) pass.in_pitch[i] = a.in[i].pitch * plan.fold;
  for (int i = 0; i < kMore<Op>; ++i) pass.more_pitch[i] = a.more[i].pitch * plan.fold;
  distribute(a.rows * a.channels, plan.all_tiles() * plan.chunks, RowPass<Op, T>::body, &pass, parallel);
  merge<A>(a, plan, partials, Op::kSums, parallel);
  std::free(partials.storage);
  std::free(constants.storage);
}

template <class Op>
void run(const PassArgs& a, Parallel parallel) {
  switch (a.storage) {
    case Storage::f32: return run_rows<Op, float>(a, parallel);
    case Storage::f64: return run_rows<Op, double>(a, parallel);
    case Storage::bf16: return run_rows<Op, bfloat16>(a, parallel);
    case Storage::f16: return run_rows<Op, float16>(a, parallel);
  }
}

// ---------------------------------------------------------------------------------------------------------------------------------
// Pooling. A work item is a range of pixels and a chunk of channels; for each pixel the windows' pixels that exist are listed first.

// One vector through an activation beyond ReLU, which few pooled maps have.
template <class A, class V>
inline V activated_vector(V z, const Activation& act) {
  alignas(64) A lanes[sizeof(V) / sizeof(A)];
  store(lanes, z);
  activate_row(lanes, sizeof(V) / sizeof(A), act);
  return load(lanes);
}
template <class A, class V>
inline V gradient_vector(V dy, V z, const Activation& act) {
  alignas(64) A lanes[2][sizeof(V) / sizeof(A)];
  store(lanes[0], dy);
  store(lanes[1], z);
  gradient_row(lanes[0], lanes[1], sizeof(V) / sizeof(A), act);
  return load(lanes[0]);
}

constexpr int kMaxWindow = 256;  // positions that a uint8 index can tell apart

struct Pixel {
  int64_t image, y, x;
  Pixel(int64_t r, int64_t height, int64_t width) : image(r / (height * width)), y(r / width % height), x(r % width) {}
};

template <class V>
struct Narrow;  // a vector of bytes with as many lanes
template <>
struct Narrow<VecI> {
  typedef uint8_t type __attribute__((vector_size(FUSEDRES_LANES)));
};
template <>
struct Narrow<Vector<double>::integer> {
  typedef uint8_t type __attribute__((vector_size(FUSEDRES_LANES / 2)));
};

template <class I>
inline I load_index(const uint8_t* p, int n) {
  constexpr int kLanes = sizeof(typename Narrow<I>::type);
  uint8_t values[kLanes] = {};
  if (n == kLanes) return __builtin_convertvector(read<typename Narrow<I>::type>(p), I);
  for (int i = 0; i < n; ++i) values[i] = p[i];
  return __builtin_convertvector(read<typename Narrow<I>::type>(values), I);
}
template <class I>
inline void store_index(uint8_t* p, I index, int n) {
  constexpr int kLanes = sizeof(typename Narrow<I>::type);
  const auto narrow = __builtin_convertvector(index, typename Narrow<I>::type);
  if (n == kLanes) return write(p, narrow);
  uint8_t values[kLanes];
  write(values, narrow);
  for (int i = 0; i < n; ++i) p[i] = values[i];
}

// k: scale, shift.
template <class T, bool kMax>
struct PoolForward {
  using A = AccumOf<T>;
  using V = VecOf<T>;
  using I = typename Vector<A>::integer;
  static constexpr int kLanes = kLanesOf<T>;
  static constexpr int kGroup = 8;  // pixels of a mean that are added in registers

  const PoolArgs& a;
  const Plan& plan;
  const Constants<A>& constants;
  const Partials& partials;

  template <bool kPart>
  inline V activated(const T* x, V scale, V shift, V floor, int n) const {
    const V z = load_lanes<T, kPart>(x, n) * scale + shift;
    return a.pass.act.is_other() ? activated_vector<A>(z, a.pass.act) : relu(z, floor);
  }

  template <bool kPart>
  inline void maximum(const T* const* window, const int* position, int count, int64_t from, int c, int n, T* y, uint8_t* index) const {
    const V scale = load(constants.at(0) + from + c), shift = load(constants.at(1) + from + c);
    const V floor = V{} + (a.pass.act.is_relu() ? A(0) : -A(__builtin_inf()));
    V best = V{} - A(__builtin_inf());
    I at = I{} + position[0];
    for (int i = 0; i < count; ++i) {
      const V z = activated<kPart>(window[i] + c, scale, shift, floor, n);
      const I better = (z > best) | (z != z);
      best = better ? z : best;
      at = better ? I{} + position[i] : at;
    }
    store_lanes<T, kPart>(y + c, best, n);
    store_index<I>(index + c, at, n);
  }

  template <bool kPart>
  inline void add(const T* const* window, int count, int64_t from, int c, int n, A* total) const {
    const V scale = load(constants.at(0) + from + c), shift = load(constants.at(1) + from + c);
    const V floor = V{} + (a.pass.act.is_relu() ? A(0) : -A(__builtin_inf()));
    V sum = V{};
    for (int i = 0; i < count; ++i) sum += activated<kPart>(window[i] + c, scale, shift, floor, n);
    store(total + c, load(total + c) + sum);
  }

  void pixel(int64_t r, int64_t from, int n) const {
    const Pixel p(r, a.out_h, a.out_w);
    const T* window[kMaxWindow];
    int position[kMaxWindow], count = 0, c = 0;
    alignas(64) A total[kChunk + kPad];
    T* y = row<T>(a.pass.out, r, 1) + from;
    if (!kMax) std::memset(total, 0, sizeof(total));
    const int64_t top = p.y * a.stride_h - a.pad_h, left = p.x * a.stride_w - a.pad_w;
    for (int64_t i = most(0, -top); i < least(a.kernel_h, a.in_h - top); ++i)
      for (int64_t j = most(0, -left); j < least(a.kernel_w, a.in_w - left); ++j) {
        window[count] = row<T>(a.pass.in[0], (p.image * a.in_h + top + i) * a.in_w + left + j, 1) + from;
        position[count++] = int(i * a.kernel_w + j);
        if (!kMax && count == kGroup) {
          accumulate(window, count, from, n, total);
          count = 0;
        }
      }
    if constexpr (kMax) {
      uint8_t* index = a.index + r * a.index_pitch + from;
      for (; c + kLanes <= n; c += kLanes) maximum<false>(window, position, count, from, c, kLanes, y, index);
      if (c < n) maximum<true>(window, position, count, from, c, n - c, y, index);
    } else {
      accumulate(window, count, from, n, total);
      const V size = V{} + A(a.kernel_h * a.kernel_w);
      for (; c + kLanes <= n; c += kLanes) store(y + c, load(total + c) / size);
      if (c < n) store_part(y + c, load(total + c) / size, n - c);
    }
  }

  inline void accumulate(const T* const* window, int count, int64_t from, int n, A* total) const {
    int c = 0;
    for (; c + kLanes <= n; c += kLanes) add<false>(window, count, from, c, kLanes, total);
    if (c < n) add<true>(window, count, from, c, n - c, total);
  }

  void item(int64_t tile, int64_t chunk) const {
    const int64_t from = chunk * kChunk, start = tile * plan.tile, rows = plan.count(tile);
    const int n = int(least(kChunk, plan.lanes - from));
    Moments<T> moments;
    for (int64_t r = 0; r < rows; r += plan.block) {
      const int64_t height = least(plan.block, rows - r);
      for (int64_t j = 0; j < height; ++j) pixel(start + r + j, from, n);
      if (a.pass.measured.data != nullptr)
        measure_block<T>(row<T>(a.pass.measured, start + r, 1) + from, a.pass.measured.pitch, height, n, r, partials.at(tile, 0) + from,
                         partials.at(tile, 1) + from, moments);
    }
  }
};

// k: scale, shift, mean, p, q, r. s: dz, dz * (x - mean).
template <class T, bool kMax, bool kReduce, bool kWrite>
struct PoolBackward {
  using A = AccumOf<T>;
  using V = VecOf<T>;
  using I = typename Vector<A>::integer;
  static constexpr int kLanes = kLanesOf<T>;

  const PoolArgs& a;
  const Plan& plan;
  const Constants<A>& constants;
  const Partials& partials;

  template <bool kPart>
  inline void lanes(const T* const* grad, const uint8_t* const* index, const int* position, int count, const T* x, T* dx, int64_t from,
                    int c, int n, A* sums) const {
    const auto k = [&](int i) __attribute__((always_inline)) { return load(constants.at(i) + from + c); };
    const V value = load_lanes<T, kPart>(x + c, n);
    V dz = V{};
    for (int i = 0; i < count; ++i) {
      const V g = load_lanes<T, kPart>(grad[i] + c, n);
      if constexpr (kMax) dz += load_index<I>(index[i] + c, n) == I{} + position[i] ? g : V{};
      else dz += g / (V{} + A(a.kernel_h * a.kernel_w));
    }
    if (a.pass.act.is_relu()) dz = blocked(dz, value * k(0) + k(1));
    else if (a.pass.act.is_other()) dz = gradient_vector<A>(dz, value * k(0) + k(1), a.pass.act);
    if constexpr (kReduce) {
      A *first = sums + c, *second = sums + kChunk + kPad + c;
      store(first, load(first) + dz);
      store(second, load(second) + dz * (value - k(2)));
    }
    if constexpr (kWrite) store_lanes<T, kPart>(dx + c, dz * k(3) + (value * k(4) + k(5)), n);
  }

  // The outputs whose window holds the pixel: o * stride - pad <= at < o * stride - pad + kernel.
  static int64_t first_window(int64_t at, int64_t kernel, int64_t stride, int64_t pad) {
    return at + pad < kernel ? 0 : (at + pad - kernel) / stride + 1;
  }

  void pixel(int64_t r, int64_t from, int n, A* sums) const {
    const Pixel p(r, a.in_h, a.in_w);
    const T* grad[kMaxWindow];
    const uint8_t* index[kMaxWindow];
    int position[kMaxWindow], count = 0, c = 0;
    const int64_t last_h = least(a.out_h - 1, (p.y + a.pad_h) / a.stride_h), last_w = least(a.out_w - 1, (p.x + a.pad_w) / a.stride_w);
    for (int64_t i = first_window(p.y, a.kernel_h, a.stride_h, a.pad_h); i <= last_h; ++i)
      for (int64_t j = first_window(p.x, a.kernel_w, a.stride_w, a.pad_w); j <= last_w; ++j) {
        const int64_t o = (p.image * a.out_h + i) * a.out_w + j;
        grad[count] = row<T>(a.pass.in[1], o, 1) + from;
        index[count] = kMax ? a.index + o * a.index_pitch + from : nullptr;
        position[count++] = int((p.y + a.pad_h - i * a.stride_h) * a.kernel_w + p.x + a.pad_w - j * a.stride_w);
      }
    const T* x = row<T>(a.pass.in[0], r, 1) + from;
    T* dx = kWrite ? row<T>(a.pass.out, r, 1) + from : nullptr;
    for (; c + kLanes <= n; c += kLanes) lanes<false>(grad, index, position, count, x, dx, from, c, kLanes, sums);
    if (c < n) lanes<true>(grad, index, position, count, x, dx, from, c, n - c, sums);
  }

  void item(int64_t tile, int64_t chunk) const {
    const int64_t from = chunk * kChunk, start = tile * plan.tile, rows = plan.count(tile);
    const int n = int(least(kChunk, plan.lanes - from));
    alignas(64) A sums[2 * (kChunk + kPad)];
    double* totals[2] = {};
    for (int i = 0; i < (kReduce ? 2 : 0); ++i) {
      totals[i] = partials.at(tile, i) + from;
      for (int c = 0; c < n; ++c) totals[i][c] = 0;
    }
    for (int64_t r = 0; r < rows; r += plan.block) {
      const int64_t height = least(plan.block, rows - r);
      if (kReduce) std::memset(sums, 0, sizeof(sums));
      for (int64_t j = 0; j < height; ++j) pixel(start + r + j, from, n, sums);
      for (int i = 0; i < (kReduce ? 2 : 0); ++i)
        for (int c = 0; c < n; ++c) totals[i][c] += double(sums[i * (kChunk + kPad) + c]);
    }
  }
};

template <class Pass>
void pool_body(void* context, int64_t begin, int64_t end) {
  const Pass& pass = *static_cast<const Pass*>(context);
  for (int64_t i = begin; i < end; ++i) pass.item(i / pass.plan.chunks, i % pass.plan.chunks);
}

template <class Pass, class T>
void run_pool(const PoolArgs& a, int constant_count, int sums, int64_t window, Parallel parallel) {
  using A = AccumOf<T>;
  const Plan plan = plan_of(a.pass.rows, a.pass.channels, 1, most(1, 2 * kMostBlockRows / window));
  const Constants<A> constants = gather_constants<A>(plan, a.pass.constants, constant_count);
  const Partials partials = new_partials(plan, sums + (a.pass.measured.data != nullptr ? 2 : 0));
  Pass pass{a, plan, constants, partials};
  distribute(a.pass.rows * a.pass.channels * window, plan.tiles * plan.chunks, pool_body<Pass>, &pass, parallel);
  merge<A>(a.pass, plan, partials, sums, parallel);
  std::free(partials.storage);
  std::free(constants.storage);
}

template <class T>
void pool_forward_of(const PoolArgs& a, Parallel parallel) {
  const int64_t window = a.kernel_h * a.kernel_w;
  if (a.index != nullptr) run_pool<PoolForward<T, true>, T>(a, 2, 0, window, parallel);
  else run_pool<PoolForward<T, false>, T>(a, 2, 0, window, parallel);
}

template <class T, bool kReduce, bool kWrite>
void pool_backward_of(const PoolArgs& a, Parallel parallel) {
  if (a.index != nullptr) run_pool<PoolBackward<T, true, kReduce, kWrite>, T>(a, 6, kReduce ? 2 : 0, 1, parallel);
  else run_pool<PoolBackward<T, false, kReduce, kWrite>, T>(a, 6, kReduce ? 2 : 0, 1, parallel);
}

template <class T>
void pool_backward_modes(const PoolArgs& a, bool sums, bool write, Parallel parallel) {
  if (sums && write) pool_backward_of<T, true, true>(a, parallel);
  else if (sums) pool_backward_of<T, true, false>(a, parallel);
  else pool_backward_of<T, false, true>(a, parallel);
}

// ---------------------------------------------------------------------------------------------------------------------------------
// The table.

void statistics(const PassArgs& a, Parallel parallel) { run<Nothing>(a, parallel); }

template <bool kAffine>
void join_forward_of(const PassArgs& a, bool residual, bool residual_affine, Parallel parallel) {
  if (!residual) run<JoinForward<kAffine, Residual::none, false>>(a, parallel);
  else if (!residual_affine) run<JoinForward<kAffine, Residual::plain, false>>(a, parallel);
  else run<JoinForward<kAffine, Residual::affine, false>>(a, parallel);
}

// Behind an activation beyond ReLU there are fewer kernels: what is absent has the constants 1 and 0, and a sum that nobody reads is taken.
void join_forward(const PassArgs& a, bool affine, bool residual, bool residual_affine, Parallel parallel) {
  if (a.act.is_other()) {
    if (residual) run<JoinForward<true, Residual::affine, true>>(a, parallel);
    else run<JoinForward<true, Residual::none, true>>(a, parallel);
  } else if (affine) join_forward_of<true>(a, residual, residual_affine, parallel);
  else join_forward_of<false>(a, residual, residual_affine, parallel);
}

template <Mask kMask, Residual kResidual>
void join_backward_of(const PassArgs& a, int sums, Parallel parallel) {
  if constexpr (kMask == Mask::none || kResidual != Residual::none) {
    if (sums == 3) return run<JoinBackward<kMask, kResidual, 3>>(a, parallel);
  }
  if (sums == 2) run<JoinBackward<kMask, kResidual, 2>>(a, parallel);
  else run<JoinBackward<kMask, kResidual, 0>>(a, parallel);
}

void join_backward(const PassArgs& a, bool residual, bool residual_affine, int sums, Parallel parallel) {
  if (a.act.is_other()) {
    if (residual) run<JoinBackward<Mask::other, Residual::affine, 3>>(a, parallel);
    else run<JoinBackward<Mask::other, Residual::none, 2>>(a, parallel);
  } else if (!a.act.is_relu()) join_backward_of<Mask::none, Residual::none>(a, sums, parallel);
  else if (!residual) join_backward_of<Mask::relu, Residual::none>(a, sums, parallel);
  else if (residual_affine) join_backward_of<Mask::relu, Residual::affine>(a, sums, parallel);
  else join_backward_of<Mask::relu, Residual::plain>(a, sums, parallel);
}

void highway_forward(const PassArgs& a, bool relu, Parallel parallel) {
  if (relu) run<HighwayForward<true>>(a, parallel);
  else run<HighwayForward<false>>(a, parallel);
}

void highway_backward(const PassArgs& a, bool relu, Parallel parallel) {
  if (relu) run<HighwayBackward<true>>(a, parallel);
  else run<HighwayBackward<false>>(a, parallel);
}

void grad_affine(const PassArgs& a, bool raw, Parallel parallel) {
  if (raw) run<GradAffine<true>>(a, parallel);
  else run<GradAffine<false>>(a, parallel);
}

template <Mask kMask, bool kReduce>
void dgrad_epilogue_of(const PassArgs& a, bool base, Parallel parallel) {
  if (base) run<DgradEpilogue<kMask, kReduce, true>>(a, parallel);
  else run<DgradEpilogue<kMask, kReduce, false>>(a, parallel);
}

void dgrad_epilogue(const PassArgs& a, bool sums, bool base, Parallel parallel) {
  if (a.act.is_other()) dgrad_epilogue_of<Mask::other, true>(a, base, parallel);
  else if (a.act.is_relu() && sums) dgrad_epilogue_of<Mask::relu, true>(a, base, parallel);
  else if (a.act.is_relu()) dgrad_epilogue_of<Mask::relu, false>(a, base, parallel);
  else if (sums) dgrad_epilogue_of<Mask::none, true>(a, base, parallel);
  else dgrad_epilogue_of<Mask::none, false>(a, base, parallel);
}

void pool_forward(const PoolArgs& a, Parallel parallel) {
  switch (a.pass.storage) {
    case Storage::f32: return pool_forward_of<float>(a, parallel);
    case Storage::f64: return pool_forward_of<double>(a, parallel);
    case Storage::bf16: return pool_forward_of<bfloat16>(a, parallel);
    case Storage::f16: return pool_forward_of<float16>(a, parallel);
  }
}

void pool_backward(const PoolArgs& a, bool sums, bool write, Parallel parallel) {
  switch (a.pass.storage) {
    case Storage::f32: return pool_backward_modes<float>(a, sums, write, parallel);
    case Storage::f64: return pool_backward_modes<double>(a, sums, write, parallel);
    case Storage::bf16: return pool_backward_modes<bfloat16>(a, sums, write, parallel);
    case Storage::f16: return pool_backward_modes<float16>(a, sums, write, parallel);
  }
}

constexpr PassKernels kernels = {statistics,  join_forward,   join_backward, highway_forward, highway_backward,
                                 grad_affine, dgrad_epilogue, pool_forward,  pool_backward};

}  // namespace
}  // namespace FUSEDRES_CAPABILITY
}  // namespace fusedres
