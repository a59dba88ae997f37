// The residual addition with its activation and the backward of it, and what is a special case of them: normalisation,
// copies, statistics, a pending gradient's correction, what follows a library's input gradient.
#pragma once

#include "rows.cuh"

namespace fusedres {
namespace gpu {

// out = act(scale * raw + shift + residual_scale * residual + residual_shift), with the moments of out as partials;
// everything but raw may be absent. Reads raw and residual, writes out, which may be raw.
template <class T, int V>
struct AddActForward {
  using A = AccumOf<T>;
  struct Args {
    Map<const T> raw;
    const A *scale, *shift;
    Map<const T> residual;
    const A *residual_scale, *residual_shift;
    Map<T> out;
    A* partials;
    Activation act;
    Grid grid;
  };
  union Shared {
    Constants<A, V, 4> constants;
    MomentColumns<A, V> columns;
  };
  using Local = Measure<T, V>;
  static constexpr int kPhases = 5;

  FUSEDRES_HD static void phase(Phase<0>, const Args& a, const Place& place, Shared& shared, Local&) {
    shared.constants.read(0, a.scale, A(1), a.grid, place);
    shared.constants.read(1, a.shift, A(0), a.grid, place);
    if (!a.residual) return;
    shared.constants.read(2, a.residual_scale, A(1), a.grid, place);
    shared.constants.read(3, a.residual_shift, A(0), a.grid, place);
  }

  FUSEDRES_HD static void phase(Phase<1>, const Args& a, const Place& place, Shared& shared, Local& local) {
    const Walk<V> walk(a.grid, place);
    local.begin();
    if (!walk.inside) return;
    for (i64 row = walk.first + walk.y; row < walk.end; row += kTogether * walk.step) {
      Vec<T, V> raw[kTogether], residual[kTogether];
      FUSEDRES_UNROLL
      for (int u = 0; u < kTogether; ++u) {
        const i64 m = row + u * walk.step;
        if (m >= walk.end) continue;
        raw[u] = load<T, V>(a.raw.at(m, walk.channel));
        if (a.residual) residual[u] = load<T, V>(a.residual.at(m, walk.channel));
      }
      FUSEDRES_UNROLL
      for (int u = 0; u < kTogether; ++u) {
        const i64 m = row + u * walk.step;
        if (m >= walk.end) continue;
        A z[V];
        normalize<T, V>(z, raw[u], shared.constants, 0, walk);
        if (a.residual) {
          A other[V];
          normalize<T, V>(other, residual[u], shared.constants, 2, walk);
          FUSEDRES_UNROLL
          for (int i = 0; i < V; ++i) z[i] += other[i];
        }
        activate<A, V>(a.act, z);
        const Vec<T, V> stored = rounded_vector<T, V>(z);
        if (a.out) store<T, V>(a.out.at(m, walk.channel), stored);
        if (a.partials != nullptr) local.add(stored);
      }
    }
  }

  FUSEDRES_HD static void phase(Phase<2>, const Args& a, const Place& place, Shared& shared, Local& local) {
    if (a.partials != nullptr) local.put(shared.columns, Walk<V>(a.grid, place));
  }
  FUSEDRES_HD static void phase(Phase<3>, const Args& a, const Place& place, Shared& shared, Local&) {
    if (a.partials != nullptr) shared.columns.merge_segments(Walk<V>(a.grid, place), place);
  }
  FUSEDRES_HD static void phase(Phase<4>, const Args& a, const Place& place, Shared& shared, Local&) {
    if (a.partials != nullptr) Local::finish(shared.columns, a.partials, a.grid, place);
  }
};

// out = base + (scale if scaled else 1) * dz with dz = grad * act'(z) and z as forward has it; partials: sum dz, sum dz
// * xhat of raw where it has a mean, then that of residual where that has one. Reads grad, raw, residual and base,
// writes out, which may be grad or base.
template <class T, int V>
struct AddActBackward {
  using A = AccumOf<T>;
  struct Args {
    Map<const T> grad, raw;
    const A *scale, *shift, *mean, *invstd;
    Map<const T> residual;
    const A *residual_scale, *residual_shift, *residual_mean, *residual_invstd;
    Map<const T> base;
    Map<T> out;
    A* partials;
    Activation act;
    i64 scaled;
    Grid grid;
  };
  union Shared {
    Constants<A, V, 6> constants;
    Columns<A, V, 3> columns;
  };
  struct Local {
    A dz[V], by_raw[V], by_residual[V];
  };
  static constexpr int kPhases = 5;

  FUSEDRES_HD static void phase(Phase<0>, const Args& a, const Place& place, Shared& shared, Local&) {
    shared.constants.read(0, a.scale, A(1), a.grid, place);
    shared.constants.read(1, a.shift, A(0), a.grid, place);
    shared.constants.read(2, a.mean, A(0), a.grid, place);
    if (!a.residual) return;
    shared.constants.read(3, a.residual_scale, A(1), a.grid, place);
    shared.constants.read(4, a.residual_shift, A(0), a.grid, place);
    shared.constants.read(5, a.residual_mean, A(0), a.grid, place);
  }

  FUSEDRES_HD static void phase(Phase<1>, const Args& a, const Place& place, Shared& shared, Local& local) {
    const Walk<V> walk(a.grid, place);
    FUSEDRES_UNROLL
    for (int i = 0; i < V; ++i) local.dz[i] = local.by_raw[i] = local.by_residual[i] = A(0);
    if (!walk.inside) return;
    for (i64 row = walk.first + walk.y; row < walk.end; row += kTogether * walk.step) {
      Vec<T, V> grad[kTogether], raw[kTogether], residual[kTogether], base[kTogether];
      FUSEDRES_UNROLL
      for (int u = 0; u < kTogether; ++u) {
        const i64 m = row + u * walk.step;
        if (m >= walk.end) continue;
        grad[u] = load<T, V>(a.grad.at(m, walk.channel));
        raw[u] = load<T, V>(a.raw.at(m, walk.channel));
        if (a.residual) residual[u] = load<T, V>(a.residual.at(m, walk.channel));
        if (a.base) base[u] = load<T, V>(a.base.at(m, walk.channel));
      }
      FUSEDRES_UNROLL
      for (int u = 0; u < kTogether; ++u) {
        const i64 m = row + u * walk.step;
        if (m < walk.end) one_row(a, walk, m, grad[u], raw[u], residual[u], base[u], shared.constants, local);
      }
    }
  }

  FUSEDRES_HD static void one_row(const Args& a, const Walk<V>& walk, i64 m, const Vec<T, V>& grad,
                                  const Vec<T, V>& raw, const Vec<T, V>& residual, const Vec<T, V>& base,
                                  const Constants<A, V, 6>& constants, Local& local) {
    A dz[V];
    FUSEDRES_UNROLL
    for (int i = 0; i < V; ++i) dz[i] = loaded(grad.v[i]);
    if (a.act.kind != kNone) {
      A z[V];
      normalize<T, V>(z, raw, constants, 0, walk);
      if (a.residual) {
        A other[V];
        normalize<T, V>(other, residual, constants, 3, walk);
        FUSEDRES_UNROLL
        for (int i = 0; i < V; ++i) z[i] += other[i];
      }
      apply_gradient<A, V>(a.act, dz, z);
    }
    if (a.partials != nullptr) {
      FUSEDRES_UNROLL
      for (int i = 0; i < V; ++i) {
        local.dz[i] += dz[i];
        local.by_raw[i] += dz[i] * (loaded(raw.v[i]) - constants.of(2, i, walk));
      }
      if (a.residual_mean != nullptr) {
        FUSEDRES_UNROLL
        for (int i = 0; i < V; ++i) local.by_residual[i] += dz[i] * (loaded(residual.v[i]) - constants.of(5, i, walk));
      }
    }
    if (!a.out) return;
    if (a.scaled) {
      FUSEDRES_UNROLL
      for (int i = 0; i < V; ++i) dz[i] *= constants.of(0, i, walk);
    }
    if (a.base) {
      FUSEDRES_UNROLL
      for (int i = 0; i < V; ++i) dz[i] += loaded(base.v[i]);
    }
    store<T, V>(a.out.at(m, walk.channel), rounded_vector<T, V>(dz));
  }

  FUSEDRES_HD static void phase(Phase<2>, const Args& a, const Place& place, Shared& shared, Local& local) {
    if (a.partials == nullptr) return;
    const Walk<V> walk(a.grid, place);
    shared.columns.put(0, local.dz, walk);
    shared.columns.put(1, local.by_raw, walk);
    shared.columns.put(2, local.by_residual, walk);
  }
  FUSEDRES_HD static void phase(Phase<3>, const Args& a, const Place& place, Shared& shared, Local&) {
    if (a.partials == nullptr) return;
    const Walk<V> walk(a.grid, place);
    for (int k = 0; k < 3; ++k) shared.columns.add_segments(k, walk, place);
  }
  FUSEDRES_HD static void phase(Phase<4>, const Args& a, const Place& place, Shared& shared, Local&) {
    if (a.partials == nullptr) return;
    const Walk<V> walk(a.grid, place);
    for (int j = place.thread; j < walk.lanes * V && walk.origin + j < a.grid.channels; j += kThreads) {
      const i64 channel = walk.origin + j;
      int k = 0;
      partial(a.partials, k++, channel, a.grid, place) = A(shared.columns.total(0, j, walk));
      // (raw - mean) * invstd is xhat: its factor is the same for all rows
      if (a.mean != nullptr)
        partial(a.partials, k++, channel, a.grid, place) = A(shared.columns.total(1, j, walk) * a.invstd[channel]);
      if (a.residual_mean != nullptr)
        partial(a.partials, k, channel, a.grid, place) =
            A(shared.columns.total(2, j, walk) * a.residual_invstd[channel]);
    }
  }
};

}  // namespace gpu
}  // namespace fusedres
