// Pools of a normalised, activated map that is never stored: max or mean, and the backward, a gather.
#pragma once

#include "rows.cuh"

namespace fusedres {
namespace gpu {

// Sizes of the map and of what its pool gives, and the window.
struct Window {
  i64 height, width, out_height, out_width, kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w;
};

// The image of a row, and its place there.
struct Pixel {
  i64 image;
  int h, w;
  FUSEDRES_HD Pixel(i64 row, i64 height, i64 width) {
    const i64 line = quotient(row, width);
    image = quotient(line, height);
    h = int(line - image * height);
    w = int(row - line * width);
  }
};

// Rows are those of out. With an index the first maximum, NaN winning, and its position in the window; else the mean.
// Reads x, writes out (and index); the moments of out as partials.
template <class T, int V>
struct PoolForward {
  using A = AccumOf<T>;
  struct Args {
    Map<const T> x;
    const A *scale, *shift;
    Map<T> out;
    Map<u8> index;
    A* partials;
    Window window;
    Activation act;
    Grid grid;
  };
  union Shared {
    Constants<A, V, 2> constants;
    MomentColumns<A, V> columns;
  };
  using Local = Measure<T, V>;
  static constexpr int kPhases = 5;

  FUSEDRES_HD static void phase(Phase<0>, const Args& a, const Place& place, Shared& shared, Local&) {
    shared.constants.read(0, a.scale, A(1), a.grid, place);
    shared.constants.read(1, a.shift, A(0), a.grid, place);
  }

  FUSEDRES_HD static void phase(Phase<1>, const Args& a, const Place& place, Shared& shared, Local& local) {
    const Walk<V> walk(a.grid, place);
    local.begin();
    if (!walk.inside) return;
    for (i64 row = walk.first + walk.y; row < walk.end; row += walk.step) {
      A best[V];
      int position[V];
      FUSEDRES_UNROLL
      for (int i = 0; i < V; ++i) {
        best[i] = A(0);
        position[i] = -1;
      }
      over_window(a, walk, row, shared.constants, best, position);
      if (a.index) {
        Vec<u8, V> chosen;
        FUSEDRES_UNROLL
        for (int i = 0; i < V; ++i) chosen.v[i] = u8(position[i]);
        store<u8, V>(a.index.at(row, walk.channel), chosen);
      } else {
        const A count = A(a.window.kernel_h * a.window.kernel_w);
        FUSEDRES_UNROLL
        for (int i = 0; i < V; ++i) best[i] /= count;
      }
      const Vec<T, V> stored = rounded_vector<T, V>(best);
      store<T, V>(a.out.at(row, walk.channel), stored);
      if (a.partials != nullptr) local.add(stored);
    }
  }

  FUSEDRES_HD static void over_window(const Args& a, const Walk<V>& walk, i64 row, const Constants<A, V, 2>& constants,
                                      A (&best)[V], int (&position)[V]) {
    const Window& window = a.window;
    const Pixel pixel(row, window.out_height, window.out_width);
    const int top = pixel.h * int(window.stride_h) - int(window.padding_h);
    const int left = pixel.w * int(window.stride_w) - int(window.padding_w);
    for (int kh = 0; kh < int(window.kernel_h); ++kh) {
      const int h = top + kh;
      if (h < 0 || h >= window.height) continue;
      const i64 line = (pixel.image * window.height + h) * window.width;
      for (int kw = 0; kw < int(window.kernel_w); ++kw) {
        const int w = left + kw;
        if (w < 0 || w >= window.width) continue;
        A value[V];
        normalize<T, V>(value, load<T, V>(a.x.at(line + w, walk.channel)), constants, 0, walk);
        activate<A, V>(a.act, value);
        FUSEDRES_UNROLL
        for (int i = 0; i < V; ++i) {
          if (!a.index) {
            best[i] += value[i];
          } else if (value[i] > best[i] || value[i] != value[i] || position[i] < 0) {
            best[i] = value[i];
            position[i] = kh * int(window.kernel_w) + kw;
          }
        }
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

// Rows are those of x: each sums the windows that it lies in and, of a max, that have chosen it. Partials: sum dz and
// sum dz * xhat; dx = p * dz + q * x + r. Reads grad, index and x, writes dx where there is one.
template <class T, int V>
struct PoolBackward {
  using A = AccumOf<T>;
  struct Args {
    Map<const T> grad;
    Map<const u8> index;
    Map<const T> x;
    const A *scale, *shift, *mean, *invstd, *p, *q, *r;
    Map<T> dx;
    A* partials;
    Window window;
    Activation act;
    Grid grid;
  };
  union Shared {
    Constants<A, V, 6> constants;
    Columns<A, V, 2> columns;
  };
  struct Local {
    A dz[V], by_x[V];
  };
  static constexpr int kPhases = 5;

  FUSEDRES_HD static void phase(Phase<0>, const Args& a, const Place& place, Shared& shared, Local&) {
    shared.constants.read(0, a.scale, A(1), a.grid, place);
    shared.constants.read(1, a.shift, A(0), a.grid, place);
    shared.constants.read(2, a.mean, A(0), a.grid, place);
    shared.constants.read(3, a.p, A(1), a.grid, place);
    shared.constants.read(4, a.q, A(0), a.grid, place);
    shared.constants.read(5, a.r, A(0), a.grid, place);
  }

  FUSEDRES_HD static void phase(Phase<1>, const Args& a, const Place& place, Shared& shared, Local& local) {
    const Walk<V> walk(a.grid, place);
    FUSEDRES_UNROLL
    for (int i = 0; i < V; ++i) local.dz[i] = local.by_x[i] = A(0);
    if (!walk.inside) return;
    for (i64 row = walk.first + walk.y; row < walk.end; row += walk.step) {
      const Vec<T, V> x = load<T, V>(a.x.at(row, walk.channel));
      A dz[V], z[V];
      gather(a, walk, row, dz);
      normalize<T, V>(z, x, shared.constants, 0, walk);
      apply_gradient<A, V>(a.act, dz, z);
      if (a.partials != nullptr) {
        FUSEDRES_UNROLL
        for (int i = 0; i < V; ++i) {
          local.dz[i] += dz[i];
          local.by_x[i] += dz[i] * (loaded(x.v[i]) - shared.constants.of(2, i, walk));
        }
      }
      if (a.dx) {
        normalize<T, V>(z, x, shared.constants, 4, walk);
        FUSEDRES_UNROLL
        for (int i = 0; i < V; ++i) z[i] += dz[i] * shared.constants.of(3, i, walk);
        store<T, V>(a.dx.at(row, walk.channel), rounded_vector<T, V>(z));
      }
    }
  }

  FUSEDRES_HD static void gather(const Args& a, const Walk<V>& walk, i64 row, A (&dz)[V]) {
    FUSEDRES_UNROLL
    for (int i = 0; i < V; ++i) dz[i] = A(0);
    const Window& window = a.window;
    const int kernel_h = int(window.kernel_h), kernel_w = int(window.kernel_w);
    const int stride_h = int(window.stride_h), stride_w = int(window.stride_w);
    const Pixel pixel(row, window.height, window.width);
    const int h = pixel.h + int(window.padding_h), w = pixel.w + int(window.padding_w);
    // from the last window that a pixel lies in to the first
    for (int ho = h / stride_h; ho >= 0 && h - ho * stride_h < kernel_h; --ho) {
      if (ho >= window.out_height) continue;
      for (int wo = w / stride_w; wo >= 0 && w - wo * stride_w < kernel_w; --wo) {
        if (wo >= window.out_width) continue;
        const i64 from = (pixel.image * window.out_height + ho) * window.out_width + wo;
        const Vec<T, V> dy = load<T, V>(a.grad.at(from, walk.channel));
        if (a.index) {
          const Vec<u8, V> chosen = load<u8, V>(a.index.at(from, walk.channel));
          const int own = (h - ho * stride_h) * kernel_w + (w - wo * stride_w);
          FUSEDRES_UNROLL
          for (int i = 0; i < V; ++i) dz[i] += chosen.v[i] == own ? loaded(dy.v[i]) : A(0);
        } else {
          const A count = A(kernel_h * kernel_w);
          FUSEDRES_UNROLL
          for (int i = 0; i < V; ++i) dz[i] += loaded(dy.v[i]) / count;
        }
      }
    }
  }

  FUSEDRES_HD static void phase(Phase<2>, const Args& a, const Place& place, Shared& shared, Local& local) {
    if (a.partials == nullptr) return;
    const Walk<V> walk(a.grid, place);
    shared.columns.put(0, local.dz, walk);
    shared.columns.put(1, local.by_x, walk);
  }
  FUSEDRES_HD static void phase(Phase<3>, const Args& a, const Place& place, Shared& shared, Local&) {
    if (a.partials == nullptr) return;
    const Walk<V> walk(a.grid, place);
    for (int k = 0; k < 2; ++k) shared.columns.add_segments(k, walk, place);
  }
  FUSEDRES_HD static void phase(Phase<4>, const Args& a, const Place& place, Shared& shared, Local&) {
    if (a.partials == nullptr) return;
    const Walk<V> walk(a.grid, place);
    for (int j = place.thread; j < walk.lanes * V && walk.origin + j < a.grid.channels; j += kThreads) {
      const i64 channel = walk.origin + j;
      partial(a.partials, 0, channel, a.grid, place) = A(shared.columns.total(0, j, walk));
      partial(a.partials, 1, channel, a.grid, place) = A(shared.columns.total(1, j, walk) * a.invstd[channel]);
    }
  }
};

}  // namespace gpu
}  // namespace fusedres
