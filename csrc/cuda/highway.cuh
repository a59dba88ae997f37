// The highway block's gated sum and its backward.
#pragma once

#include "rows.cuh"

namespace fusedres {
namespace gpu {

// Of a highway block, whose transform has a ReLU or none.
template <class A, int V>
FUSEDRES_HD void rectify(bool relu, A (&z)[V]) {
  FUSEDRES_UNROLL
  for (int i = 0; i < V; ++i) z[i] = relu && z[i] < A(0) ? A(0) : z[i];
}

// out = t * act(scale * raw + shift) + (1 - t) * carry with t = sigmoid(gate_scale * gate + gate_shift). Reads raw,
// gate and carry, writes out.
template <class T, int V>
struct HighwayForward {
  using A = AccumOf<T>;
  struct Args {
    Map<const T> raw;
    const A *scale, *shift;
    Map<const T> gate;
    const A *gate_scale, *gate_shift;
    Map<const T> carry;
    Map<T> out;
    i64 relu;
    Grid grid;
  };
  using Shared = Constants<A, V, 4>;
  struct Local {};
  static constexpr int kPhases = 2;

  FUSEDRES_HD static void phase(Phase<0>, const Args& a, const Place& place, Shared& shared, Local&) {
    shared.read(0, a.scale, A(1), a.grid, place);
    shared.read(1, a.shift, A(0), a.grid, place);
    shared.read(2, a.gate_scale, A(1), a.grid, place);
    shared.read(3, a.gate_shift, A(0), a.grid, place);
  }

  FUSEDRES_HD static void phase(Phase<1>, const Args& a, const Place& place, Shared& shared, Local&) {
    const Walk<V> walk(a.grid, place);
    if (!walk.inside) return;
    for (i64 row = walk.first + walk.y; row < walk.end; row += walk.step) {
      const Vec<T, V> raw = load<T, V>(a.raw.at(row, walk.channel)), gate = load<T, V>(a.gate.at(row, walk.channel));
      const Vec<T, V> carry = load<T, V>(a.carry.at(row, walk.channel));
      A z[V], g[V];
      normalize<T, V>(z, raw, shared, 0, walk);
      normalize<T, V>(g, gate, shared, 2, walk);
      rectify<A, V>(a.relu, z);
      FUSEDRES_UNROLL
      for (int i = 0; i < V; ++i) {
        const A t = Sigmoid<A>(g[i]).value;
        z[i] = t * z[i] + (A(1) - t) * loaded(carry.v[i]);
      }
      store<T, V>(a.out.at(row, walk.channel), rounded_vector<T, V>(z));
    }
  }
};

// The gradients of the normalised raw, of the normalised gate and of carry; partials for each of the two BatchNorms:
// the sum of the gradient and that of its product with xhat. Reads grad, raw, gate and carry, writes the three.
template <class T, int V>
struct HighwayBackward {
  using A = AccumOf<T>;
  struct Args {
    Map<const T> grad, raw;
    const A *scale, *shift, *mean, *invstd;
    Map<const T> gate;
    const A *gate_scale, *gate_shift, *gate_mean, *gate_invstd;
    Map<const T> carry;
    Map<T> dz, dgate, dcarry;
    A *partials, *gate_partials;
    i64 relu;
    Grid grid;
  };
  union Shared {
    Constants<A, V, 6> constants;
    Columns<A, V, 4> columns;
  };
  struct Local {
    A dz[V], by_raw[V], dgate[V], by_gate[V];
  };
  static constexpr int kPhases = 5;

  FUSEDRES_HD static void phase(Phase<0>, const Args& a, const Place& place, Shared& shared, Local&) {
    shared.constants.read(0, a.scale, A(1), a.grid, place);
    shared.constants.read(1, a.shift, A(0), a.grid, place);
    shared.constants.read(2, a.mean, A(0), a.grid, place);
    shared.constants.read(3, a.gate_scale, A(1), a.grid, place);
    shared.constants.read(4, a.gate_shift, A(0), a.grid, place);
    shared.constants.read(5, a.gate_mean, A(0), a.grid, place);
  }

  FUSEDRES_HD static void phase(Phase<1>, const Args& a, const Place& place, Shared& shared, Local& local) {
    const Walk<V> walk(a.grid, place);
    FUSEDRES_UNROLL
    for (int i = 0; i < V; ++i) local.dz[i] = local.by_raw[i] = local.dgate[i] = local.by_gate[i] = A(0);
    if (!walk.inside) return;
    for (i64 row = walk.first + walk.y; row < walk.end; row += walk.step)
      one_row(a, walk, row, shared.constants, local);
  }

  FUSEDRES_HD static void one_row(const Args& a, const Walk<V>& walk, i64 row, const Constants<A, V, 6>& constants,
                                  Local& local) {
    const Vec<T, V> grad = load<T, V>(a.grad.at(row, walk.channel)), raw = load<T, V>(a.raw.at(row, walk.channel));
    const Vec<T, V> gate = load<T, V>(a.gate.at(row, walk.channel)), carry = load<T, V>(a.carry.at(row, walk.channel));
    A z[V], value[V], dz[V], t[V], other[V];
    normalize<T, V>(z, raw, constants, 0, walk);
    normalize<T, V>(t, gate, constants, 3, walk);
    FUSEDRES_UNROLL
    for (int i = 0; i < V; ++i) {
      value[i] = z[i];
      t[i] = Sigmoid<A>(t[i]).value;
      dz[i] = a.relu && z[i] <= A(0) ? A(0) : loaded(grad.v[i]) * t[i];
    }
    rectify<A, V>(a.relu, value);
    store<T, V>(a.dz.at(row, walk.channel), rounded_vector<T, V>(dz));
    FUSEDRES_UNROLL
    for (int i = 0; i < V; ++i) {
      local.dz[i] += dz[i];
      local.by_raw[i] += dz[i] * (loaded(raw.v[i]) - constants.of(2, i, walk));
      other[i] = loaded(grad.v[i]) * (value[i] - loaded(carry.v[i])) * (t[i] * (A(1) - t[i]));
      local.dgate[i] += other[i];
      local.by_gate[i] += other[i] * (loaded(gate.v[i]) - constants.of(5, i, walk));
    }
    store<T, V>(a.dgate.at(row, walk.channel), rounded_vector<T, V>(other));
    FUSEDRES_UNROLL
    for (int i = 0; i < V; ++i) other[i] = loaded(grad.v[i]) * (A(1) - t[i]);
    store<T, V>(a.dcarry.at(row, walk.channel), rounded_vector<T, V>(other));
  }

  FUSEDRES_HD static bool reduces(const Args& a) { return a.partials != nullptr || a.gate_partials != nullptr; }

  FUSEDRES_HD static void phase(Phase<2>, const Args& a, const Place& place, Shared& shared, Local& local) {
    if (!reduces(a)) return;
    const Walk<V> walk(a.grid, place);
    shared.columns.put(0, local.dz, walk);
    shared.columns.put(1, local.by_raw, walk);
    shared.columns.put(2, local.dgate, walk);
    shared.columns.put(3, local.by_gate, walk);
  }
  FUSEDRES_HD static void phase(Phase<3>, const Args& a, const Place& place, Shared& shared, Local&) {
    if (!reduces(a)) return;
    const Walk<V> walk(a.grid, place);
    for (int k = 0; k < 4; ++k) shared.columns.add_segments(k, walk, place);
  }
  FUSEDRES_HD static void phase(Phase<4>, const Args& a, const Place& place, Shared& shared, Local&) {
    if (!reduces(a)) return;
    const Walk<V> walk(a.grid, place);
    for (int j = place.thread; j < walk.lanes * V && walk.origin + j < a.grid.channels; j += kThreads) {
      finish(a.partials, a.invstd, 0, j, a, place, shared, walk);
      finish(a.gate_partials, a.gate_invstd, 2, j, a, place, shared, walk);
    }
  }

  FUSEDRES_HD static void finish(A* partials, const A* invstd, int k, int j, const Args& a, const Place& place,
                                 const Shared& shared, const Walk<V>& walk) {
    if (partials == nullptr) return;
    const i64 channel = walk.origin + j;
    partial(partials, 0, channel, a.grid, place) = A(shared.columns.total(k, j, walk));
    partial(partials, 1, channel, a.grid, place) = A(shared.columns.total(k + 1, j, walk) * invstd[channel]);
  }
};

}  // namespace gpu
}  // namespace fusedres
