// The weight gradient: products of pixels, summed per group of tiles and merged in the order of the groups.
#pragma once

#include "conv_few-inl.h"
#include "conv_groups-inl.h"
#include "conv_tile-inl.h"
#include "conv_unfold-inl.h"

namespace fusedres {
namespace FUSEDRES_CAPABILITY {
namespace {

// Of a chunk's sums, the floats from a panel to the next one.
inline int64_t panel_size(const Problem& p, Chunk chunk) { return kPanel * p.taps() * chunk.width; }

// Where a weight gradient's sums lie: per group of tiles, by Problem::chunk_at, panel by panel, within a panel by tap
// (or position), channel.
struct WgradPlan {
  Problem p;
  int64_t panels, parts, each;  // panels, and how they are divided into tasks
  int64_t groups, group_tiles;  // each group of tiles sums into a partial of its own
  int64_t size() const { return block_size(p); }
  // Of all sums, those of a panel of a chunk for a group of tiles.
  float* at(float* sums, int64_t block, int64_t group, Chunk chunk, int64_t panel) const {
    return sums + (block * groups + group) * size() + chunk.row * round_up(p.dst_c, kLanes) +
           panel * panel_size(p, chunk);
  }
  int64_t used_groups() const { return div_up(p.tiles, group_tiles); }

  // Follows from the shape alone.
  explicit WgradPlan(const Problem& problem) : p(problem) {
    p.plan(false);
    // the sums of a panel stay in cache from tile to tile; those of Winograd's positions are 16/9 or 4 times as many
    p.chunk = least(p.chunk, p.winograd ? kPanel : most(kLanes, kSumsFloats / (kPanel * p.taps()) / kLanes * kLanes));
    const int64_t pixels = p.rows() * p.w.grid, chunks = p.chunks();
    panels = div_up(p.dst_c, kPanel);
    groups = most(1, least(16, least(pixels / 512, (int64_t(1) << 22) / (p.blocks * size()))));
    each = p.winograd ? 1
                      : most(1, least(kScratchFloats / (p.tile_pixels * kPanel),
                                      div_up(panels, div_up(8, p.blocks * groups * chunks))));
    parts = div_up(panels, each);
    // a small map: more groups rather than idle threads, down to groups that still outweigh their partials
    groups = least(p.tiles, most(groups, least(div_up(8, p.blocks * chunks * parts), most(1, pixels / 96))));
    group_tiles = div_up(p.tiles, groups);
  }
};

// The bases of pixels that lie `stride` apart.
const int64_t* strided_base(int64_t pixels, int64_t stride) {
  int64_t* base = scratch_strided.get(pixels);
  for (int64_t m = 0; m < pixels; ++m) base[m] = m * stride;
  return base;
}

// The products of one tile: panels [begin, end) of one chunk, added to the `sums` of those unless they are `fresh`.
// `gradient` holds the tile's output gradients, panel by panel.
void outer_tile(const WgradPlan& plan, Chunk chunk, const Tile& where, const float* scratch, const float* gradient,
                int64_t begin, int64_t end, float* sums, bool fresh, Prefetch* prefetch) {
  const Problem& p = plan.p;
  Segment segments[kMaxSegments];
  const int count = make_segments(p, chunk, int64_t(1) << 40, segments);
  const int64_t calls = (end - begin) * count * div_up(segments[0].depth, rows_for(kPanelVectors)),
                lines = div_up(prefetch->total, calls);
  for (int64_t panel = begin; panel < end; ++panel) {
    const int64_t width = panel_width(p.dst_c, panel);
    const int vectors = static_cast<int>(width / kLanes);
    const float* values = gradient + (panel - begin) * kPanel * where.pixels;
    const int64_t* gradient_base = strided_base(where.pixels, width);
    float* to = sums + (panel - begin) * panel_size(p, chunk);
    for (int i = 0; i < count; ++i) {
      const int64_t block = even_block(segments[i].depth, rows_for(vectors));
      for (int64_t k = 0; k < segments[i].depth; k += block) {
        const int64_t rows = least(block, segments[i].depth - k);
        kernels().outer[vectors][rows](scratch + segments[i].offset + k, where.base, values, gradient_base,
                                       where.pixels, to + (segments[i].row - chunk.row + k) * width, width, fresh,
                                       prefetch->take(lines, where.pixels));
      }
    }
  }
}

// As outer_tile, of groups abreast. `gradient` is vector by vector, as the operand is.
void outer_groups(const Problem& p, const Tile& where, const float* scratch, const float* gradient, float* sums,
                  bool fresh, Prefetch* prefetch) {
  int64_t offsets[kMaxTaps * kMaxTaps];
  const int taps = tap_offsets(p, offsets);
  const AbreastKernels& of = abreast_kernels(p.src_c);
  const int64_t* gradient_base = strided_base(where.pixels, kLanes);
  const int64_t block = even_block(taps, of.taps), width = round_up(p.dst_c, kLanes),
                lines = div_up(prefetch->total, width / kLanes * div_up(taps, block));
  for (int64_t n = 0; n < p.dst_c; n += kLanes)
    for (int64_t t = 0; t < taps; t += block)
      of.outer[least(block, taps - t)](
          scratch + n * p.scratch_pixels, where.base, offsets + t, gradient + n * where.pixels, gradient_base,
          where.pixels, sums + t * p.src_c * width + n, width, fresh, prefetch->take(lines, where.pixels));
}

// As outer_tile, tap by tap, without the pixels that read padding through it: what is not finite would not be zero
// times the padding's zeros.
void outer_inside(const Problem& p, Chunk chunk, const Tile& where, const float* scratch, const float* gradient,
                  int64_t begin, int64_t end, float* sums, bool fresh) {
  int64_t* base = scratch_strided.get(3 * where.pixels);
  int64_t *gradient_base = base + where.pixels, *inside = gradient_base + where.pixels;
  for (int t = 0; t < p.taps(); ++t) {
    const int i = t / p.w.taps, j = t % p.w.taps;
    int64_t count = 0;
    for (int64_t m = 0; m < where.pixels; ++m) {
      const int64_t row = where.pixel[m] / p.w.grid % p.h.grid, column = where.pixel[m] % p.w.grid;
      const int64_t y = row * p.h.step + p.h.offset[i], x = column * p.w.step + p.w.offset[j];
      if (y < 0 || y >= p.h.src_size || x < 0 || x >= p.w.src_size) continue;
      base[count] = where.base[m];
      inside[count++] = m;
    }
    const int64_t offset = p.shift(i, j) * p.scratch_pitch(chunk), first = t * chunk.width;
    if (p.abreast > 1) {
      for (int64_t m = 0; m < count; ++m) gradient_base[m] = inside[m] * kLanes;
      const int64_t width = round_up(p.dst_c, kLanes);
      for (int64_t n = 0; n < p.dst_c; n += kLanes)
        abreast_kernels(p.src_c).outer[1](scratch + n * p.scratch_pixels, base, &offset, gradient + n * where.pixels,
                                          gradient_base, count, sums + first * width + n, width, fresh, kNothingAhead);
      continue;
    }
    for (int64_t panel = begin; panel < end; ++panel) {
      const int64_t width = panel_width(p.dst_c, panel);
      const int vectors = static_cast<int>(width / kLanes);
      const float* values = gradient + (panel - begin) * kPanel * where.pixels;
      for (int64_t m = 0; m < count; ++m) gradient_base[m] = inside[m] * width;
      float* to = sums + (panel - begin) * panel_size(p, chunk) + first * width;
      const int64_t block = even_block(chunk.width, rows_for(vectors));
      for (int64_t k = 0; k < chunk.width; k += block)
        kernels().outer[vectors][least(block, chunk.width - k)](scratch + offset + k, base, values, gradient_base,
                                                                count, to + k * width, width, fresh, kNothingAhead);
    }
  }
}

// Whether all of a tile's output gradients are finite.
bool is_finite(const float* gradient, int64_t count) {
  Finite finite;
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) finite.see(load(gradient + i));
  for (; i < count; ++i)
    if (gradient[i] * 0.f != 0.f) return false;
  return static_cast<bool>(finite);
}

bool is_padded(const Geometry2d& g) { return g.pad_h > 0 || g.pad_w > 0; }

#ifdef FUSEDRES_PAIRS
using WinogradOfWeights = WinogradFour;
#else
using WinogradOfWeights = WinogradTwo;
#endif

// As outer_tile, for one panel, by Winograd's algorithm.
void outer_winograd(const WgradPlan& plan, int64_t tile, Chunk chunk, const float* scratch, const float* gradient,
                    int64_t panel, float* sums, bool fresh, Prefetch* prefetch) {
  const Problem& p = plan.p;
  const int64_t patches = patches_of(p, tile), width = panel_width(p.dst_c, panel);
  const int64_t step = position_step(patches, chunk.width), gradient_step = position_step(patches, width);
  float* transformed = scratch_v.get(p.positions() * step);
  float* gradients = scratch_m.get(p.positions() * gradient_step);
  transform_input<WinogradOfWeights>(p, tile, scratch, chunk.width, transformed, step);
  transform_gradient<WinogradOfWeights>(p, tile, gradient, width, gradients, gradient_step);
  int64_t* base = scratch_base.get(patches);
  for (int64_t i = 0; i < patches; ++i) base[i] = i * chunk.width;
  const int64_t* gradient_base = strided_base(patches, width);
  const int vectors = static_cast<int>(width / kLanes);
  const int64_t block = even_block(chunk.width, rows_for(vectors));
  const int64_t lines = div_up(prefetch->total, p.positions() * div_up(chunk.width, block));
  for (int position = 0; position < p.positions(); ++position, sums += chunk.width * width) {
    for (int64_t k = 0; k < chunk.width; k += block) {
      kernels().outer_numbers[vectors][least(block, chunk.width - k)](
          transformed + position * step + k, base, gradients + position * gradient_step, gradient_base, patches,
          sums + k * width, width, fresh, prefetch->take(lines, patches));
    }
  }
}

// A block of `rows` source and `valid` destination channels (rows of `width`), laid out as the weight is.
void store_weights(const Weight& w, const float* block, int64_t width, int64_t rows, int64_t valid, Value* to) {
  int64_t n = 0;
  if (w.si == 1) {
    // 16 rows of the weight from end to end before the next 16: memory is written in long runs
    const int64_t whole = rows / kLanes * kLanes;
    for (; n + kLanes <= valid; n += kLanes) {
      for (int64_t c = 0; c < whole; c += kLanes)
        transpose([&](int i) { return load(block + (c + i) * width + n); },
                  [&](int j, vec column) { store(to + (n + j) * w.so + c, column); });
      for (int64_t c = whole; c < rows; ++c)
        for (int64_t i = n; i < n + kLanes; ++i) put(to + i * w.so + c, block[c * width + i]);
    }
  }
  for (; n < valid; ++n)
    for (int64_t c = 0; c < rows; ++c) put(to + n * w.so + c * w.si, block[c * width + n]);
}

// Every product is a finished number of the weight's gradient, which is written in its rows. Returns whether that is
// right: where the operand is `padded`, of gradients that are finite.
template <class Args>
bool wgrad_few(const Args& a, const Problem& p, bool padded, Parallel parallel) {
  Run runs[kMaxRuns];
  const int count = make_runs(p, a.dweight, true, runs);
  const int64_t block = rows_for(kPanelVectors), each = few_per_task(p, block), parts = div_up(p.dst_c, each);
  bool wrong = false;
  run_parallel(parallel, p.blocks * parts, p.channels() * p.depth(), [&](int64_t task) {
    const WgradArgs of = block_of(a, 1, task / parts);
    const auto& dweight = of.dweight;
    const int64_t first = task % parts * each, columns = least(each, p.dst_c - first);
    Tile where;
    const float* operand = load_whole(p, of.x, &where);
    float* gradient = scratch_b.get(where.pixels * columns);
    for (int64_t m = 0; m < where.pixels; ++m)
      load_pixel(of.grad, where.pixel[m], first, columns, gradient + m * columns);
    if (padded && !is_finite(gradient, where.pixels * columns)) __atomic_store_n(&wrong, true, __ATOMIC_RELAXED);
    const int64_t* base = strided_base(where.pixels, columns);
    for (int64_t n = 0; n < columns; n += block) {
      for (int i = 0; i < count; ++i) {
        float* to = dweight.data + (first + n) * dweight.so + runs[i].weight;
        for (int64_t k = 0; k < runs[i].depth;) {
          // what fills no vector is computed once more with what lies in front of it
          if (runs[i].depth - k < kLanes) k = runs[i].depth - kLanes;
          const int64_t vectors = least(kPanel, runs[i].depth - k) / kLanes;
          kernels().outer[vectors][least(block, columns - n)](gradient + n, base, operand + runs[i].operand + k,
                                                              where.base, where.pixels, to + k, dweight.so, true,
                                                              kNothingAhead);
          k += vectors * kLanes;
        }
      }
    }
  });
  return !wrong;
}

inline Problem wgrad_problem(const Geometry2d& g, int64_t groups) {
  Problem p{forward_axis(g.in_h, g.out_h, g.kernel_h, g.stride_h, g.pad_h, g.dilation_h),
            forward_axis(g.in_w, g.out_w, g.kernel_w, g.stride_w, g.pad_w, g.dilation_w),
            g.batch,
            g.in_c,
            g.out_c,
            g.out_h,
            g.out_w};
  p.take_groups(groups);
  return p;
}

// Few pixels. Returns whether that was done, and right.
template <class Args>
bool wgrad_of_few(const Args& a, Parallel parallel) {
  const Geometry2d& g = a.g;
  Problem problem = wgrad_problem(g, a.groups);
  if (problem.plan_few(a.dweight, with_rest(g.in_c), kFewPixels)) return wgrad_few(a, problem, is_padded(g), parallel);
  if (!unfolds(g, a.dweight, kFewPixels, true)) return false;
  Args by_pixels = a;
  by_pixels.g = unfolded(g);
  by_pixels.x = unfold(g, a.groups, a.x, parallel);
  by_pixels.dweight = unfolded(a.dweight);
  Problem by_pixel = wgrad_problem(by_pixels.g, a.groups);
  by_pixel.plan_few(by_pixels.dweight, with_rest(by_pixels.g.in_c), kFewPixels);
  return wgrad_few(by_pixels, by_pixel, is_padded(g), parallel);
}

template <class Args>
void conv_wgrad_of(const Args& a, int winograd_only, Parallel parallel) {
  const Geometry2d& g = a.g;
  Problem problem = wgrad_problem(g, a.groups);
  if constexpr (!kPairs)
    if (problem.abreast == 1 && wgrad_of_few(a, parallel)) return;
  problem.winograd_only = winograd_only;
  const WgradPlan plan(problem);
  const Problem& p = plan.p;
  const int64_t pixels = p.rows() * p.w.grid, panels = plan.panels, parts = plan.parts, chunks = p.chunks();
  // of a single group sums are whole, and become weights while they are in cache
  const bool at_once = plan.groups == 1;
  float* sums = at_once ? nullptr : partial_sums.get(p.blocks * plan.groups * plan.size());
  bool again = false;
  // A panel of a chunk, from the sums over all tiles.
  const auto finish = [&](int64_t block, int64_t panel, Chunk chunk, const float* from) {
    const int64_t first = panel * kPanel, width = panel_width(p.dst_c, panel),
                  valid = least(width, p.of_block(block).dst_c - first);
    const Weight dweight = block_of(a, p.abreast, block).dweight;
    const auto place = [&](int i, int j, int64_t c) {
      return dweight.data + i * dweight.sh + j * dweight.sw + (chunk.first + c) * dweight.si + first * dweight.so;
    };
    if (!p.winograd) {
      for (int t = 0; t < p.taps(); ++t)
        store_weights(dweight, from + t * chunk.width * width, width, chunk.width, valid,
                      place(t / p.w.taps, t % p.w.taps, 0));
      return;
    }
    Finite finite;
    for (int64_t c0 = 0; c0 < chunk.width; c0 += kLanes) {
      float values[9][kLanes][kPanel];
      for (int64_t c = 0; c < kLanes; ++c) {
        for (int64_t n = 0; n < width; n += kLanes) {
          const float* sum = from + (c0 + c) * width + n;
          both_axes<WinogradOfWeights::kPositions, 3>(load_positions<WinogradOfWeights>(sum, chunk.width * width),
                                                      WinogradOfWeights::weight_gradient, [&](int i, int j, vec dw) {
                                                        finite.see(dw);
                                                        store(values[3 * i + j][c] + n, dw);
                                                      });
        }
      }
      for (int t = 0; t < 9; ++t) store_weights(dweight, values[t][0], kPanel, kLanes, valid, place(t / 3, t % 3, c0));
    }
    if (!finite) __atomic_store_n(&again, true, __ATOMIC_RELAXED);
  };
  run_parallel(parallel, plan.groups * p.blocks * chunks * parts, pixels * p.channels() * 8, [&](int64_t task) {
    const int64_t group = task / (p.blocks * chunks * parts), block = task / (chunks * parts) % p.blocks,
                  begin = task % parts * plan.each, end = least(panels, begin + plan.each);
    const Problem of_block = p.of_block(block);
    const Chunk chunk = p.chunk_at(task / parts % chunks);
    const int64_t first = begin * kPanel, columns = least(of_block.dst_c, end * kPanel) - first,
                  written = round_up(columns, kLanes);
    const int64_t stop = least(p.tiles, (group + 1) * plan.group_tiles);
    float* scratch = scratch_a.get(p.scratch_floats());
    float* gradient = scratch_b.get(p.tile_pixels * written);
    float* own =
        at_once ? scratch_c.get((end - begin) * panel_size(p, chunk)) : plan.at(sums, block, group, chunk, begin);
    const WgradArgs of = block_of(a, p.abreast, block);
    for (int64_t tile = group * plan.group_tiles; tile < stop; ++tile) {
      const bool fresh = tile == group * plan.group_tiles;
      Tile where = locate(p, tile, of_block.scratch_pitch(chunk));
      if (p.abreast > 1) {
        load_abreast(of_block, of.x, tile, scratch);
        for (int64_t n = 0; n < columns; n += kLanes)
          load_panels(of.grad, where, n, least(kLanes, columns - n), gradient + n * where.pixels);
      } else if (p.winograd) {
        load_tile(p, of.x, tile, chunk, scratch);
        load_panels(of.grad, where, first, columns, gradient);
      } else {
        load_operand(p, of.x, tile, chunk, scratch);
        const int64_t units = locate_units(p, chunk.width, where);
        load_gradient(p, of.grad, where, units, first, columns, gradient);
        where.pixels = units;
      }
      Prefetch prefetch;
      if (tile + 1 < stop) {
        prefetch_tile(p, of.x, tile + 1, chunk, &prefetch);
        const int64_t from = p.first_row(tile + 1) * p.w.grid, to = p.first_row(tile + 2) * p.w.grid;
        prefetch.add(of.grad.map, from, to, first, columns);
        if (of.grad.q != nullptr) prefetch.add(of.grad.second, from, to, first, columns);
      }
      if (p.winograd) outer_winograd(plan, tile, chunk, scratch, gradient, begin, own, fresh, &prefetch);
      else if ((!kPairs || p.abreast > 1) && is_padded(g) && !is_finite(gradient, where.pixels * written))
        outer_inside(of_block, chunk, where, scratch, gradient, begin, end, own, fresh);
      else if (p.abreast > 1) outer_groups(of_block, where, scratch, gradient, own, fresh, &prefetch);
      else outer_tile(plan, chunk, where, scratch, gradient, begin, end, own, fresh, &prefetch);
    }
    if (at_once)
      for (int64_t panel = begin; panel < end; ++panel)
        finish(block, panel, chunk, own + (panel - begin) * panel_size(p, chunk));
  });
  if (!at_once) {
    run_parallel(parallel, p.blocks * panels * chunks, p.blocks * plan.used_groups() * plan.size(), [&](int64_t task) {
      const int64_t block = task / (panels * chunks), panel = task / chunks % panels;
      const Chunk chunk = p.chunk_at(task % chunks);
      float* from = plan.at(sums, block, 0, chunk, panel);
      // the groups, in order, into the first
      for (int64_t k = 1; k < plan.used_groups(); ++k)
        for (int64_t i = 0; i < p.taps() * chunk.width * panel_width(p.dst_c, panel); ++i)
          from[i] += from[i + k * plan.size()];
      finish(block, panel, chunk, from);
    });
  }
  if (again) conv_wgrad_of(a, 0, parallel);
}

template <class Args>
void conv_wgrad(const Args& a, Parallel parallel) {
  conv_wgrad_of(a, WinogradOfWeights::kTile, parallel);
}

}  // namespace
}  // namespace FUSEDRES_CAPABILITY
}  // namespace fusedres
