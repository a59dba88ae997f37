// The product of a tile: its scratch is loaded chunk by chunk and multiplied by the packed weights, panel by panel,
// while the lines that will be needed next are asked for.
#pragma once

#include <cstdint>
#include <cstring>

#include "conv_abreast-inl.h"
#include "conv_gemm-inl.h"
#include "conv_groups-inl.h"
#include "conv_pack-inl.h"
#include "conv_prologue-inl.h"

namespace fusedres {
namespace FUSEDRES_CAPABILITY {
namespace {

// Lines of maps that will be read or written soon, asked for a few at a time by the register kernels, so that memory
// works while the FMA units do.
struct Prefetch {
  struct Range {
    const char* data;
    int64_t row_stride, rows, stride, pixels, lines;  // strides in bytes; pixels: of a row; lines: of a pixel
  };
  Range ranges[5];
  int count = 0, current = 0;
  int64_t row = 0, pixel = 0, line = 0, total = 0, due = 0;  // the last two in lines

  // Channels [first, first + width) of pixels [begin, end).
  void add(const Map& map, int64_t begin, int64_t end, int64_t first, int64_t width) {
    add(map, begin, 0, 1, 1, end - begin, first, width);
  }
  // Of `pixels` pixels in each of `rows` rows, so many pixels apart.
  void add(const Map& map, int64_t begin, int64_t row_step, int64_t rows, int64_t step, int64_t pixels, int64_t first,
           int64_t width) {
    if (map.data == nullptr || pixels <= 0) return;
    constexpr int64_t kSize = sizeof(Value), kPerLine = 64 / kSize;
    const char* data = reinterpret_cast<const char*>(map.data + begin * map.stride + first);
    const int64_t row_stride = row_step * map.stride * kSize;
    // whole pixels side by side are one long run
    Range range = step == 1 && width == map.stride
                      ? Range{data, row_stride, rows, 0, 1, div_up(pixels * width, kPerLine)}
                      : Range{data, row_stride, rows, step * map.stride * kSize, pixels, div_up(width, kPerLine)};
    ranges[count++] = range;
    total += range.rows * range.pixels * range.lines;
  }
  // The next `lines` lines, for a kernel of `steps` steps: what is beyond a run of as many is asked for at once. A
  // kernel that asks for `weights` leaves its share to those that follow, at most as much again as is their own.
  Ahead take(int64_t lines, int64_t steps, Ahead weights = kNothingAhead) {
    due += lines;
    if (weights.count > 0) return weights;
    int64_t now = least(due, 2 * lines);
    due -= now;
    if (now == 0 || current == count) return kNothingAhead;
    const Ahead run = next(least(now, steps));
    for (now -= run.count; now > 0 && current < count;) {
      const Ahead more = next(now);
      more.accompany(0, more.count, [](int64_t) {});
      now -= more.count;
    }
    return run;
  }

 private:
  // Up to `lines` lines that lie side by side.
  Ahead next(int64_t lines) {
    const Range& r = ranges[current];
    const char* first = r.data + row * r.row_stride + pixel * r.stride + line * 64;
    const int64_t now = least(lines, r.lines - line);
    line += now;
    if (line == r.lines) {
      line = 0;
      if (++pixel == r.pixels) {
        pixel = 0;
        if (++row == r.rows) {
          row = 0;
          ++current;
        }
      }
    }
    return {first, now};
  }
};

// The source pixels that tile `tile` loads. Its rows are consecutive, also across images.
void prefetch_tile(const Problem& p, const Source& s, int64_t tile, Chunk chunk, Prefetch* prefetch) {
  if (tile >= p.tiles) return;
  const int64_t begin = p.first_row(tile), end = p.first_row(tile + 1), first = p.per_unit * chunk.first,
                width = p.per_unit * chunk.width * p.abreast;
  const auto line = [&](int64_t row, int64_t offset) {
    const int64_t y = row % p.h.grid * p.h.step + offset;
    return (row / p.h.grid * p.h.src_size + most(0, least(p.h.src_size, y))) * p.w.src_size;
  };
  const auto add = [&](const Map& map) {
    if (p.one_to_one() && p.w.step > 1)
      return prefetch->add(map, line(begin, 0), p.h.step * p.w.src_size, end - begin, p.w.step, p.w.grid, first, width);
    prefetch->add(map, line(begin, p.h.low), line(end - 1, p.h.low + p.h.span), first, width);
  };
  add(s.map);
  if (s.q != nullptr) add(s.second);
}

// Whether all weights together do not stay in cache.
inline bool streams_weights(const Problem& p) {
  return !p.packs && round_up(p.dst_c, kLanes) * p.depth() > kScratchFloats;
}

// The weights that lie behind `floats` of them, and are read next: the calls that multiply by those, of `steps` steps
// each, ask for them, unless all stay in cache.
struct NextWeights {
  const char* first;
  int64_t lines, steps;

  NextWeights(const Problem& p, const float* weights, int64_t floats, int64_t steps)
      : first(reinterpret_cast<const char*>(weights + floats)),
        lines(streams_weights(p) ? floats / 16 : 0),
        steps(steps) {}
  Ahead of(int64_t call) const {
    const int64_t begin = call * steps;
    return {first + 64 * begin, most(0, least(steps, lines - begin))};
  }
};

// Chunk `k` of a tile's product by Winograd's algorithm: products of all positions add up over the chunks, and the last
// one writes c. Returns whether what it wrote is finite.
bool multiply_winograd(const Problem& p, int64_t tile, int64_t k, const float* scratch, const Factor& factor,
                       int64_t first_panel, int64_t last_panel, float* c, int64_t ldc, Prefetch* prefetch) {
  const Chunk chunk = p.chunk_at(k);
  const int64_t positions = p.positions(), patches = patches_of(p, tile), step = position_step(patches, chunk.width);
  float* transformed = scratch_v.get(positions * step);
  with_winograd(
      p, [&](auto winograd) { transform_input<decltype(winograd)>(p, tile, scratch, chunk.width, transformed, step); });
  int64_t* base = scratch_base.get(patches);
  for (int64_t i = 0; i < patches; ++i) base[i] = i * chunk.width;
  bool finite = true;
  // with a single chunk, one panel's products at a time
  const bool single = p.chunks() == 1, last = k + 1 == p.chunks();
  const int64_t room = positions * position_step(patches, kPanel);
  float* products = scratch_m.get(single ? room : room * (last_panel - first_panel));
  const int64_t depth = even_block(chunk.width, p.sum_channels());
  const int64_t calls = (last_panel - first_panel) * positions * div_up(chunk.width, depth) *
                        div_up(patches, rows_for(kPanelVectors)),
                lines = div_up(prefetch->total, calls);
  for (int64_t panel = first_panel; panel < last_panel; ++panel) {
    const int64_t width = panel_width(p.dst_c, panel), product_step = position_step(patches, width);
    const int vectors = static_cast<int>(width / kLanes);
    const float* weights = weights_of(p, factor, panel, chunk);
    float* product = products + (single ? 0 : (panel - first_panel) * room);
    const int64_t block = even_block(patches, rows_for(vectors));
    for (int64_t position = 0; position < positions; ++position) {
      for (int64_t c0 = 0; c0 < chunk.width; c0 += depth) {
        const int64_t channels = least(depth, chunk.width - c0);
        const float* of_call = weights + (position * chunk.width + c0) * width;
        const NextWeights next(p, of_call, channels * width, channels);
        for (int64_t m = 0; m < patches; m += block) {
          kernels().multiply_numbers[vectors][least(block, patches - m)](
              transformed + position * step + c0, base + m, of_call, width, channels,
              product + position * product_step + m * width, width, k == 0 && c0 == 0,
              prefetch->take(lines, channels, next.of(m / block)));
        }
      }
    }
    if (!last) continue;
    float* to = c + (panel - first_panel) * kPanel;
    with_winograd(p, [&](auto winograd) {
      finite &= transform_output<decltype(winograd)>(p, tile, product, width, product_step, to, ldc);
    });
  }
  return finite;
}

// A tile of an operand; without pixels behind the last one.
struct Operand {
  Source source;
  int64_t tile;
};

// A tile of Winograd's once more without its transforms. It packs its weights: this is rare, and a pass over them is
// little beside the product.
Tile multiply_directly(const Problem& p, const Source& s, int64_t tile, const Factor& factor, int64_t first_panel,
                       int64_t last_panel, float* c, int64_t ldc);

// Whether the map itself is the operand: nothing is pending and nothing padded.
inline bool multiplies_in_place(const Problem& p, const Source& s) {
  return p.abreast == 1 && s.scale == nullptr && s.act.kind == Act::none && s.map.stride % p.per_unit == 0 &&
         p.one_to_one();
}

// A tile's product of groups abreast.
void multiply_abreast(const Problem& p, const float* scratch, const Tile& where, const float* weights, float* c,
                      int64_t ldc, Prefetch* prefetch) {
  int64_t offsets[kMaxTaps * kMaxTaps];
  const int taps = tap_offsets(p, offsets);
  const AbreastKernels& of = abreast_kernels(p.src_c);
  const int64_t block = even_block(where.pixels, of.rows),
                lines = div_up(prefetch->total, div_up(p.dst_c, kLanes) * div_up(where.pixels, block));
  for (int64_t n = 0; n < p.dst_c; n += kLanes) {
    for (int64_t m = 0; m < where.pixels; m += block) {
      const Ahead ahead = prefetch->take(lines, lines);
      ahead.accompany(0, ahead.count, [](int64_t) {});
      of.multiply[least(block, where.pixels - m)](scratch + n * p.scratch_pixels, where.base + m, offsets, taps,
                                                  weights + n * p.depth(), c + m * ldc + n, ldc);
    }
  }
}

// c[pixels x (last - first) panels] = operand * weights; c has `ldc` floats a row and starts at panel `first_panel`.
// `epilogue(where, &prefetch)` may name what the epilogue of this tile will read and write. `next` is what will
// be loaded behind it.
template <class F>
void multiply_tile(const Problem& p, const Source& s, int64_t tile, const Operand& next, const Factor& factor,
                   int64_t first_panel, int64_t last_panel, float* c, int64_t ldc, Tile* where, F&& epilogue) {
  Segment segments[kMaxSegments];
  if (p.chunks() == 0) {
    *where = locate(p, tile, 1);
    for (int64_t m = 0; m < where->pixels; ++m)
      std::memset(c + m * ldc, 0,
                  (least(last_panel * kPanel, round_up(p.dst_c, kLanes)) - first_panel * kPanel) * sizeof(float));
    return;
  }
  const Source* in_place = multiplies_in_place(p, s) ? &s : nullptr;
  float* loaded = in_place ? nullptr : scratch_a.get(p.scratch_floats());
  for (int64_t k = 0; k < p.chunks(); ++k) {
    const Chunk chunk = p.chunk_at(k);
    if (p.abreast > 1) load_abreast(p, s, tile, loaded);
    else if (!in_place) load_tile(p, s, tile, chunk, loaded);
    const float* scratch = in_place ? reinterpret_cast<const float*>(s.map.data) + chunk.first : loaded;
    *where = locate(p, tile, p.scratch_pitch(chunk), in_place);
    Prefetch prefetch;
    const bool last = k + 1 == p.chunks();
    if (last) epilogue(*where, &prefetch);
    if (last) prefetch_tile(p, next.source, next.tile, p.chunk_at(0), &prefetch);
    else prefetch_tile(p, s, tile, p.chunk_at(k + 1), &prefetch);
    if (p.winograd) {
      if (!multiply_winograd(p, tile, k, scratch, factor, first_panel, last_panel, c, ldc, &prefetch))
        *where = multiply_directly(p, s, tile, factor, first_panel, last_panel, c, ldc);
      continue;
    }
    const int count = make_segments(p, chunk, kSegment, segments);
    if (p.abreast > 1) {
      multiply_abreast(p, scratch, *where, weights_of(p, factor, 0, chunk), c, ldc, &prefetch);
      continue;
    }
    const int64_t calls = (last_panel - first_panel) * count * div_up(where->pixels, rows_for(kPanelVectors)),
                  lines = div_up(prefetch.total, calls);
    for (int64_t panel = first_panel; panel < last_panel; ++panel) {
      const int64_t width = panel_width(p.dst_c, panel);
      const int vectors = static_cast<int>(width / kLanes);
      const float* weights = weights_of(p, factor, panel, chunk);
      const int64_t block = even_block(where->pixels, rows_for(vectors));
      for (int i = 0; i < count; ++i) {
        const bool first = k == 0 && i == 0;
        const float* of_call = weights + (segments[i].row - chunk.row) * width;
        const NextWeights weights_ahead(p, of_call, segments[i].depth * width, segments[i].depth);
        for (int64_t m = 0; m < where->pixels; m += block) {
          const int64_t rows = least(block, where->pixels - m);
          kernels().multiply[vectors][rows](scratch + segments[i].offset, where->base + m, of_call, width,
                                            segments[i].depth, c + m * ldc + (panel - first_panel) * kPanel, ldc, first,
                                            prefetch.take(lines, segments[i].depth, weights_ahead.of(m / block)));
        }
      }
    }
  }
}

Tile multiply_directly(const Problem& p, const Source& s, int64_t tile, const Factor& factor, int64_t first_panel,
                       int64_t last_panel, float* c, int64_t ldc) {
  Tile where;
  multiply_tile(p.directly(), s, tile, {s, p.tiles}, factor, first_panel, last_panel, c, ldc, &where,
                [](const Tile&, Prefetch*) {});
  return where;
}

// How the destination's panels are divided: enough tasks for many threads, a product that fits beside the scratch.
// Every task of a tile loads all of its operand, unless it is there.
int64_t panels_per_task(const Problem& p, const Source& s) {
  const int64_t panels = div_up(p.dst_c, kPanel);
  const int64_t wanted = p.packs && !multiplies_in_place(p, s) ? 8 : div_up(16, p.blocks * p.tiles);
  const int64_t each = p.winograd && p.chunks() > 1 ? 4 : 1;  // products of all positions live side by side
  const int64_t fit = most(1, 2 * kScratchFloats / (p.tile_pixels * kPanel * each));
  return most(1, least(fit, div_up(panels, wanted)));
}

// What a task multiplies: panels [begin, end) of a tile of a block.
struct Task {
  int64_t block, tile, begin, end;
};

// A product's tasks, and their order. Threads run stretches of it, so that what follows each other stays in a core's
// cache: the weights of some panels, for all tiles, where weights are more than the operand, else a tile. Packed
// weights were written by another core, and are the dearer for it.
struct Tasks {
  int64_t blocks, tiles, panels, each, parts;
  bool by_panels;

  Tasks(const Problem& p, const Source& s)
      : blocks(p.blocks),
        tiles(p.tiles),
        panels(div_up(p.dst_c, kPanel)),
        each(panels_per_task(p, s)),
        parts(div_up(panels, each)),
        by_panels(p.dst_c * p.taps() > p.batch * p.h.src_size * p.w.src_size) {}

  int64_t count() const { return blocks * tiles * parts; }
  Task at(int64_t i) const {
    // part and block are one number here
    const int64_t count = blocks * parts, part = by_panels ? i / tiles : i % count, first = part % parts * each;
    return {part / parts, by_panels ? i % tiles : i / count, first, least(panels, first + each)};
  }
  // What the task behind task `i` loads of the operand `s`, whose groups have so many channels.
  Operand behind(int64_t i, const Problem& p, const Source& s, int64_t of_group) const {
    if (blocks == 1) return {s, at(i).tile + 1};
    if (i + 1 == count()) return {s, tiles};
    const Task next = at(i + 1);
    return {from(s, next.block * p.abreast * of_group), next.tile};
  }
};

}  // namespace
}  // namespace FUSEDRES_CAPABILITY
}  // namespace fusedres
