// The C-sized arithmetic of BatchNorm, and the merges of partial results, in a fixed order: of tiles [tiles, C], each
// of `tile_rows` rows but the last. A tensor [2, C] of statistics or sums is one tile.
//
// A block has kChannels channels and kTileLanes threads for each, which take turns at the tiles.
#pragma once

#include "rows.cuh"

namespace fusedres {
namespace gpu {

constexpr int kChannels = 8;
constexpr int kTileLanes = kThreads / kChannels;

// The tiles of two numbers per channel: of moments their mean and M2, perhaps with what the mean cannot hold, of sums
// both.
template <class A>
struct Tiles {
  const A *first, *second, *rest;
  i64 tiles, tile_rows, rows, channels;
};

// The channel of a thread, and its turn.
struct Seat {
  i64 channel;
  int column, turn;
  FUSEDRES_HD explicit Seat(const Place& place) {
    column = place.thread % kChannels;
    turn = place.thread / kChannels;
    channel = place.x * kChannels + column;
  }
};

template <class A>
struct TwoNumbers {
  A first, second, rest;
};

// What the threads of a channel have found, and their merge: sums in double, which cancel.
template <class A>
struct Found {
  double first[kThreads], second[kThreads];
  A counts[kThreads];

  // A thread's tiles from `begin` to `end`.
  FUSEDRES_HD void read_moments(const Tiles<A>& of, i64 begin, i64 end, const Seat& seat, const Place& place) {
    Moments<A> own{A(0), A(0), A(0), A(0)};
    if (seat.channel < of.channels)
      for (i64 t = begin + seat.turn; t < end; t += kTileLanes) {
        const i64 at = t * of.channels + seat.channel;
        const A rest = of.rest == nullptr ? A(0) : of.rest[at];
        own.merge({A(least(of.tile_rows, of.rows - t * of.tile_rows)), of.first[at], rest, of.second[at]});
      }
    first[place.thread] = own.whole_mean();
    second[place.thread] = own.m2;
    counts[place.thread] = own.count;
  }

  FUSEDRES_HD void read_sums(const Tiles<A>& of, i64 begin, i64 end, const Seat& seat, const Place& place) {
    double sum = 0, other = 0;
    if (seat.channel < of.channels)
      for (i64 t = begin + seat.turn; t < end; t += kTileLanes) {
        sum += of.first[t * of.channels + seat.channel];
        other += of.second[t * of.channels + seat.channel];
      }
    first[place.thread] = sum;
    second[place.thread] = other;
  }

  FUSEDRES_HD TwoNumbers<A> merged_moments(const Seat& seat) const {
    Moments<A> all{A(0), A(0), A(0), A(0)};
    for (int i = seat.column; i < kThreads; i += kChannels)
      all.merge(Moments<A>::of(counts[i], first[i], A(second[i])));
    return {all.mean, all.m2, all.rest};
  }

  FUSEDRES_HD TwoNumbers<A> merged_sums(const Seat& seat) const {
    double sum = 0, other = 0;
    for (int i = seat.column; i < kThreads; i += kChannels) {
      sum += first[i];
      other += second[i];
    }
    return {A(sum), A(other), A(0)};
  }
};

struct NoLocal {};

// The y-th `chunk` of tiles as tile y of out. Reads 2 * tiles * C numbers.
template <class T, int V>
struct Merge {
  using A = AccumOf<T>;
  struct Args {
    Tiles<A> of;
    i64 chunk, of_moments;
    A *out, *out_second, *out_rest;
  };
  using Shared = Found<A>;
  using Local = NoLocal;
  static constexpr int kPhases = 2;

  FUSEDRES_HD static void phase(Phase<0>, const Args& a, const Place& place, Shared& shared, Local&) {
    const i64 begin = place.y * a.chunk, end = least(begin + a.chunk, a.of.tiles);
    if (a.of_moments) shared.read_moments(a.of, begin, end, Seat(place), place);
    else shared.read_sums(a.of, begin, end, Seat(place), place);
  }

  FUSEDRES_HD static void phase(Phase<1>, const Args& a, const Place& place, Shared& shared, Local&) {
    const Seat seat(place);
    if (seat.turn != 0 || seat.channel >= a.of.channels) return;
    const TwoNumbers<A> found = a.of_moments ? shared.merged_moments(seat) : shared.merged_sums(seat);
    a.out[place.y * a.of.channels + seat.channel] = found.first;
    a.out_second[place.y * a.of.channels + seat.channel] = found.second;
    if (a.out_rest != nullptr) a.out_rest[place.y * a.of.channels + seat.channel] = found.rest;
  }
};

// A parameter or a running statistic, of a dtype of its own: its numbers as fusedres/backends/cuda.py has them.
enum Dtype : i64 { kFloat16, kBfloat16, kFloat32, kFloat64 };

struct Parameter {
  void* data;
  i64 dtype;

  FUSEDRES_HD explicit operator bool() const { return data != nullptr; }

  FUSEDRES_HD double read(i64 i) const {
    switch (dtype) {
      case kFloat16: return double(loaded(static_cast<const F16*>(data)[i]));
      case kBfloat16: return double(loaded(static_cast<const BF16*>(data)[i]));
      case kFloat32: return double(static_cast<const float*>(data)[i]);
      default: return static_cast<const double*>(data)[i];
    }
  }

  FUSEDRES_HD void write(i64 i, double value) const {
    switch (dtype) {
      case kFloat16: static_cast<F16*>(data)[i] = rounded<F16>(float(value)); return;
      case kBfloat16: static_cast<BF16*>(data)[i] = rounded<BF16>(float(value)); return;
      case kFloat32: static_cast<float*>(data)[i] = float(value); return;
      default: static_cast<double*>(data)[i] = value; return;
    }
  }

  // Towards `value`, by a factor at whose ends it is exact, as torch.lerp.
  FUSEDRES_HD void move(i64 i, double value, double factor) const {
    const double old = read(i);
    write(i, factor < 0.5 ? old + factor * (value - old) : value - (value - old) * (1.0 - factor));
  }
};

// scale and shift, mean and invstd: from the moments of a batch, which move the running statistics, or without them
// from those.
template <class T, int V>
struct BnCoefficients {
  using A = AccumOf<T>;
  struct Args {
    Tiles<A> moments;
    Parameter weight, bias, running_mean, running_var;
    A *scale, *shift, *mean, *invstd;
    double count, eps, momentum;
  };
  using Shared = Found<A>;
  using Local = NoLocal;
  static constexpr int kPhases = 2;

  FUSEDRES_HD static void phase(Phase<0>, const Args& a, const Place& place, Shared& shared, Local&) {
    if (a.moments.first != nullptr) shared.read_moments(a.moments, 0, a.moments.tiles, Seat(place), place);
  }

  FUSEDRES_HD static void phase(Phase<1>, const Args& a, const Place& place, Shared& shared, Local&) {
    const Seat seat(place);
    const i64 c = seat.channel;
    if (seat.turn != 0 || c >= a.moments.channels) return;
    A center, variance;
    if (a.moments.first != nullptr) {
      const TwoNumbers<A> found = shared.merged_moments(seat);
      center = found.first;
      variance = found.second / A(a.count);
      if (a.running_mean) {
        a.running_mean.move(c, center, a.momentum);
        a.running_var.move(c, found.second / (a.count > 2.0 ? a.count - 1.0 : 1.0), a.momentum);
      }
    } else {
      center = A(a.running_mean.read(c));
      variance = A(a.running_var.read(c));
    }
    const A invstd = A(1) / root(variance + A(a.eps));
    const A gain = a.weight ? invstd * A(a.weight.read(c)) : invstd;
    a.scale[c] = gain;
    a.shift[c] = (a.bias ? A(a.bias.read(c)) : A(0)) - center * gain;
    a.mean[c] = center;
    a.invstd[c] = invstd;
  }
};

// p = gamma * invstd, q = -p * invstd * mean(dz * xhat), r = -p * mean(dz) - q * mean. The merged sums are written
// where there is room for them, and once more in the dtype of a parameter.
template <class T, int V>
struct BnBackward {
  using A = AccumOf<T>;
  struct Args {
    Tiles<A> sums;
    A *merged, *merged_xhat;
    Parameter rounded, rounded_xhat, weight;
    const A *mean, *invstd;
    A *p, *q, *r;
    double count;
    i64 training, accumulate;
  };
  using Shared = Found<A>;
  using Local = NoLocal;
  static constexpr int kPhases = 2;

  FUSEDRES_HD static void phase(Phase<0>, const Args& a, const Place& place, Shared& shared, Local&) {
    shared.read_sums(a.sums, 0, a.sums.tiles, Seat(place), place);
  }

  FUSEDRES_HD static void phase(Phase<1>, const Args& a, const Place& place, Shared& shared, Local&) {
    const Seat seat(place);
    const i64 c = seat.channel;
    if (seat.turn != 0 || c >= a.sums.channels) return;
    const TwoNumbers<A> sum = shared.merged_sums(seat);
    if (a.merged != nullptr) {
      a.merged[c] = sum.first;
      a.merged_xhat[c] = sum.second;
    }
    if (a.rounded) {
      a.rounded.write(c, sum.first);
      a.rounded_xhat.write(c, sum.second);
    }
    const A invstd = a.invstd[c], gain = a.weight ? invstd * A(a.weight.read(c)) : invstd;
    A slope = A(0), constant = A(0);
    if (a.accumulate) {
      slope = a.q[c];
      constant = a.r[c];
    } else {
      a.p[c] = gain;
    }
    if (a.training) {
      const A own = -gain * invstd * sum.second / A(a.count);
      slope += own;
      constant -= gain * sum.first / A(a.count) + own * a.mean[c];
    }
    a.q[c] = slope;
    a.r[c] = constant;
  }
};

}  // namespace gpu
}  // namespace fusedres
