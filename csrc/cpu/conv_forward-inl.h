// The forward convolution with its epilogue: bias, scale_shift, residual and activation, and the statistics of what is
// written.
#pragma once

#include "conv_few-inl.h"
#include "conv_groups-inl.h"
#include "conv_stats-inl.h"
#include "conv_tile-inl.h"
#include "conv_unfold-inl.h"

namespace fusedres {
namespace FUSEDRES_CAPABILITY {
namespace {

template <bool kScaleShift, bool kResidual, bool kResidualScaleShift>
void finish_rows(const ForwardArgs& a, const Tile& where, int64_t first, int64_t columns, float* c, int64_t ldc) {
  const float* scale = kScaleShift ? a.out_scale + first : nullptr;
  const float* shift = kScaleShift ? a.out_shift + first : nullptr;
  const float* residual_scale = kResidualScaleShift ? a.residual_scale + first : nullptr;
  const float* residual_shift = kResidualScaleShift ? a.residual_shift + first : nullptr;
  const float floor = a.out_act.is_relu() ? 0.f : -__builtin_inff();
  for (int64_t m = 0; m < where.pixels; ++m) {
    float* v = c + m * ldc;
    const Value* r = kResidual ? a.residual.data + where.pixel[m] * a.residual.stride + first : nullptr;
    for (int64_t n = 0; n < columns; ++n) {
      float value = kScaleShift ? scale[n] * v[n] + shift[n] : v[n];
      if (kResidual)
        value += kResidualScaleShift ? residual_scale[n] * to_float(r[n]) + residual_shift[n] : to_float(r[n]);
      v[n] = value <= floor ? floor : value;  // NaN passes
    }
  }
  if (!a.out_act.is_other()) return;
  if (ldc == columns) return activate_row(c, where.pixels * columns, a.out_act);
  for (int64_t m = 0; m < where.pixels; ++m) activate_row(c + m * ldc, columns, a.out_act);
}

// The epilogue of a tile, in place.
void finish_forward(const ForwardArgs& a, const Tile& where, int64_t first, int64_t columns, float* c, int64_t ldc) {
  if (a.bias != nullptr)
    for (int64_t m = 0; m < where.pixels; ++m)
      for (int64_t n = 0; n < columns; ++n) c[m * ldc + n] += to_float(a.bias[first + n]);
  const bool residual = a.residual.data != nullptr;
  if (a.out_scale != nullptr) {
    (!residual          ? finish_rows<true, false, false>
     : a.residual_scale ? finish_rows<true, true, true>
                        : finish_rows<true, true, false>)(a, where, first, columns, c, ldc);
  } else if (residual || a.out_act.kind != Act::none) {
    (!residual          ? finish_rows<false, false, false>
     : a.residual_scale ? finish_rows<false, true, true>
                        : finish_rows<false, true, false>)(a, where, first, columns, c, ldc);
  }
}

template <class Args>
void forward_few(const Args& a, const Problem& p, Parallel parallel) {
  float* stats = a.mean == nullptr ? nullptr : partial_sums.get(kTileStats * p.channels());
  Run runs[kMaxRuns];
  const int count = make_runs(p, a.weight, true, runs);
  const int64_t each = few_per_task(p, kDotOutputs), parts = div_up(p.dst_c, each);
  run_parallel(parallel, p.blocks * parts, p.channels() * p.depth(), [&](int64_t task) {
    const int64_t block = task / parts, first = task % parts * each, columns = least(each, p.dst_c - first),
                  ldc = a.out.stride;
    const ForwardArgs of = block_of(a, 1, block);
    Tile where;
    const float* operand = load_whole(p, of.x, &where);
    const int64_t rows = even_block(where.pixels, kDotPixels);
    float* c = of.out.data + first;
    for (int64_t n = 0; n < columns;) {
      const int64_t outputs = columns - n >= kDotOutputs ? kDotOutputs : 1;
      for (int64_t m = 0; m < where.pixels; m += rows)
        kernels().dots[outputs][least(rows, where.pixels - m)](operand, where.base + m,
                                                               of.weight.data + (first + n) * a.weight.so, a.weight.so,
                                                               runs, count, c + m * ldc + n, ldc);
      n += outputs;
    }
    finish_forward(of, where, first, columns, c, ldc);
    if (stats != nullptr)
      column_stats(c, ldc, where.pixels, columns, tile_stats(stats, p, 0).from(block * p.dst_c + first));
  });
  if (stats != nullptr) merge_stats(p, stats, a.mean, a.m2, parallel);
}

template <class Args>
void conv_forward(const Args& a, Parallel parallel) {
  const Geometry2d& g = a.g;
  Problem p{forward_axis(g.in_h, g.out_h, g.kernel_h, g.stride_h, g.pad_h, g.dilation_h),
            forward_axis(g.in_w, g.out_w, g.kernel_w, g.stride_w, g.pad_w, g.dilation_w),
            g.batch,
            g.in_c / kChannelsPerUnit,
            g.out_c,
            g.out_h,
            g.out_w,
            kChannelsPerUnit};
  p.take_groups(a.groups);
  if constexpr (!kPairs) {
    if (p.plan_few(a.weight, g.in_c, kFewerPixels)) return forward_few(a, p, parallel);
    if (p.abreast == 1 && unfolds(g, a.weight, kFewerPixels)) {
      Args by_pixels = a;
      by_pixels.g = unfolded(g);
      by_pixels.x = unfold(g, a.groups, a.x, parallel);
      by_pixels.weight = unfolded(a.weight);
      return conv_forward(by_pixels, parallel);
    }
  }
  p.short_sums = has_short_sums(g);
  p.plan(true);
  KeptUse kept(a.kept, a.version, packed_layout(p, a.weight));
  const bool is_kept = kept.data() != nullptr;
  p.packs = p.packs && !is_kept;
  const Tasks tasks(p, a.x);
  const Factor factor{a.weight, a.weight.si, a.weight.so, g.out_c * a.weight.so,
                      is_kept ? kept.data() : packed_weights.get(packed_size(p))};
  if (!is_kept || kept.fills()) pack_weights(p, factor, parallel);
  kept.filled();
  float* stats = a.mean == nullptr ? nullptr : partial_sums.get(p.tiles * kTileStats * p.channels());
  const bool in_place = !kPairs && p.dst_c % kLanes == 0 && p.lacking == 0;
  const int64_t pixels = p.rows() * p.w.grid;
  run_parallel(parallel, tasks.count(), pixels * p.channels() * 8, [&](int64_t task) {
    const auto [block, tile, begin, end] = tasks.at(task);
    const ForwardArgs of = block_of(a, p.abreast, block);
    const Problem of_block = p.of_block(block);
    const int64_t first = begin * kPanel, columns = least(of_block.dst_c, end * kPanel) - first;
    const int64_t ldc = in_place ? a.out.stride : round_up(columns, kLanes);
    // output pixels of a tile are consecutive rows of the map
    float* c = in_place ? reinterpret_cast<float*>(of.out.data) + p.first_row(tile) * p.w.grid * of.out.stride + first
                        : scratch_c.get(p.tile_pixels * ldc);
    Tile where;
    const bool last = task + 1 == tasks.count();
    const Task next = last ? Task{block, p.tiles, begin, end} : tasks.at(task + 1);
    multiply_tile(of_block, of.x, tile, tasks.behind(task, p, a.x, g.in_c), factor_of(p, factor, block), begin, end, c,
                  ldc, &where, [&](const Tile& t, Prefetch* prefetch) {
                    const int64_t from = t.pixel[0], to = t.pixel[t.pixels - 1] + 1;
                    prefetch->add(of.residual, from, to, first, columns);
                    if (!in_place) return prefetch->add(of.out, from, to, first, columns);
                    // products write the map itself, from their first panel on: the lines of the next task
                    if (last) return;
                    prefetch->add(a.out, p.first_row(next.tile) * p.w.grid, p.first_row(next.tile + 1) * p.w.grid,
                                  next.block * p.dst_c + next.begin * kPanel,
                                  least(p.dst_c, next.end * kPanel) - next.begin * kPanel);
                  });
    finish_forward(of, where, first, columns, c, ldc);
    const TileStats own = tile_stats(stats, p, tile);
    write_tile(of, where, first, columns, c, ldc, in_place, own ? own.from(block * p.dst_c + first) : own);
  });
  if (stats != nullptr) merge_stats(p, stats, a.mean, a.m2, parallel);
}

}  // namespace
}  // namespace FUSEDRES_CAPABILITY
}  // namespace fusedres
