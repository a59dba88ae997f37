// The input gradient with its epilogue: the activation's mask or derivative, the BatchNorm's sums and scale, and what
// is added.
#pragma once

#include <cstring>

#include "conv_few-inl.h"
#include "conv_tile-inl.h"

namespace fusedres {
namespace FUSEDRES_CAPABILITY {
namespace {

// The epilogue of `R` pixels over all columns: rows are read along memory, and per-channel vectors once for all R. The
// sums of the tile accumulate in place, without the factor invstd.
template <int R, bool kMask, bool kSums, bool kOld, bool kScaled>
void dgrad_rows(const DgradArgs& a, const int64_t* pixel, int64_t first, int64_t columns, const float* c, int64_t ldc,
                float* sum_dz, float* sum_dz_xhat) {
  const Value *x[R], *old[R];
  Value* out[R];
  for (int i = 0; i < R; ++i) {
    x[i] = kMask || kSums ? a.x.data + pixel[i] * a.x.stride + first : nullptr;
    out[i] = a.dx.data + pixel[i] * a.dx.stride + first;
    old[i] = !kOld ? nullptr : a.accumulate ? out[i] : a.base.data + pixel[i] * a.base.stride + first;
  }
  const float* scale = kMask || kScaled ? a.scale + first : nullptr;
  const float* shift = kMask ? a.shift + first : nullptr;
  const float* mean = kSums ? a.mean + first : nullptr;
  int64_t n = 0;
  for (; n + kLanes <= columns; n += kLanes) {
    vec s0 = {},
        s1 = {};  // of these pixels alone: the fewer additions to the tile's sums, the fewer roundings of large numbers
    const vec gamma = kMask || kScaled ? load(scale + n) : vec{}, beta = kMask ? load(shift + n) : vec{},
              center = kSums ? load(mean + n) : vec{};
#pragma GCC unroll 4
    for (int i = 0; i < R; ++i) {
      vec dz = load(c + i * ldc + n);
      const vec value = kMask || kSums ? load(x[i] + n) : vec{};
      if constexpr (kMask) dz = gamma * value + beta <= 0.f ? vec{} : dz;
      if constexpr (kSums) {
        s0 += dz;
        s1 += dz * (value - center);
      }
      if constexpr (kScaled) dz *= gamma;
      if constexpr (kOld) dz += load(old[i] + n);
      store(out[i] + n, dz);
    }
    if constexpr (kSums) {
      store(sum_dz + n, load(sum_dz + n) + s0);
      store(sum_dz_xhat + n, load(sum_dz_xhat + n) + s1);
    }
  }
  for (; n < columns; ++n) {
    float s0 = 0.f, s1 = 0.f;
    for (int i = 0; i < R; ++i) {
      float dz = c[i * ldc + n];
      if (kMask && scale[n] * to_float(x[i][n]) + shift[n] <= 0.f) dz = 0.f;
      if (kSums) {
        s0 += dz;
        s1 += dz * (to_float(x[i][n]) - mean[n]);
      }
      if (kScaled) dz *= scale[n];
      if (kOld) dz += to_float(old[i][n]);
      put(out[i] + n, dz);
    }
    if (kSums) {
      sum_dz[n] += s0;
      sum_dz_xhat[n] += s1;
    }
  }
}

template <bool kMask, bool kSums, bool kOld, bool kScaled>
void dgrad_tile(const DgradArgs& a, const Tile& where, int64_t first, int64_t columns, const float* c, int64_t ldc,
                float* sum_dz, float* sum_dz_xhat) {
  int64_t m = 0;
  for (; m + 4 <= where.pixels; m += 4)
    dgrad_rows<4, kMask, kSums, kOld, kScaled>(a, where.pixel + m, first, columns, c + m * ldc, ldc, sum_dz,
                                               sum_dz_xhat);
  for (; m < where.pixels; ++m)
    dgrad_rows<1, kMask, kSums, kOld, kScaled>(a, where.pixel + m, first, columns, c + m * ldc, ldc, sum_dz,
                                               sum_dz_xhat);
}

using DgradTile = void (*)(const DgradArgs&, const Tile&, int64_t, int64_t, const float*, int64_t, float*, float*);

template <bool kMask, bool kSums>
DgradTile dgrad_tile_for(bool old, bool scaled) {
  if (old) return scaled ? dgrad_tile<kMask, kSums, true, true> : dgrad_tile<kMask, kSums, true, false>;
  return scaled ? dgrad_tile<kMask, kSums, false, true> : dgrad_tile<kMask, kSums, false, false>;
}

// An activation beyond ReLU, in place: what is left to the epilogue has none.
void derive_tile(const DgradArgs& a, const Tile& where, int64_t first, int64_t columns, float* c, int64_t ldc) {
  constexpr int64_t kPiece = 512;
  float z[kPiece];
  // pixels that lie side by side are derived at once
  const int64_t together = ldc == columns ? most(1, kPiece / columns) : 1;
  for (int64_t m = 0; m < where.pixels; m += together) {
    const int64_t pixels = least(together, where.pixels - m);
    for (int64_t begin = 0; begin < columns; begin += kPiece) {
      const int64_t width = least(kPiece, columns - begin);
      const float *scale = a.scale + first + begin, *shift = a.shift + first + begin;
      for (int64_t i = 0; i < pixels; ++i) {
        const Value* x = a.x.data + where.pixel[m + i] * a.x.stride + first + begin;
        float* of = z + i * width;
        int64_t n = 0;
        for (; n + kLanes <= width; n += kLanes) store(of + n, load(scale + n) * load(x + n) + load(shift + n));
        for (; n < width; ++n) of[n] = scale[n] * to_float(x[n]) + shift[n];
      }
      gradient_row(c + m * ldc + begin, z, pixels * width, a.act);
    }
  }
}

void finish_dgrad(const DgradArgs& a, const Tile& where, int64_t first, int64_t columns, float* c, int64_t ldc,
                  float* sum_dz, float* sum_dz_xhat) {
  if (a.scale != nullptr && a.act.is_other()) derive_tile(a, where, first, columns, c, ldc);
  const bool mask = a.scale != nullptr && a.act.is_relu(), sums = sum_dz != nullptr,
             old = a.accumulate || a.base.data != nullptr;
  if (sums) {
    std::memset(sum_dz, 0, columns * sizeof(float));
    std::memset(sum_dz_xhat, 0, columns * sizeof(float));
  }
  const DgradTile tile =
      mask ? (sums ? dgrad_tile_for<true, true>(old, a.scaled) : dgrad_tile_for<true, false>(old, a.scaled))
           : (sums ? dgrad_tile_for<false, true>(old, a.scaled) : dgrad_tile_for<false, false>(old, a.scaled));
  tile(a, where, first, columns, c, ldc, sum_dz, sum_dz_xhat);
}

// The sums of all tiles, in their order.
void merge_sums(const DgradArgs& a, const float* sums, int64_t tiles, int64_t channels, Parallel parallel) {
  run_parallel(parallel, div_up(channels, kMerged), tiles * channels, [&](int64_t b) {
    const int64_t first = b * kMerged, width = least(kMerged, channels - first);
    double s0[kMerged] = {}, s1[kMerged] = {};
    for (int64_t t = 0; t < tiles; ++t) {
      const float *own = sums + t * 2 * channels + first, *xhat = own + channels;
      for (int64_t n = 0; n < width; ++n) {
        s0[n] += own[n];
        s1[n] += xhat[n];
      }
    }
    for (int64_t n = 0; n < width; ++n) {
      a.sum_dz[first + n] = static_cast<float>(s0[n]);
      a.sum_dz_xhat[first + n] = static_cast<float>(s1[n] * a.invstd[first + n]);
    }
  });
}

// The sums of the only tile go to `sums`.
template <class Args>
void dgrad_few(const Args& a, const Problem& p, float* sums, Parallel parallel) {
  Run runs[kMaxRuns];
  const int count = make_runs(p, a.weight, false, runs);
  const int64_t panels = div_up(p.dst_c, kPanel);
  run_parallel(parallel, p.blocks * panels, p.channels() * p.depth(), [&](int64_t task) {
    const int64_t block = task / panels, panel = task % panels, first = panel * kPanel,
                  width = panel_width(p.dst_c, panel);
    const int vectors = static_cast<int>(width / kLanes);
    const DgradArgs of = block_of(a, 1, block);
    Tile where;
    const float* operand = load_whole(p, of.grad, &where);
    float* c = scratch_c.get(p.tile_pixels * width);
    const int64_t rows = even_block(where.pixels, rows_for(vectors)), part = even_block(p.src_c, kSegment);
    for (int i = 0; i < count; ++i) {
      for (int64_t k = 0; k < p.src_c; k += part) {
        const float* weights = of.weight.data + runs[i].weight + k * a.weight.so + first;
        for (int64_t m = 0; m < where.pixels; m += rows)
          kernels().multiply[vectors][least(rows, where.pixels - m)](
              operand + runs[i].operand + k, where.base + m, weights, a.weight.so, least(part, p.src_c - k),
              c + m * width, width, i == 0 && k == 0, kNothingAhead);
      }
    }
    float* own = from(sums, block * p.dst_c + first);
    finish_dgrad(of, where, first, width, c, width, own, from(own, p.channels()));
  });
}

template <class Args>
void conv_dgrad(const Args& a, Parallel parallel) {
  const Geometry2d& g = a.g;
  const int64_t phases = g.stride_h * g.stride_w;
  Problem problems[16];
  bool few[16] = {};
  int64_t tiles = 0, first_tile[17] = {0};
  for (int64_t i = 0; i < phases; ++i) {
    Problem& p = problems[i];
    p = Problem{dgrad_axis(g.in_h, g.out_h, g.kernel_h, g.stride_h, g.pad_h, g.dilation_h, i / g.stride_w),
                dgrad_axis(g.in_w, g.out_w, g.kernel_w, g.stride_w, g.pad_w, g.dilation_w, i % g.stride_w),
                g.batch,
                g.out_c / kChannelsPerUnit,
                g.in_c,
                g.in_h,
                g.in_w,
                kChannelsPerUnit};
    p.take_groups(a.groups);
    p.short_sums = has_short_sums(g);
    if (p.h.grid > 0 && p.w.grid > 0) {
      few[i] = p.plan_few(a.weight, g.in_c, kFewPixels);
      if (!few[i]) p.plan(true);
      tiles += p.tiles;
    }
    first_tile[i + 1] = tiles;
  }
  const int64_t channels = a.groups * g.in_c;
  float* sums = a.sum_dz == nullptr ? nullptr : partial_sums.get(tiles * 2 * channels);
  for (int64_t i = 0; i < phases; ++i) {
    const Problem& p = problems[i];
    if (first_tile[i + 1] == first_tile[i]) continue;
    if constexpr (!kPairs) {
      if (few[i]) {
        dgrad_few(a, p, from(sums, first_tile[i] * 2 * channels), parallel);
        continue;
      }
    }
    const Tasks tasks(p, a.grad);
    const Factor factor{a.weight, a.weight.so, a.weight.si, g.out_c * a.weight.so, packed_weights.get(packed_size(p))};
    pack_weights(p, factor, parallel);
    run_parallel(parallel, tasks.count(), p.rows() * p.w.grid * p.channels() * 8, [&](int64_t task) {
      const auto [block, tile, begin, end] = tasks.at(task);
      const DgradArgs of = block_of(a, p.abreast, block);
      const Problem of_block = p.of_block(block);
      const int64_t first = begin * kPanel, columns = least(of_block.dst_c, end * kPanel) - first;
      const int64_t ldc = round_up(columns, kLanes);
      float* c = scratch_c.get(p.tile_pixels * ldc);
      Tile where;
      multiply_tile(of_block, of.grad, tile, tasks.behind(task, p, a.grad, g.out_c), factor_of(p, factor, block), begin,
                    end, c, ldc, &where, [&](const Tile& t, Prefetch* prefetch) {
                      if (phases > 1) return;  // its pixels are not side by side
                      const int64_t from = t.pixel[0], to = t.pixel[t.pixels - 1] + 1;
                      prefetch->add(of.x, from, to, first, columns);
                      prefetch->add(of.dx, from, to, first, columns);
                      if (!a.accumulate) prefetch->add(of.base, from, to, first, columns);
                    });
      float* own = from(sums, (first_tile[i] + tile) * 2 * channels + block * p.dst_c + first);
      finish_dgrad(of, where, first, columns, c, ldc, own, from(own, channels));
    });
  }
  if (sums != nullptr) merge_sums(a, sums, tiles, channels, parallel);
}

}  // namespace
}  // namespace FUSEDRES_CAPABILITY
}  // namespace fusedres
