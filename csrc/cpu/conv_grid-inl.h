// The grid of a convolution: which source pixels an output pixel reads, where it goes, and how the pixels are cut into
// tiles and the channels into chunks. All of it follows from the shape alone.
#pragma once

#include <cstdint>

#include "conv_operand-inl.h"
#include "conv_sizes-inl.h"
#include "util-inl.h"

namespace fusedres {
namespace FUSEDRES_CAPABILITY {
namespace {

// Scratch memory of a thread, named for what it holds: the operand of a tile, the gradient of a weight gradient's tile,
// a product, and the transformed operand and product of Winograd's algorithm.
thread_local Buffer<float> scratch_a, scratch_b, scratch_c, scratch_v, scratch_m;
// of the calling thread: fresh memory of this size would be mapped and cleared by the system at every call
thread_local Buffer<float> packed_weights, partial_sums;
// of a tile that packs its own weights
thread_local Buffer<float> scratch_weights;
thread_local Buffer<int64_t> scratch_base, scratch_pixel, scratch_strided;

struct Axis {
  int64_t grid;                 // output positions of this phase
  int64_t dst_first, dst_step;  // where position i goes
  int64_t src_size, step;       // source position of tap t: i * step + offset[t]
  int taps;
  int64_t offset[kMaxTaps];
  int kernel[kMaxTaps];  // which kernel row or column tap t is
  int64_t low, span;     // smallest offset, and largest minus smallest plus one

  // With a single tap only the needed positions are loaded, side by side.
  int64_t scratch_step() const { return taps == 1 ? 1 : step; }
  int64_t scratch_size(int64_t positions) const { return taps == 1 ? positions : (positions - 1) * step + span; }
  int64_t source(int64_t first, int64_t j) const {
    return taps == 1 ? (first + j) * step + offset[0] : first * step + low + j;
  }
  int64_t shift(int t) const { return taps == 1 ? 0 : offset[t] - low; }
  bool consecutive() const {
    for (int t = 1; t < taps; ++t)
      if (offset[t] != offset[t - 1] + 1) return false;
    return true;
  }
  // A single tap that never leaves the source.
  bool inside() const { return taps == 1 && offset[0] == 0 && (grid - 1) * step < src_size; }
  void finish() {
    low = taps ? offset[0] : 0;
    int64_t high = low;
    for (int t = 1; t < taps; ++t) {
      low = least(low, offset[t]);
      high = most(high, offset[t]);
    }
    span = high - low + 1;
  }
};

Axis forward_axis(int64_t in, int64_t out, int64_t kernel, int64_t stride, int64_t pad, int64_t dilation) {
  Axis a{out, 0, 1, in, stride, static_cast<int>(kernel), {}, {}, 0, 0};
  for (int t = 0; t < a.taps; ++t) {
    a.offset[t] = t * dilation - pad;
    a.kernel[t] = t;
  }
  a.finish();
  return a;
}

// The input gradient of a strided convolution falls into `stride` phases: positions i * stride + phase read the
// gradient densely, through those taps whose distance the stride divides.
Axis dgrad_axis(int64_t in, int64_t out, int64_t kernel, int64_t stride, int64_t pad, int64_t dilation, int64_t phase) {
  Axis a{phase < in ? div_up(in - phase, stride) : 0, phase, stride, out, 1, 0, {}, {}, 0, 0};
  for (int64_t t = kernel - 1; t >= 0; --t) {
    const int64_t distance = phase + pad - t * dilation;
    if (((distance % stride) + stride) % stride != 0) continue;
    a.offset[a.taps] = distance >= 0 ? distance / stride : -((-distance) / stride);
    a.kernel[a.taps] = static_cast<int>(t);
    ++a.taps;
  }
  a.finish();
  return a;
}

struct Segment {
  int64_t offset;  // floats from a pixel's base in the scratch
  int64_t depth;
  int64_t row;  // first row of the packed weights
};

// A chunk of the source's channels: what one scratch load brings.
struct Chunk {
  int64_t first, width, row;
};

// Whether eager's sums are short: it multiplies a single image of few values not by oneDNN, but unfolded, and adds up
// pieces (use_mkldnn in ATen's Convolution.cpp).
inline bool has_short_sums(const Geometry2d& g) { return g.batch == 1 && g.in_c * g.in_h * g.in_w <= kShortValues; }

constexpr int kAnyTiles = -1;

struct Problem {
  Axis h, w;
  int64_t batch, src_c, dst_c, dst_h, dst_w;  // src_c in units where those run along the channels, but for Winograd's
  int64_t per_unit = 1;                       // channels
  // Groups are computed in blocks, each a problem of these sizes: one group, or some narrow ones abreast, of which the
  // last block, then of one vector, lacks those that would write so many channels. Those read as many channels as they
  // write; src_c is what each output reads.
  int64_t blocks = 1, abreast = 1, lacking = 0;
  // the plan: a tile is some lines of `line_rows` rows, as many as Winograd's patches have; the last of an image may
  // have fewer
  int64_t line_rows = 1, tile_lines = 0, tiles = 0, tile_pixels = 0, scratch_pixels = 0, scratch_w = 0, chunk = 0;
  int winograd = 0;               // the edge of Winograd's output tiles; 0: without his algorithm
  int winograd_only = kAnyTiles;  // the edge that they may have; 0: none
  bool short_sums = false;        // as of eager's convolution, with whose roundings ours are compared
  bool packs = false;             // a tile packs the weights that it multiplies, panel by panel

  // Of a problem of one group: cuts all `groups` of them into blocks.
  void take_groups(int64_t groups) {
    blocks = groups;
    const int64_t of_group = src_c * per_unit;
    if (of_group != dst_c || of_group < 2 || of_group > kLanes || (of_group & (of_group - 1)) != 0) return;
    const int64_t of_vector = kLanes / of_group, vectors = div_up(groups, of_vector);
    int64_t of_block = groups % of_vector == 0 ? kPanelVectors : 1;
    while (vectors % of_block != 0) --of_block;
    abreast = of_block * of_vector;
    if (abreast == 1) return;
    blocks = vectors / of_block;
    dst_c *= abreast;
    lacking = blocks * dst_c - groups * of_group;
    src_c = of_group;
    per_unit = 1;
  }

  int64_t channels() const { return blocks * dst_c - lacking; }  // of the destination
  // A block by itself.
  Problem of_block(int64_t block) const {
    Problem p = *this;
    p.dst_c = least(dst_c, channels() - block * dst_c);
    p.blocks = 1;
    p.lacking = 0;
    return p;
  }
  // Of a tile's operand: its size, and what lies between two pixels; vector by vector where groups are abreast.
  int64_t scratch_floats() const { return scratch_pixels * chunk * abreast; }
  int64_t scratch_pitch(Chunk of) const { return abreast > 1 ? least(kLanes, dst_c) : of.width; }
  // How many pixels behind a pixel's own place a tap is read.
  int64_t shift(int i, int j) const { return h.shift(i) * scratch_w + w.shift(j); }
  int64_t rows() const { return batch * h.grid; }
  int64_t lines() const { return batch * div_up(h.grid, line_rows); }
  // Of all images' rows, the first of tile `tile`; behind the last tile, their number.
  int64_t first_row(int64_t tile) const {
    const int64_t line = least(lines(), tile * tile_lines), of_image = div_up(h.grid, line_rows);
    return line / of_image * h.grid + line % of_image * line_rows;
  }
  // Every output pixel reads one source pixel.
  bool one_to_one() const { return h.inside() && w.inside(); }
  int64_t positions() const { return int64_t(winograd + 2) * (winograd + 2); }
  int64_t taps() const { return winograd ? positions() : int64_t(h.taps) * w.taps; }
  int64_t depth() const { return taps() * src_c; }
  int64_t chunks() const { return depth() ? div_up(src_c, chunk) : 0; }
  Chunk chunk_at(int64_t i) const {
    const int64_t first = i * chunk;
    return {first, least(chunk, src_c - first), taps() * first};
  }

  // After how many channels a sum of Winograd's products begins anew: the transforms of the larger tiles magnify its
  // roundings.
  int64_t sum_channels() const {
    if (kPairs) return src_c;  // far finer than what is stored
    if (short_sums) return kShortSum;
    return winograd == 3 ? least(kThreeSum, src_c / 2) : src_c;
  }

  // The edge of the output tiles by which Winograd's algorithm is cheapest, 0 where nine products an output are: where
  // the map is so small that transforming the weights outweighs it. In multiplications per pair of channels.
  int best_winograd() const {
    if (abreast > 1 || h.taps != 3 || w.taps != 3 || h.step != 1 || w.step != 1 || !h.consecutive() || !w.consecutive())
      return 0;
    const int64_t channels = src_c * per_unit;
    if (channels % kLanes != 0 || w.grid > 128) return 0;
    struct Cost {
      int edge;
      double products, of_source, of_destination, of_weights;  // the transforms', in products
    };
    // measured. Larger tiles have more products, in more and shorter calls; with short vectors the smallest maps lose
    // by them. Next to pairs the smallest tiles are no less work, and the largest round finely enough
    constexpr Cost kOfNumbers[] = {{2, 16, 4, 4, 100}, {3, 27.5, 6, 4, kLanes < 16 ? 250 : 180}},
                   kOfPairs[] = {{3, 27.5, 6, 4, 500}, {4, 40, 5, 9, 800}};
    int best = 0;
    // a product of units, whether of channels or of pixels, is as much work as one of numbers
    double least_cost = 9.0 * static_cast<double>(rows() * w.grid) / static_cast<double>(kChannelsPerUnit);
    for (const Cost& c : kPairs ? kOfPairs : kOfNumbers) {
      if (winograd_only != kAnyTiles && c.edge != winograd_only) continue;
      if (!kPairs && c.edge == 3 && (short_sums || channels < kThreeChannels)) continue;
      const double patches = static_cast<double>(batch * div_up(h.grid, c.edge) * div_up(w.grid, c.edge)),
                   transforms =
                       c.of_source / static_cast<double>(dst_c) + c.of_destination / static_cast<double>(channels),
                   cost = c.products * patches * (1 + transforms) + c.of_weights;
      if (cost >= least_cost) continue;
      best = c.edge;
      least_cost = cost;
    }
    return best;
  }

  // The same tiles without Winograd's algorithm; each packs its weights.
  Problem directly() const {
    Problem p = *this;
    p.winograd = 0;
    p.packs = true;
    if (winograd) {
      p.per_unit = kChannelsPerUnit;
      p.src_c /= kChannelsPerUnit;
      p.chunk /= kChannelsPerUnit;
    }
    return p;
  }

  int64_t scratch_rows(int64_t of_rows, int64_t images) const {
    const int64_t extra = h.taps == 1 ? 0 : (h.span - 1) + (h.step > 1 ? h.step - 1 : 0);
    return (h.taps == 1 ? of_rows : of_rows * h.step) + extra * least(images, of_rows);
  }

  // One tile of all pixels, one chunk of all channels, where that is little enough and the weight can be read as it
  // lies: `vector_c` channels of it lie side by side.
  bool plan_few(const Weight& weight, int64_t vector_c, int64_t most_pixels) {
    const int64_t pixels = rows() * w.grid;
    if (kPairs || abreast > 1 || pixels == 0 || pixels > most_pixels || weight.si != 1 || vector_c % kLanes != 0 ||
        h.taps == 0 || w.taps == 0)
      return false;
    winograd = 0;
    scratch_w = w.scratch_size(w.grid);
    tile_lines = lines();
    tiles = 1;
    tile_pixels = tile_lines * w.grid;
    scratch_pixels = scratch_rows(tile_lines, batch) * scratch_w;
    chunk = src_c;
    return scratch_pixels * src_c <= kFewFloats;
  }

  // `may_pack`: tiles can pack their own weights.
  void plan(bool may_pack) {
    winograd = best_winograd();
    if (winograd) {
      src_c *= per_unit;
      per_unit = 1;
    }
    line_rows = most(1, winograd);
    scratch_w = w.taps ? w.scratch_size(w.grid) : 0;
    tile_lines = div_up(most(1, (winograd == 4 ? 2 : 1) * kTilePixels / w.grid), line_rows);
    // few tiles must be shared out evenly; where the destination has many panels, those make tasks, too
    const int64_t multiple = dst_c >= 4 * kPanel ? 2 : 4;
    tiles = div_up(lines(), tile_lines);
    packs = may_pack && dst_c >= 4 * kPanel && rows() * w.grid <= kOwnPixels;
    if (packs) tile_lines = lines();
    else if (tiles < 16) tile_lines = div_up(lines(), least(lines(), round_up(tiles, multiple)));
    tiles = div_up(lines(), tile_lines);
    const int64_t tile_rows = tile_lines * line_rows;
    tile_pixels = tile_rows * w.grid;
    // a tile that spans images loads the border of each
    const int64_t images = (tile_rows - 1) / h.grid + 2;
    scratch_pixels = 0;
    if (h.taps && w.taps) {
      scratch_pixels = scratch_rows(tile_rows, images) * scratch_w;
      const int64_t fit = winograd ? kWinogradFloats * winograd * winograd / (positions() * tile_pixels)
                                   : kScratchFloats / scratch_pixels;
      const int64_t pieces = div_up(src_c, least(512, most(64, fit)));
      chunk = pieces == 1 ? src_c : round_up(div_up(src_c, pieces), kLanes);
    } else {
      chunk = src_c;
    }
  }
};

// Where tile `tile` lies: fills, per pixel, its base in the scratch (in floats, for `width` channels) and its index in
// the destination map, and loads the scratch through `load_row(source pixel or -1, scratch row pointer)`.
struct Tile {
  int64_t pixels;
  const int64_t* base;
  const int64_t* pixel;
};

// With `in_place` the bases are those of the source map itself.
Tile locate(const Problem& p, int64_t tile, int64_t width, const Source* in_place = nullptr) {
  int64_t* base = scratch_base.get(p.tile_pixels);
  int64_t* pixel = scratch_pixel.get(p.tile_pixels);
  const int64_t begin = p.first_row(tile), end = p.first_row(tile + 1);
  int64_t m = 0, scratch_row = 0;
  for (int64_t row = begin; row < end;) {
    const int64_t n = row / p.h.grid, first = row % p.h.grid;
    const int64_t count = least(end - row, p.h.grid - first);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t dst_row = (n * p.dst_h + p.h.dst_first + (first + i) * p.h.dst_step) * p.dst_w + p.w.dst_first;
      const int64_t src_row = in_place ? (n * p.h.src_size + (first + i) * p.h.step) * p.w.src_size
                                       : (scratch_row + i * p.h.scratch_step()) * p.scratch_w;
      const int64_t src_step = in_place ? p.w.step : p.w.scratch_step(),
                    src_stride = in_place ? in_place->map.stride / p.per_unit : width;
      for (int64_t j = 0; j < p.w.grid; ++j, ++m) {
        base[m] = (src_row + j * src_step) * src_stride;
        pixel[m] = dst_row + j * p.w.dst_step;
      }
    }
    scratch_row += p.h.taps ? p.h.scratch_size(count) : 0;
    row += count;
  }
  return {m, base, pixel};
}

// f(first column, columns, the panel's width, where it lies) for the panels of a matrix of `rows` that lie one behind
// the other, each as wide as whole vectors.
template <class F>
inline void each_panel(int64_t columns, int64_t rows, float* data, F&& f) {
  for (int64_t begin = 0; begin < columns; begin += kPanel) {
    const int64_t valid = least(kPanel, columns - begin);
    f(begin, valid, round_up(valid, kLanes), data + begin * rows);
  }
}

int64_t pixels_of(const Problem& p, int64_t tile) { return (p.first_row(tile + 1) - p.first_row(tile)) * p.w.grid; }

// Consecutive columns of the kernel are consecutive in the scratch: they make one deep segment.
int make_segments(const Problem& p, Chunk chunk, int64_t deepest, Segment* segments) {
  int count = 0;
  const bool merged = p.w.consecutive();
  const int64_t columns = merged ? 1 : p.w.taps;
  const int64_t run = merged ? p.w.taps * chunk.width : chunk.width;
  for (int i = 0; i < p.h.taps; ++i) {
    for (int64_t j = 0; j < columns; ++j) {
      const int64_t offset = p.shift(i, static_cast<int>(j)) * chunk.width;
      const int64_t row = chunk.row + (int64_t(i) * p.w.taps + j) * chunk.width;
      const int64_t parts = div_up(run, deepest), part = div_up(run, parts);
      for (int64_t k = 0; k < run; k += part) segments[count++] = {offset + k, least(part, run - k), row + k};
    }
  }
  return count;
}

constexpr int kMaxSegments = kMaxTaps * kMaxTaps * 4 + 64;

}  // namespace
}  // namespace FUSEDRES_CAPABILITY
}  // namespace fusedres
