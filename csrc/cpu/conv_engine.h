// Implicit-GEMM convolutions in float32 or bfloat16 (conv_operand.h), compiled once per CPU capability (FUSEDRES_CAPABILITY names the
// namespace, FUSEDRES_LANES the floats of a vector).
//
// One mechanism for forward and both gradients. A tile is a few rows of output pixels of one or more images. The operand's pixels that a
// tile needs are loaded once into a scratch that stays in L2, padded with zeros, and whatever is pending (affine and ReLU, or the
// gradient's p * g + q * raw + r) is applied during that load. A register-blocked kernel multiplies the scratch by packed weights, and an
// epilogue (statistics; affine, residual and ReLU; or mask, sums and accumulation) visits the tile while it is in cache. So a pending
// operand is read once, the result is written once, and no intermediate map exists.
//
// Partial statistics and sums are kept per tile and merged in tile order in double: the result depends on shapes alone, not on threads.
//
// Large 3 x 3 convolutions of stride 1 in float32 go the same way by Winograd's algorithm: the scratch is transformed, the register kernel runs for each
// of 16 positions, and the result is transformed back before the epilogue.
//
// Where a float32 weight meets few pixels (small batches, late stages), packing it would cost more than the product: kernels then read it as it lies,
// each number once.
//
// No template of the standard library is instantiated here: such functions are shared between translation units at link time, and a copy
// compiled for AVX-512 could be the one that an older machine runs.
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "activation_engine.h"
#include "conv.h"

namespace fusedres {
namespace FUSEDRES_CAPABILITY {
namespace {

constexpr int kLanes = FUSEDRES_LANES;
typedef float vec __attribute__((vector_size(4 * FUSEDRES_LANES), aligned(4)));

#if FUSEDRES_LANES == 8 || (FUSEDRES_LANES == 4 && defined(__x86_64__))
#define FUSEDRES_SIXTEEN_REGISTERS 1
constexpr int kPanelVectors = 2;  // 16 registers: 6 x 2 accumulators, 2 weights, 1 broadcast
constexpr int rows_for(int vectors) { return vectors == 2 ? 6 : 10; }
constexpr int kDotPixels = 3, kDotOutputs = 4;
#else
constexpr int kPanelVectors = 4;  // 32 registers: 6 x 4 accumulators, 4 weights, 1 broadcast
constexpr int rows_for(int vectors) { return vectors == 4 ? 6 : vectors == 3 ? 8 : vectors == 2 ? 12 : 14; }
constexpr int kDotPixels = 6, kDotOutputs = 4;
#endif
constexpr int kMaxRows = 14;
constexpr int64_t kPanel = kPanelVectors * kLanes;
constexpr int kMaxTaps = 16;                     // per dimension; larger kernels go to the vendor
constexpr int64_t kTilePixels = 160;             // enough rows to amortise a pass over the packed weights
constexpr int64_t kScratchFloats = 64 * 1024;    // 256 KiB, a quarter of a current L2
constexpr int64_t kWinogradFloats = 160 * 1024;  // the transformed operand of a tile
constexpr int64_t kFewPixels = 64;               // up to here gradients read a weight as it lies
constexpr int64_t kFewerPixels = 32;             // and forward, whose sums over a vector's lanes cost more
constexpr int64_t kFewFloats = 256 * 1024;       // of the operand, whole in one scratch
constexpr int64_t kSegment = 192;                // depth of one kernel call: its weights stay in L2, mostly L1

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t div_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return div_up(a, b) * b; }

inline vec load(const float* p) { return *reinterpret_cast<const vec*>(p); }
inline void store(float* p, vec v) { *reinterpret_cast<vec*>(p) = v; }

#if FUSEDRES_LANES == 16
#define FUSEDRES_LOW 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define FUSEDRES_HIGH 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#elif FUSEDRES_LANES == 8
#define FUSEDRES_LOW 0, 8, 1, 9, 2, 10, 3, 11
#define FUSEDRES_HIGH 4, 12, 5, 13, 6, 14, 7, 15
#else
#define FUSEDRES_LOW 0, 4, 1, 5
#define FUSEDRES_HIGH 2, 6, 3, 7
#endif

// Writes the columns of kLanes rows as rows: log2(kLanes) rounds of interleaving the first half of the rows with the second. `read(i)` is row i,
// `write(j, column j)` takes the result.
template <class Read, class Write>
inline void transpose(Read&& read, Write&& write) {
  vec rows[kLanes], next[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) rows[i] = read(i);
#pragma GCC unroll 4
  for (int round = 1; round < kLanes; round *= 2) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes / 2; ++i) {
      next[2 * i] = __builtin_shufflevector(rows[i], rows[i + kLanes / 2], FUSEDRES_LOW);
      next[2 * i + 1] = __builtin_shufflevector(rows[i], rows[i + kLanes / 2], FUSEDRES_HIGH);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) rows[i] = next[i];
  }
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) write(i, rows[i]);
}

#include "conv_operand.h"
#include "conv_winograd.h"

// Uninitialised floats, freed with the owner; aligned for whole vectors.
struct Buffer {
  float* data = nullptr;
  int64_t size = 0;
  ~Buffer() { std::free(data); }
  float* get(int64_t floats) {
    if (floats > size) {
      std::free(data);
      size = round_up(floats + 64, 64);
      data = static_cast<float*>(std::aligned_alloc(64, size * sizeof(float)));
      if (data == nullptr) std::abort();
    }
    return data;
  }
};

struct Indices {
  int64_t* data = nullptr;
  int64_t size = 0;
  ~Indices() { std::free(data); }
  int64_t* get(int64_t count) {
    if (count > size) {
      std::free(data);
      size = count;
      data = static_cast<int64_t*>(std::malloc(size * sizeof(int64_t)));
      if (data == nullptr) std::abort();
    }
    return data;
  }
};

thread_local Buffer scratch_a, scratch_b, scratch_c, scratch_v, scratch_m;
// of the calling thread: fresh memory of this size would be mapped and cleared by the system at every call
thread_local Buffer packed_weights, partial_sums;
thread_local Indices scratch_base, scratch_pixel, scratch_strided;

// Runs body(i) for i in [0, n); work on fewer than kSerial values is done by the caller, because waking the threads costs microseconds. A
// thread that is done with its own part goes on with what the others have not begun, from the far end of theirs: cores are never equally fast.
constexpr int64_t kSerial = 16 * 1024;
constexpr int64_t kClaims = 1024;

template <class F>
void run_parallel(Parallel parallel, int64_t n, int64_t values, F&& body) {
  if (n == 1 || values < kSerial) {
    for (int64_t i = 0; i < n; ++i) body(i);
    return;
  }
  struct Context {
    F* body;
    int64_t n;
    bool shared;
    bool claimed[kClaims];
    void run(int64_t i) {
      if (!shared || !__atomic_exchange_n(&claimed[i], true, __ATOMIC_RELAXED)) (*body)(i);
    }
  } context;
  context.body = &body;
  context.n = n;
  context.shared = n <= kClaims;
  if (context.shared) std::memset(context.claimed, 0, static_cast<size_t>(n));
  parallel(n, [](void* pointer, int64_t begin, int64_t end) {
    Context& context = *static_cast<Context*>(pointer);
    for (int64_t i = begin; i < end; ++i) context.run(i);
    if (!context.shared) return;
    for (int64_t i = begin - 1; i >= 0; --i) context.run(i);
    for (int64_t i = context.n - 1; i >= end; --i) context.run(i);
  }, &context);
}

// --- the grid: which source pixels an output pixel reads, and where it goes ---------------------------------------------------------

struct Axis {
  int64_t grid;                 // output positions of this phase
  int64_t dst_first, dst_step;  // where position i goes
  int64_t src_size, step;       // source position of tap t: i * step + offset[t]
  int taps;
  int64_t offset[kMaxTaps];
  int kernel[kMaxTaps];         // which kernel row or column tap t is
  int64_t low, span;            // smallest offset, and largest minus smallest plus one

  // With a single tap only the needed positions are loaded, side by side.
  int64_t scratch_step() const { return taps == 1 ? 1 : step; }
  int64_t scratch_size(int64_t positions) const { return taps == 1 ? positions : (positions - 1) * step + span; }
  int64_t source(int64_t first, int64_t j) const { return taps == 1 ? (first + j) * step + offset[0] : first * step + low + j; }
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

// The input gradient of a strided convolution falls into `stride` phases: positions i * stride + phase read the gradient densely, through
// those taps whose distance the stride divides.
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
  int64_t row;     // first row of the packed weights
};

// A chunk of the source's channels: what one scratch load brings.
struct Chunk {
  int64_t first, width, row;
};

struct Problem {
  Axis h, w;
  int64_t batch, src_c, dst_c, dst_h, dst_w;  // src_c in units where those run along the channels
  int64_t per_unit = 1;                       // channels
  // the plan
  int64_t tile_rows = 0, tiles = 0, tile_pixels = 0, scratch_pixels = 0, scratch_w = 0, chunk = 0;
  bool winograd = false;

  int64_t rows() const { return batch * h.grid; }
  // Every output pixel reads one source pixel.
  bool one_to_one() const { return h.inside() && w.inside(); }
  int64_t taps() const { return winograd ? kPositions : int64_t(h.taps) * w.taps; }
  int64_t depth() const { return taps() * src_c; }
  int64_t chunks() const { return depth() ? div_up(src_c, chunk) : 0; }
  Chunk chunk_at(int64_t i) const {
    const int64_t first = i * chunk;
    return {first, least(chunk, src_c - first), taps() * first};
  }

  // Whether Winograd's 16 products per 2 x 2 outputs, with their transforms, are cheaper than 36: not where the map is so small that
  // transforming the weights outweighs it. In multiplications per pair of channels.
  bool winograd_pays() const {
    // in bfloat16 a transformed operand would be rounded once more
    if (kPairs || h.taps != 3 || w.taps != 3 || h.step != 1 || w.step != 1 || !h.consecutive() || !w.consecutive()) return false;
    if (src_c % kLanes != 0 || w.grid > 128) return false;
    const double tiles = static_cast<double>(batch * div_up(h.grid, 2) * div_up(w.grid, 2));
    const double transforms = 4.0 / static_cast<double>(src_c) + 4.0 / static_cast<double>(dst_c);
    return 16 * tiles * (1 + transforms) + 100 < 9.0 * static_cast<double>(rows() * w.grid);
  }

  int64_t scratch_rows(int64_t of_rows, int64_t images) const {
    const int64_t extra = h.taps == 1 ? 0 : (h.span - 1) + (h.step > 1 ? h.step - 1 : 0);
    return (h.taps == 1 ? of_rows : of_rows * h.step) + extra * least(images, of_rows);
  }

  // One tile of all pixels, one chunk of all channels, where that is little enough and the weight can be read as it lies: `vector_c` channels
  // of it lie side by side.
  bool plan_few(const Weight& weight, int64_t vector_c, int64_t most_pixels) {
    const int64_t pixels = rows() * w.grid;
    if (kPairs || pixels == 0 || pixels > most_pixels || weight.si != 1 || vector_c % kLanes != 0 || h.taps == 0 || w.taps == 0) return false;
    winograd = false;
    scratch_w = w.scratch_size(w.grid);
    tile_rows = rows();
    tiles = 1;
    tile_pixels = tile_rows * w.grid;
    scratch_pixels = scratch_rows(tile_rows, batch) * scratch_w;
    chunk = src_c;
    return scratch_pixels * src_c <= kFewFloats;
  }

  void plan() {
    winograd = winograd_pays();
    scratch_w = w.taps ? w.scratch_size(w.grid) : 0;
    tile_rows = most(1, kTilePixels / w.grid);
    // few tiles must be shared out evenly; where the destination has many panels, those make tasks, too
    const int64_t multiple = dst_c >= 4 * kPanel ? 2 : 4;
    tiles = div_up(rows(), tile_rows);
    if (tiles < 16) tile_rows = div_up(rows(), least(rows(), round_up(tiles, multiple)));
    if (winograd) tile_rows = round_up(tile_rows, 2);
    tiles = div_up(rows(), tile_rows);
    tile_pixels = tile_rows * w.grid;
    // a tile that spans images loads the border of each
    const int64_t images = (tile_rows - 1) / h.grid + 2;
    scratch_pixels = 0;
    if (h.taps && w.taps) {
      scratch_pixels = scratch_rows(tile_rows, images) * scratch_w;
      const int64_t fit = winograd ? kWinogradFloats / (4 * tile_pixels) : kScratchFloats / scratch_pixels;
      const int64_t pieces = div_up(src_c, least(512, most(64, fit)));
      chunk = pieces == 1 ? src_c : round_up(div_up(src_c, pieces), kLanes);
    } else {
      chunk = src_c;
    }
  }
};

// Where tile `tile` lies: fills, per pixel, its base in the scratch (in floats, for `width` channels) and its index in the destination
// map, and loads the scratch through `load_row(source pixel or -1, scratch row pointer)`.
struct Tile {
  int64_t pixels;
  const int64_t* base;
  const int64_t* pixel;
};

// With `in_place` the bases are those of the source map itself.
Tile locate(const Problem& p, int64_t tile, int64_t width, const Source* in_place = nullptr) {
  int64_t* base = scratch_base.get(p.tile_pixels);
  int64_t* pixel = scratch_pixel.get(p.tile_pixels);
  const int64_t begin = tile * p.tile_rows, end = least(p.rows(), begin + p.tile_rows);
  int64_t m = 0, scratch_row = 0;
  for (int64_t row = begin; row < end;) {
    const int64_t n = row / p.h.grid, first = row % p.h.grid;
    const int64_t count = least(end - row, p.h.grid - first);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t dst_row = (n * p.dst_h + p.h.dst_first + (first + i) * p.h.dst_step) * p.dst_w + p.w.dst_first;
      const int64_t src_row = in_place ? (n * p.h.src_size + (first + i) * p.h.step) * p.w.src_size : (scratch_row + i * p.h.scratch_step()) * p.scratch_w;
      const int64_t src_step = in_place ? p.w.step : p.w.scratch_step(), src_stride = in_place ? in_place->map.stride / p.per_unit : width;
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

// Winograd's patches of a tile: 2 x 2 output pixels and the 4 x 4 source pixels under them. Where a tile's rows or columns end on an odd one,
// the patch's second row or column is not an output; what it reads of the source then is repeated, and never reaches an output.
struct Patch {
  int64_t index, row, last_row, column;  // row and column in the scratch
  int64_t pixel;                         // of the tile, the first of the four
  bool second_row, second_column;
};

template <class F>
void each_patch(const Problem& p, int64_t tile, F&& f) {
  const int64_t begin = tile * p.tile_rows, end = least(p.rows(), begin + p.tile_rows);
  int64_t index = 0, pixel = 0, scratch_row = 0;
  for (int64_t row = begin; row < end;) {
    const int64_t count = least(end - row, p.h.grid - row % p.h.grid), in_rows = p.h.scratch_size(count);
    for (int64_t i = 0; i < count; i += 2)
      for (int64_t j = 0; j < p.w.grid; j += 2)
        f(Patch{index++, scratch_row + i, scratch_row + in_rows - 1, j, pixel + i * p.w.grid + j, i + 1 < count, j + 1 < p.w.grid});
    scratch_row += in_rows;
    pixel += count * p.w.grid;
    row += count;
  }
}

int64_t patches_of(const Problem& p, int64_t tile) {
  int64_t count = 0;
  each_patch(p, tile, [&](const Patch&) { ++count; });
  return count;
}

// --- prologue -----------------------------------------------------------------------------------------------------------------------

// `width` channels of a pixel from `first` on, in float.
inline void load_pixel(const Source& s, int64_t pixel, int64_t first, int64_t width, float* dst) {
  const Value* x = s.map.data + pixel * s.map.stride + first;
  if (s.scale == nullptr) {
    if (s.act.is_relu()) {
      for (int64_t c = 0; c < width; ++c) dst[c] = to_float(x[c]) <= 0.f ? 0.f : to_float(x[c]);
    } else {
      for (int64_t c = 0; c < width; ++c) dst[c] = to_float(x[c]);
      if (s.act.is_other()) activate_row(dst, width, s.act);
    }
    return;
  }
  const float* scale = s.scale + first;
  const float* shift = s.shift + first;
  if (s.q != nullptr && s.second.data != nullptr) {
    const Value* raw = s.second.data + pixel * s.second.stride + first;
    const float* q = s.q + first;
    for (int64_t c = 0; c < width; ++c) dst[c] = scale[c] * to_float(x[c]) + (q[c] * to_float(raw[c]) + shift[c]);
  } else if (s.act.is_relu()) {
    for (int64_t c = 0; c < width; ++c) {
      const float z = scale[c] * to_float(x[c]) + shift[c];
      dst[c] = z <= 0.f ? 0.f : z;  // NaN passes
    }
  } else {
    for (int64_t c = 0; c < width; ++c) dst[c] = scale[c] * to_float(x[c]) + shift[c];
    if (s.act.is_other()) activate_row(dst, width, s.act);
  }
}

#ifdef FUSEDRES_PAIRS
// The operands that models have most, a vector of channels at a time: read(c) is those of a pixel from channel `first` + c on.
struct Plain {
  const Value* x = nullptr;
  Plain() = default;
  Plain(const Source& s, int64_t pixel, int64_t first) : x(s.map.data + pixel * s.map.stride + first) {}
  vec read(int64_t c) const { return load(x + c); }
};
struct Affine : Plain {
  const float *scale = nullptr, *shift = nullptr;
  Affine() = default;
  Affine(const Source& s, int64_t pixel, int64_t first) : Plain(s, pixel, first), scale(s.scale + first), shift(s.shift + first) {}
  vec read(int64_t c) const { return load(scale + c) * load(x + c) + load(shift + c); }
};
struct AffineRelu : Affine {
  using Affine::Affine;
  vec read(int64_t c) const {
    const vec z = Affine::read(c);
    return z <= 0.f ? vec{} : z;  // NaN passes
  }
};
struct Gradient : Affine {
  const Value* raw = nullptr;
  const float* q = nullptr;
  Gradient() = default;
  Gradient(const Source& s, int64_t pixel, int64_t first) : Affine(s, pixel, first), raw(s.second.data + pixel * s.second.stride + first), q(s.q + first) {}
  vec read(int64_t c) const { return load(scale + c) * load(x + c) + (load(q + c) * load(raw + c) + load(shift + c)); }
};

// body(which of them it is), not at all for another.
template <class F>
inline void with_pending(const Source& s, F&& body) {
  if (s.act.is_other() || (s.scale == nullptr && s.act.is_relu())) return;
  if (s.scale == nullptr) return body(Plain{});
  if (s.q != nullptr && s.second.data != nullptr) return body(Gradient{});
  if (s.act.is_relu()) return body(AffineRelu{});
  body(Affine{});
}

// Units of two pixels' channels [first, first + n); `second` may be -1 for zeros. `values` has room for both.
void interleave_pixels(const Source& s, int64_t one, int64_t second, int64_t first, int64_t n, float* values, float* units) {
  int64_t c = 0;
  if (second >= 0) {
    with_pending(s, [&](auto pending) {
      using P = decltype(pending);
      const P low(s, one, first), high(s, second, first);
      for (; c + kLanes <= n; c += kLanes) store(units + c, make_units(widen(round_to_bfloat16(low.read(c))), widen(round_to_bfloat16(high.read(c)))));
    });
  }
  if (c == n) return;
  load_pixel(s, one, first + c, n - c, values);
  if (second >= 0) load_pixel(s, second, first + c, n - c, values + n);
  interleave(values, second >= 0 ? values + n : nullptr, n - c, units + c);
}
#endif

// The same as `width` units from unit `first` on.
inline void load_units_of_pixel(const Problem& p, const Source& s, int64_t pixel, int64_t first, int64_t width, float* dst) {
#ifdef FUSEDRES_PAIRS
  int64_t c = 0;
  with_pending(s, [&](auto pending) {
    using P = decltype(pending);
    const P from(s, pixel, 2 * first);
    for (; c + kLanes <= width; c += kLanes) store(dst + c, round_to_units(from.read(2 * c), from.read(2 * c + kLanes)));
  });
  constexpr int64_t kPiece = 256;
  float values[2 * kPiece];
  for (; c < width; c += kPiece) {
    const int64_t units = least(kPiece, width - c);
    load_pixel(s, pixel, 2 * (first + c), 2 * units, values);
    round_row(values, units, dst + c);
  }
#else
  load_pixel(s, pixel, first, width, dst);
#endif
}

void load_tile(const Problem& p, const Source& s, int64_t tile, Chunk chunk, float* scratch) {
  const int64_t begin = tile * p.tile_rows, end = least(p.rows(), begin + p.tile_rows);
  float* dst = scratch;
  for (int64_t row = begin; row < end;) {
    const int64_t n = row / p.h.grid, first = row % p.h.grid;
    const int64_t count = least(end - row, p.h.grid - first);
    const int64_t in_rows = p.h.scratch_size(count);
    for (int64_t i = 0; i < in_rows; ++i) {
      const int64_t y = p.h.source(first, i);
      if (y < 0 || y >= p.h.src_size) {
        std::memset(dst, 0, p.scratch_w * chunk.width * sizeof(float));
        dst += p.scratch_w * chunk.width;
        continue;
      }
      const int64_t line = (n * p.h.src_size + y) * p.w.src_size;
      for (int64_t j = 0; j < p.scratch_w; ++j, dst += chunk.width) {
        const int64_t x = p.w.source(0, j);
        if (x < 0 || x >= p.w.src_size) {
          for (int64_t c = 0; c < chunk.width; ++c) dst[c] = 0.f;
        } else {
          load_units_of_pixel(p, s, line + x, chunk.first, chunk.width, dst);
        }
      }
    }
    row += count;
  }
}

// The loaded scratch of a tile, transformed: positions `step` floats apart, patches `width`.
void transform_input(const Problem& p, int64_t tile, const float* scratch, int64_t width, float* to, int64_t step) {
  each_patch(p, tile, [&](const Patch& patch) {
    const float* source[4][4];
    for (int i = 0; i < 4; ++i)
      for (int j = 0; j < 4; ++j)
        source[i][j] = scratch + (least(patch.row + i, patch.last_row) * p.scratch_w + least(patch.column + j, p.scratch_w - 1)) * width;
    for (int64_t c = 0; c < width; c += kLanes) {
      vec d[4][4], v[4][4];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) d[i / 4][i % 4] = load(source[i / 4][i % 4] + c);
      both_axes(d, v, input_line);
      store_positions(v, to + patch.index * width + c, step);
    }
  });
}

// The products of a tile, transformed back to its pixels.
void transform_output(const Problem& p, int64_t tile, const float* from, int64_t width, int64_t step, float* c, int64_t ldc) {
  each_patch(p, tile, [&](const Patch& patch) {
    float* to = c + patch.pixel * ldc;
    for (int64_t n = 0; n < width; n += kLanes) {
      vec m[4][4], y[2][2];
      load_positions(from + patch.index * width + n, step, m);
      both_axes(m, y, output_line);
      store(to + n, y[0][0]);
      if (patch.second_column) store(to + ldc + n, y[0][1]);
      if (patch.second_row) {
        store(to + p.w.grid * ldc + n, y[1][0]);
        if (patch.second_column) store(to + (p.w.grid + 1) * ldc + n, y[1][1]);
      }
    }
  });
}

// The output gradients of a tile (rows of `width`), transformed for the weight gradient.
void transform_gradient(const Problem& p, int64_t tile, const float* gradient, int64_t width, float* to, int64_t step) {
  each_patch(p, tile, [&](const Patch& patch) {
    const float* from = gradient + patch.pixel * width;
    for (int64_t n = 0; n < width; n += kLanes) {
      vec dy[2][2] = {}, v[4][4];
      dy[0][0] = load(from + n);
      if (patch.second_column) dy[0][1] = load(from + width + n);
      if (patch.second_row) {
        dy[1][0] = load(from + p.w.grid * width + n);
        if (patch.second_column) dy[1][1] = load(from + (p.w.grid + 1) * width + n);
      }
      both_axes(dy, v, gradient_line);
      store_positions(v, to + patch.index * width + n, step);
    }
  });
}

// Between positions: their distance in cache is no power of two, which would put all 16 into the same few sets.
int64_t position_step(int64_t patches, int64_t width) { return patches * width + kLanes; }

// Consecutive columns of the kernel are consecutive in the scratch: they make one deep segment.
int make_segments(const Problem& p, Chunk chunk, int64_t deepest, Segment* segments) {
  int count = 0;
  const bool merged = p.w.consecutive();
  const int64_t columns = merged ? 1 : p.w.taps;
  const int64_t run = merged ? p.w.taps * chunk.width : chunk.width;
  for (int i = 0; i < p.h.taps; ++i) {
    for (int64_t j = 0; j < columns; ++j) {
      const int64_t offset = (p.h.shift(i) * p.scratch_w + p.w.shift(static_cast<int>(j))) * chunk.width;
      const int64_t row = chunk.row + (int64_t(i) * p.w.taps + j) * chunk.width;
      const int64_t parts = div_up(run, deepest), part = div_up(run, parts);
      for (int64_t k = 0; k < run; k += part) segments[count++] = {offset + k, least(part, run - k), row + k};
    }
  }
  return count;
}

constexpr int kMaxSegments = kMaxTaps * kMaxTaps * 4 + 64;

// --- packed weights -----------------------------------------------------------------------------------------------------------------

// Panels of kPanel destination channels; within a panel the rows follow make_segments: chunk, kernel row, kernel column, channel. The
// last panel is padded with zeros to whole vectors. `source_stride` and `destination_stride` are those of the weight's two channels.
int64_t panel_width(int64_t dst_c, int64_t panel) { return round_up(least(kPanel, dst_c - panel * kPanel), kLanes); }

// The unit whose numbers lie `stride` apart.
inline float unit_at(const float* p, int64_t) { return *p; }

// Units side by side, whose numbers lie `stride` apart.
inline void pack_row(const float* src, int64_t, int64_t n, float* dst) { std::memcpy(dst, src, n * sizeof(float)); }

#ifdef FUSEDRES_PAIRS
inline float unit_at(const Bfloat16* p, int64_t stride) { return make_unit(p[0], p[stride]); }

inline void pack_row(const Bfloat16* src, int64_t stride, int64_t n, float* dst) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(dst + i, make_units(widen(src + i), widen(src + stride + i)));
  for (; i < n; ++i) dst[i] = make_unit(src[i], src[stride + i]);
}
#endif

// dst[j][i] = src[i][j] for kLanes x kLanes units. What lies some lines ahead in each row is asked for: as many rows at once are beyond what the
// hardware foresees.
inline void transpose_ahead(const Value* src, int64_t src_stride, float* dst, int64_t dst_stride) {
  transpose(
      [&](int i) {
        __builtin_prefetch(src + i * src_stride + 256 / sizeof(Value), 0, 2);
        return load_units(src + i * src_stride);
      },
      [&](int j, vec column) { store(dst + j * dst_stride, column); });
}

void pack_panel(const Problem& p, const Weight& w, int64_t source_stride, int64_t destination_stride, int64_t panel, float* packed) {
  const int64_t first = panel * kPanel, width = panel_width(p.dst_c, panel), valid = least(width, p.dst_c - first);
  float* dst = packed + first * p.depth();
  for (int64_t k = 0; k < p.chunks(); ++k) {
    const Chunk chunk = p.chunk_at(k);
    for (int i = 0; i < p.h.taps; ++i) {
      for (int j = 0; j < p.w.taps; ++j, dst += chunk.width * width) {
        const Value* src = w.data + p.h.kernel[i] * w.sh + p.w.kernel[j] * w.sw + p.per_unit * chunk.first * source_stride + first * destination_stride;
        if (valid < width) std::memset(dst, 0, chunk.width * width * sizeof(float));
        if (destination_stride == 1) {
          for (int64_t c = 0; c < chunk.width; ++c) pack_row(src + p.per_unit * c * source_stride, source_stride, valid, dst + c * width);
        } else {
          int64_t c = 0;
          if (source_stride == 1) {
            c = chunk.width / kLanes * kLanes;
            const int64_t whole = valid / kLanes * kLanes;
            // 16 rows from end to end before the next 16: memory is read in long runs
            for (int64_t n = 0; n < whole; n += kLanes)
              for (int64_t k = 0; k < c; k += kLanes) transpose_ahead(src + n * destination_stride + p.per_unit * k, destination_stride, dst + k * width + n, width);
            for (int64_t n = whole; n < valid; ++n)
              for (int64_t k = 0; k < c; ++k) dst[k * width + n] = unit_at(src + n * destination_stride + p.per_unit * k, 1);
          }
          for (; c < chunk.width; ++c)
            for (int64_t n = 0; n < valid; ++n) dst[c * width + n] = unit_at(src + n * destination_stride + p.per_unit * c * source_stride, source_stride);
        }
      }
    }
  }
}

// As pack_panel, for Winograd: within a panel the rows are chunk, position, channel. src_c is a multiple of kLanes.
template <class Of>
void pack_winograd(const Problem& p, const Of& w, int64_t source_stride, int64_t destination_stride, int64_t panel, float* packed) {
  const int64_t first = panel * kPanel, width = panel_width(p.dst_c, panel), valid = least(width, p.dst_c - first);
  float* dst = packed + first * p.depth();
  for (int64_t k = 0; k < p.chunks(); ++k) {
    const Chunk chunk = p.chunk_at(k);
    for (int64_t n0 = 0; n0 < width; n0 += kLanes) {
      for (int64_t c0 = 0; c0 < chunk.width; c0 += kLanes) {
        float taps[9][kLanes][kLanes] = {};
        const int64_t columns = least(kLanes, valid - n0);
        for (int t = 0; t < 9; ++t) {
          const auto* src = w.data + p.h.kernel[t / 3] * w.sh + p.w.kernel[t % 3] * w.sw + (chunk.first + c0) * source_stride + (first + n0) * destination_stride;
          if (source_stride == 1 && columns == kLanes) {
            transpose_ahead(src, destination_stride, taps[t][0], kLanes);
          } else {
            for (int64_t c = 0; c < kLanes; ++c)
              for (int64_t n = 0; n < columns; ++n) taps[t][c][n] = src[c * source_stride + n * destination_stride];
          }
        }
        for (int64_t c = 0; c < kLanes; ++c) {
          vec g[3][3], u[4][4];
#pragma GCC unroll 9
          for (int t = 0; t < 9; ++t) g[t / 3][t % 3] = load(taps[t][c]);
          both_axes(g, u, weight_line);
          store_positions(u, dst + (c0 + c) * width + n0, chunk.width * width);
        }
      }
    }
    dst += kPositions * chunk.width * width;
  }
}

template <class Of>
void pack_weights(const Problem& p, const Of& w, int64_t source_stride, int64_t destination_stride, float* packed, Parallel parallel) {
  run_parallel(parallel, div_up(p.dst_c, kPanel), p.dst_c * p.depth(), [&](int64_t panel) {
    if constexpr (!kPairs)
      if (p.winograd) return pack_winograd(p, w, source_stride, destination_stride, panel, packed);
    pack_panel(p, w, source_stride, destination_stride, panel, packed);
  });
}

// --- register kernels ---------------------------------------------------------------------------------------------------------------

// c[R x V vectors] (+)= a[R rows of `depth`] * b[depth x V vectors], `ldb` floats a row. The sum starts at zero and joins c at the end: one chain of additions
// over all segments would round worse.
template <int R, int V>
__attribute__((noinline)) void multiply(const float* scratch, const int64_t* base, const float* b, int64_t ldb, int64_t depth, float* c, int64_t ldc, bool first) {
  vec acc[R][V];
  const float* a[R];
  for (int i = 0; i < R; ++i) {
    a[i] = scratch + base[i];
    for (int j = 0; j < V; ++j) acc[i][j] = vec{};
  }
  for (int64_t k = 0; k < depth; ++k) {
    vec weights[V];
#pragma GCC unroll 4
    for (int j = 0; j < V; ++j) weights[j] = load(b + k * ldb + j * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i) {
      const float value = a[i][k];
#pragma GCC unroll 4
      for (int j = 0; j < V; ++j) acc[i][j] = multiply_add(acc[i][j], value, weights[j]);
    }
  }
  for (int i = 0; i < R; ++i)
    for (int j = 0; j < V; ++j) store(c + i * ldc + j * kLanes, first ? acc[i][j] : acc[i][j] + load(c + i * ldc + j * kLanes));
}

using Multiply = void (*)(const float*, const int64_t*, const float*, int64_t, int64_t, float*, int64_t, bool);

// c[R x V vectors] (+)= sum over pixels of a[pixel][R consecutive channels] * g[pixel][V vectors], as in multiply; both have a base per pixel.
template <int R, int V>
__attribute__((noinline)) void outer(const float* a, const int64_t* a_base, const float* g, const int64_t* g_base, int64_t pixels, float* c, int64_t ldc, bool first) {
  vec acc[R][V];
  for (int i = 0; i < R; ++i)
    for (int j = 0; j < V; ++j) acc[i][j] = vec{};
  for (int64_t m = 0; m < pixels; ++m) {
    const float* from = a + a_base[m];
    const float* other = g + g_base[m];
    vec values[V];
#pragma GCC unroll 4
    for (int j = 0; j < V; ++j) values[j] = load(other + j * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i) {
      const float value = from[i];
#pragma GCC unroll 4
      for (int j = 0; j < V; ++j) acc[i][j] = multiply_add(acc[i][j], value, values[j]);
    }
  }
  for (int i = 0; i < R; ++i)
    for (int j = 0; j < V; ++j) store(c + i * ldc + j * kLanes, first ? acc[i][j] : acc[i][j] + load(c + i * ldc + j * kLanes));
}

using Outer = void (*)(const float*, const int64_t*, const float*, const int64_t*, int64_t, float*, int64_t, bool);

// A stretch of a product's depth: where it begins, from a pixel's base and from the weight's row or column.
struct Run {
  int64_t operand, weight, depth;
};

inline float total(vec v) {
  float lanes[kLanes];
  store(lanes, v);
  for (int step = kLanes / 2; step > 0; step /= 2)
    for (int i = 0; i < step; ++i) lanes[i] += lanes[i + step];
  return lanes[0];
}

// c[R pixels x O outputs] = the products of their rows along `runs`, whose depths are whole vectors: the weight's row of an output is read from
// end to end.
template <int R, int O>
__attribute__((noinline)) void dots(const float* scratch, const int64_t* base, const float* w, int64_t ldw, const Run* runs, int count, float* c, int64_t ldc) {
  vec acc[R][O];
  for (int i = 0; i < R; ++i)
    for (int j = 0; j < O; ++j) acc[i][j] = vec{};
  for (int run = 0; run < count; ++run) {
    const float* a = scratch + runs[run].operand;
    const float* b = w + runs[run].weight;
    for (int64_t k = 0; k < runs[run].depth; k += kLanes) {
      vec weights[O];
#pragma GCC unroll 4
      for (int j = 0; j < O; ++j) weights[j] = load(b + j * ldw + k);
#pragma GCC unroll 8
      for (int i = 0; i < R; ++i) {
        const vec value = load(a + base[i] + k);
#pragma GCC unroll 4
        for (int j = 0; j < O; ++j) acc[i][j] += value * weights[j];
      }
    }
  }
  for (int i = 0; i < R; ++i)
    for (int j = 0; j < O; ++j) c[i * ldc + j] = total(acc[i][j]);
}

using Dots = void (*)(const float*, const int64_t*, const float*, int64_t, const Run*, int, float*, int64_t);

struct Kernels {
  Multiply multiply[kPanelVectors + 1][kMaxRows + 1];
  Outer outer[kPanelVectors + 1][kMaxRows + 1];
  Dots dots[kDotOutputs + 1][kDotPixels + 1];
};

template <int V, int R>
struct Fill {
  static void into(Kernels& k) {
    k.multiply[V][R] = multiply<R, V>;
    k.outer[V][R] = outer<R, V>;
    Fill<V, R - 1>::into(k);
  }
};
template <int V>
struct Fill<V, 0> {
  static void into(Kernels&) {}
};

template <int R>
struct FillDots {
  static void into(Kernels& k) {
    k.dots[1][R] = dots<R, 1>;
    k.dots[kDotOutputs][R] = dots<R, kDotOutputs>;
    FillDots<R - 1>::into(k);
  }
};
template <>
struct FillDots<0> {
  static void into(Kernels&) {}
};

Kernels make_kernels() {
  Kernels k{};
  Fill<1, rows_for(1)>::into(k);
  Fill<2, rows_for(2)>::into(k);
#ifndef FUSEDRES_SIXTEEN_REGISTERS
  Fill<3, rows_for(3)>::into(k);
  Fill<4, rows_for(4)>::into(k);
#endif
  FillDots<kDotPixels>::into(k);
  return k;
}

const Kernels& kernels() {
  static const Kernels table = make_kernels();
  return table;
}

// Splits `total` into the fewest blocks of at most `limit`, as even as can be: a last block of one row would run at a sixth of the rate.
inline int64_t even_block(int64_t total, int64_t limit) { return div_up(total, div_up(total, limit)); }

// --- prefetch -----------------------------------------------------------------------------------------------------------------------

// Lines of maps that will be needed soon, asked for a few at a time between register kernels, so that memory works while the FMA units do.
struct Prefetch {
  struct Range {
    const char* data;
    int64_t stride, pixels, lines;  // stride in bytes; lines: of a pixel
  };
  Range ranges[4];
  int count = 0, current = 0;
  int64_t pixel = 0, line = 0, total = 0;

  // Channels [first, first + width) of pixels [begin, end).
  void add(const Map& map, int64_t begin, int64_t end, int64_t first, int64_t width) {
    if (map.data == nullptr || end <= begin) return;
    constexpr int64_t kSize = sizeof(Value), kPerLine = 64 / kSize;
    const char* data = reinterpret_cast<const char*>(map.data + begin * map.stride + first);
    // whole pixels are one long run
    Range range = width == map.stride ? Range{data, 0, 1, div_up((end - begin) * width, kPerLine)} : Range{data, map.stride * kSize, end - begin, div_up(width, kPerLine)};
    ranges[count++] = range;
    total += range.pixels * range.lines;
  }
  void issue(int64_t lines) {
    while (lines > 0 && current < count) {
      const Range& r = ranges[current];
      const char* data = r.data + pixel * r.stride + line * 64;
      const int64_t now = least(lines, r.lines - line);
      for (int64_t i = 0; i < now; ++i) __builtin_prefetch(data + i * 64, 0, 2);
      lines -= now;
      line += now;
      if (line < r.lines) continue;
      line = 0;
      if (++pixel < r.pixels) continue;
      pixel = 0;
      ++current;
    }
  }
};

// The source pixels that tile `tile` loads, as one range: a tile's rows are consecutive, also across images.
void prefetch_tile(const Problem& p, const Source& s, int64_t tile, Chunk chunk, Prefetch* prefetch) {
  if (tile >= p.tiles) return;
  const int64_t begin = tile * p.tile_rows, end = least(p.rows(), begin + p.tile_rows) - 1;
  const auto line = [&](int64_t row, int64_t offset) {
    const int64_t y = row % p.h.grid * p.h.step + offset;
    return (row / p.h.grid * p.h.src_size + most(0, least(p.h.src_size, y))) * p.w.src_size;
  };
  const int64_t from = line(begin, p.h.low), to = line(end, p.h.low + p.h.span);
  prefetch->add(s.map, from, to, p.per_unit * chunk.first, p.per_unit * chunk.width);
  if (s.q != nullptr) prefetch->add(s.second, from, to, p.per_unit * chunk.first, p.per_unit * chunk.width);
}

// --- the product of a tile ----------------------------------------------------------------------------------------------------------

// Chunk `k` of a tile's product by Winograd's algorithm: products of all positions add up over the chunks, and the last one writes c.
void multiply_winograd(const Problem& p, int64_t tile, int64_t k, const float* scratch, const float* packed, int64_t first_panel, int64_t last_panel, float* c, int64_t ldc, Prefetch* prefetch) {
  const Chunk chunk = p.chunk_at(k);
  const int64_t patches = patches_of(p, tile), step = position_step(patches, chunk.width);
  float* transformed = scratch_v.get(kPositions * step);
  transform_input(p, tile, scratch, chunk.width, transformed, step);
  int64_t* base = scratch_base.get(patches);
  for (int64_t i = 0; i < patches; ++i) base[i] = i * chunk.width;
  // with a single chunk, one panel's products at a time
  const bool single = p.chunks() == 1, last = k + 1 == p.chunks();
  const int64_t room = kPositions * position_step(patches, kPanel);
  float* products = scratch_m.get(single ? room : room * (last_panel - first_panel));
  const int64_t calls = (last_panel - first_panel) * kPositions * div_up(patches, rows_for(kPanelVectors)), lines = div_up(prefetch->total, calls);
  for (int64_t panel = first_panel; panel < last_panel; ++panel) {
    const int64_t width = panel_width(p.dst_c, panel), product_step = position_step(patches, width);
    const int vectors = static_cast<int>(width / kLanes);
    const float* weights = packed + panel * kPanel * p.depth() + chunk.row * width;
    float* product = products + (single ? 0 : (panel - first_panel) * room);
    const int64_t block = even_block(patches, rows_for(vectors));
    for (int position = 0; position < kPositions; ++position) {
      for (int64_t m = 0; m < patches; m += block) {
        kernels().multiply[vectors][least(block, patches - m)](transformed + position * step, base + m, weights + position * chunk.width * width,
                                                               width, chunk.width, product + position * product_step + m * width, width, k == 0);
        prefetch->issue(lines);
      }
    }
    if (last) transform_output(p, tile, product, width, product_step, c + (panel - first_panel) * kPanel, ldc);
  }
}

// c[pixels x (last - first) panels] = operand * weights; c has `ldc` floats a row and starts at panel `first_panel`. `epilogue(where, &prefetch)`
// may name what the epilogue of this tile will read.
template <class F>
void multiply_tile(const Problem& p, const Source& s, int64_t tile, const float* packed, int64_t first_panel, int64_t last_panel, float* c, int64_t ldc, Tile* where, F&& epilogue) {
  Segment segments[kMaxSegments];
  if (p.chunks() == 0) {
    *where = locate(p, tile, 1);
    for (int64_t m = 0; m < where->pixels; ++m) std::memset(c + m * ldc, 0, (least(last_panel * kPanel, round_up(p.dst_c, kLanes)) - first_panel * kPanel) * sizeof(float));
    return;
  }
  // where nothing is pending and nothing padded, the map itself is the operand
  const bool plain = s.scale == nullptr && s.act.kind == Act::none && s.map.stride % p.per_unit == 0;
  const Source* in_place = plain && p.one_to_one() ? &s : nullptr;
  float* loaded = in_place ? nullptr : scratch_a.get(p.scratch_pixels * p.chunk);
  for (int64_t k = 0; k < p.chunks(); ++k) {
    const Chunk chunk = p.chunk_at(k);
    if (!in_place) load_tile(p, s, tile, chunk, loaded);
    const float* scratch = in_place ? reinterpret_cast<const float*>(s.map.data) + chunk.first : loaded;
    *where = locate(p, tile, chunk.width, in_place);
    Prefetch prefetch;
    const bool last = k + 1 == p.chunks();
    if (last) epilogue(*where, &prefetch);
    prefetch_tile(p, s, last ? tile + 1 : tile, p.chunk_at(last ? 0 : k + 1), &prefetch);
    if (p.winograd) {
      multiply_winograd(p, tile, k, scratch, packed, first_panel, last_panel, c, ldc, &prefetch);
      continue;
    }
    const int count = make_segments(p, chunk, kSegment, segments);
    const int64_t calls = (last_panel - first_panel) * count * div_up(where->pixels, rows_for(kPanelVectors)), lines = div_up(prefetch.total, calls);
    for (int64_t panel = first_panel; panel < last_panel; ++panel) {
      const int64_t width = panel_width(p.dst_c, panel);
      const int vectors = static_cast<int>(width / kLanes);
      const float* weights = packed + panel * kPanel * p.depth();
      const int64_t block = even_block(where->pixels, rows_for(vectors));
      for (int i = 0; i < count; ++i) {
        const bool first = k == 0 && i == 0;
        for (int64_t m = 0; m < where->pixels; m += block) {
          const int64_t rows = least(block, where->pixels - m);
          kernels().multiply[vectors][rows](scratch + segments[i].offset, where->base + m, weights + segments[i].row * width, width, segments[i].depth,
                                            c + m * ldc + (panel - first_panel) * kPanel, ldc, first);
          prefetch.issue(lines);
        }
      }
    }
  }
}

// How the destination's panels are divided: enough tasks for many threads, a product that fits beside the scratch.
int64_t panels_per_task(const Problem& p) {
  const int64_t panels = div_up(p.dst_c, kPanel);
  const int64_t wanted = div_up(16, p.tiles);
  const int64_t each = p.winograd && p.chunks() > 1 ? 4 : 1;  // products of all positions live side by side
  const int64_t fit = most(1, 2 * kScratchFloats / (p.tile_pixels * kPanel * each));
  return most(1, least(fit, div_up(panels, wanted)));
}

// --- few pixels ---------------------------------------------------------------------------------------------------------------------

// The operand of a problem that plan_few took: loaded, or the source map itself where nothing is pending and nothing padded.
inline const float* load_whole(const Problem& p, const Source& s, Tile* where) {
  const Source* in_place = s.scale == nullptr && s.act.kind == Act::none && p.one_to_one() ? &s : nullptr;
  *where = locate(p, 0, p.src_c, in_place);
  if (in_place) return reinterpret_cast<const float*>(s.map.data);
  float* loaded = scratch_a.get(p.scratch_pixels * p.src_c);
  load_tile(p, s, 0, p.chunk_at(0), loaded);
  return loaded;
}

// The taps, as a weight lies. For the operand's channels side by side in it, a row of consecutive taps is one run where they are so, too.
inline int make_runs(const Problem& p, const Weight& w, bool side_by_side, Run* runs) {
  int count = 0;
  const bool merged = side_by_side && p.w.consecutive() && w.sw == p.src_c && p.w.kernel[0] == 0;
  const int columns = merged ? 1 : p.w.taps;
  for (int i = 0; i < p.h.taps; ++i)
    for (int j = 0; j < columns; ++j)
      runs[count++] = {(p.h.shift(i) * p.scratch_w + p.w.shift(j)) * p.src_c, p.h.kernel[i] * w.sh + p.w.kernel[j] * w.sw, merged ? p.w.taps * p.src_c : p.src_c};
  return count;
}

constexpr int kMaxRuns = kMaxTaps * kMaxTaps;

// How many of `channels` a task takes: enough tasks for many threads, each a multiple of `multiple`.
int64_t few_per_task(int64_t channels, int64_t multiple) { return round_up(div_up(channels, 16), multiple); }

// --- statistics ---------------------------------------------------------------------------------------------------------------------

// Mean and sum of squared deviations of `rows` rows: two visits of values that are in cache, several vectors at once, because one chain of
// additions would wait for itself.
template <int V>
void stats_block(const float* c, int64_t ldc, int64_t rows, float* mean, float* m2) {
  const float inverse = 1.f / static_cast<float>(rows);
  vec average[V], squares[V];
  for (int j = 0; j < V; ++j) average[j] = squares[j] = vec{};
  for (int64_t m = 0; m < rows; ++m)
    for (int j = 0; j < V; ++j) average[j] += load(c + m * ldc + j * kLanes);
  for (int j = 0; j < V; ++j) average[j] *= inverse;
  for (int64_t m = 0; m < rows; ++m) {
    for (int j = 0; j < V; ++j) {
      const vec d = load(c + m * ldc + j * kLanes) - average[j];
      squares[j] += d * d;
    }
  }
  for (int j = 0; j < V; ++j) {
    store(mean + j * kLanes, average[j]);
    store(m2 + j * kLanes, squares[j]);
  }
}

void column_stats(const float* c, int64_t ldc, int64_t rows, int64_t columns, float* mean, float* m2) {
  int64_t n = 0;
  for (; n + 4 * kLanes <= columns; n += 4 * kLanes) stats_block<4>(c + n, ldc, rows, mean + n, m2 + n);
  for (; n + kLanes <= columns; n += kLanes) stats_block<1>(c + n, ldc, rows, mean + n, m2 + n);
  for (; n < columns; ++n) {
    float sum = 0.f, squares = 0.f;
    for (int64_t m = 0; m < rows; ++m) sum += c[m * ldc + n];
    const float average = sum / static_cast<float>(rows);
    for (int64_t m = 0; m < rows; ++m) {
      const float d = c[m * ldc + n] - average;
      squares += d * d;
    }
    mean[n] = average;
    m2[n] = squares;
  }
}

int64_t pixels_of(const Problem& p, int64_t tile) { return (least(p.rows(), (tile + 1) * p.tile_rows) - tile * p.tile_rows) * p.w.grid; }

// Chan, Golub and LeVeque (1983): merge (count, mean, M2) of the tiles, in order.
void merge_stats(const Problem& p, const float* partial, float* mean, float* m2, Parallel parallel) {
  const int64_t channels = p.dst_c, blocks = div_up(channels, 64);
  run_parallel(parallel, blocks, p.tiles * channels, [&](int64_t b) {
    for (int64_t n = b * 64; n < least(channels, b * 64 + 64); ++n) {
      double count = 0, average = 0, squares = 0;
      for (int64_t t = 0; t < p.tiles; ++t) {
        const double extra = static_cast<double>(pixels_of(p, t)), total = count + extra;
        const double delta = partial[t * 2 * channels + n] - average;
        average += delta * extra / total;
        squares += partial[(t * 2 + 1) * channels + n] + delta * delta * count * extra / total;
        count = total;
      }
      mean[n] = static_cast<float>(average);
      m2[n] = static_cast<float>(squares);
    }
  });
}

// --- forward ------------------------------------------------------------------------------------------------------------------------

template <bool kAffine, bool kResidual, bool kResidualAffine>
void finish_rows(const ForwardArgs& a, const Tile& where, int64_t first, int64_t columns, float* c, int64_t ldc) {
  const float* scale = kAffine ? a.out_scale + first : nullptr;
  const float* shift = kAffine ? a.out_shift + first : nullptr;
  const float* residual_scale = kResidualAffine ? a.residual_scale + first : nullptr;
  const float* residual_shift = kResidualAffine ? a.residual_shift + first : nullptr;
  const float floor = a.out_act.is_relu() ? 0.f : -__builtin_inff();
  for (int64_t m = 0; m < where.pixels; ++m) {
    float* v = c + m * ldc;
    const Value* r = kResidual ? a.residual.data + where.pixel[m] * a.residual.stride + first : nullptr;
    for (int64_t n = 0; n < columns; ++n) {
      float value = kAffine ? scale[n] * v[n] + shift[n] : v[n];
      if (kResidual) value += kResidualAffine ? residual_scale[n] * to_float(r[n]) + residual_shift[n] : to_float(r[n]);
      v[n] = value <= floor ? floor : value;  // NaN passes
    }
    if (a.out_act.is_other()) activate_row(v, columns, a.out_act);
  }
}

// The epilogue of a tile, in place.
void finish_forward(const ForwardArgs& a, const Tile& where, int64_t first, int64_t columns, float* c, int64_t ldc) {
  if (a.bias != nullptr)
    for (int64_t m = 0; m < where.pixels; ++m)
      for (int64_t n = 0; n < columns; ++n) c[m * ldc + n] += to_float(a.bias[first + n]);
  const bool residual = a.residual.data != nullptr;
  if (a.out_scale != nullptr) {
    (!residual ? finish_rows<true, false, false> : a.residual_scale ? finish_rows<true, true, true> : finish_rows<true, true, false>)(a, where, first, columns, c, ldc);
  } else if (residual || a.out_act.kind != Act::none) {
    (!residual ? finish_rows<false, false, false> : a.residual_scale ? finish_rows<false, true, true> : finish_rows<false, true, false>)(a, where, first, columns, c, ldc);
  }
}

// A finished tile's way to the output, whose pixels lie side by side, and the statistics of what is stored there.
#ifdef FUSEDRES_PAIRS
// The product is read once; the second visit of the statistics is to the output, which is half as large.
template <int V>
void write_block(const float* c, int64_t ldc, int64_t rows, Value* out, int64_t stride, float* mean, float* m2) {
  const float inverse = 1.f / static_cast<float>(rows);
  vec average[V], squares[V];
  for (int j = 0; j < V; ++j) average[j] = squares[j] = vec{};
  for (int64_t m = 0; m < rows; ++m) {
    for (int j = 0; j < V; ++j) {
      const __m256i rounded = round_to_bfloat16(load(c + m * ldc + j * kLanes));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + m * stride + j * kLanes), rounded);
      average[j] += reinterpret<vec>(widen(rounded) << 16);
    }
  }
  for (int j = 0; j < V; ++j) average[j] *= inverse;
  for (int64_t m = 0; m < rows; ++m) {
    for (int j = 0; j < V; ++j) {
      const vec d = load(out + m * stride + j * kLanes) - average[j];
      squares[j] += d * d;
    }
  }
  for (int j = 0; j < V; ++j) {
    store(mean + j * kLanes, average[j]);
    store(m2 + j * kLanes, squares[j]);
  }
}

void write_tile(const ForwardArgs& a, const Tile& where, int64_t first, int64_t columns, float* c, int64_t ldc, bool, float* mean, float* m2) {
  const int64_t rows = where.pixels, stride = a.out.stride;
  Value* out = a.out.data + where.pixel[0] * stride + first;
  int64_t n = 0;
  if (mean != nullptr) {
    for (; n + 4 * kLanes <= columns; n += 4 * kLanes) write_block<4>(c + n, ldc, rows, out + n, stride, mean + n, m2 + n);
    for (; n + kLanes <= columns; n += kLanes) write_block<1>(c + n, ldc, rows, out + n, stride, mean + n, m2 + n);
  }
  for (int64_t m = 0; m < rows; ++m) {
    float* from = c + m * ldc;
    Value* to = out + m * stride;
    int64_t i = n;
    for (; i + kLanes <= columns; i += kLanes) store(to + i, load(from + i));
    for (; i < columns; ++i) {
      put(to + i, from[i]);
      from[i] = to_float(to[i]);
    }
  }
  if (mean != nullptr) column_stats(c + n, ldc, rows, columns - n, mean + n, m2 + n);
}
#else
void write_tile(const ForwardArgs& a, const Tile& where, int64_t first, int64_t columns, float* c, int64_t ldc, bool in_place, float* mean, float* m2) {
  if (!in_place)
    for (int64_t m = 0; m < where.pixels; ++m) std::memcpy(a.out.data + where.pixel[m] * a.out.stride + first, c + m * ldc, columns * sizeof(float));
  if (mean != nullptr) column_stats(c, ldc, where.pixels, columns, mean, m2);
}
#endif

template <class Args>
void forward_few(const Args& a, const Problem& p, Parallel parallel) {
  Run runs[kMaxRuns];
  const int count = make_runs(p, a.weight, true, runs);
  const int64_t each = few_per_task(p.dst_c, kDotOutputs);
  run_parallel(parallel, div_up(p.dst_c, each), p.dst_c * p.depth(), [&](int64_t task) {
    const int64_t first = task * each, columns = least(each, p.dst_c - first), ldc = a.out.stride;
    Tile where;
    const float* operand = load_whole(p, a.x, &where);
    const int64_t block = even_block(where.pixels, kDotPixels);
    float* c = a.out.data + first;
    for (int64_t n = 0; n < columns;) {
      const int64_t outputs = columns - n >= kDotOutputs ? kDotOutputs : 1;
      for (int64_t m = 0; m < where.pixels; m += block)
        kernels().dots[outputs][least(block, where.pixels - m)](operand, where.base + m, a.weight.data + (first + n) * a.weight.so, a.weight.so, runs, count, c + m * ldc + n, ldc);
      n += outputs;
    }
    finish_forward(a, where, first, columns, c, ldc);
    if (a.mean != nullptr) column_stats(c, ldc, where.pixels, columns, a.mean + first, a.m2 + first);
  });
}

template <class Args>
void forward(const Args& a, Parallel parallel) {
  const Geometry2d& g = a.g;
  Problem p{forward_axis(g.in_h, g.out_h, g.kernel_h, g.stride_h, g.pad_h, g.dilation_h),
            forward_axis(g.in_w, g.out_w, g.kernel_w, g.stride_w, g.pad_w, g.dilation_w),
            g.batch, g.in_c / kChannelsPerUnit, g.out_c, g.out_h, g.out_w, kChannelsPerUnit};
  if constexpr (!kPairs)
    if (p.plan_few(a.weight, g.in_c, kFewerPixels)) return forward_few(a, p, parallel);
  p.plan();
  const int64_t panels = div_up(p.dst_c, kPanel), each = panels_per_task(p), parts = div_up(panels, each);
  float* weights = packed_weights.get(round_up(p.dst_c, kLanes) * p.depth());
  pack_weights(p, a.weight, a.weight.si, a.weight.so, weights, parallel);
  float* stats = a.mean == nullptr ? nullptr : partial_sums.get(p.tiles * 2 * p.dst_c);
  const bool in_place = !kPairs && p.dst_c % kLanes == 0;
  run_parallel(parallel, p.tiles * parts, p.rows() * p.w.grid * p.dst_c * 8, [&](int64_t task) {
    const int64_t tile = task / parts, begin = task % parts * each, end = least(panels, begin + each);
    const int64_t first = begin * kPanel, columns = least(p.dst_c, end * kPanel) - first;
    const int64_t ldc = in_place ? a.out.stride : round_up(columns, kLanes);
    // output pixels of a tile are consecutive rows of the map
    float* c = in_place ? reinterpret_cast<float*>(a.out.data) + tile * p.tile_pixels * a.out.stride + first : scratch_c.get(p.tile_pixels * ldc);
    Tile where;
    multiply_tile(p, a.x, tile, weights, begin, end, c, ldc, &where, [&](const Tile& t, Prefetch* prefetch) {
      prefetch->add(a.residual, t.pixel[0], t.pixel[t.pixels - 1] + 1, first, columns);
    });
    finish_forward(a, where, first, columns, c, ldc);
    float* own = stats == nullptr ? nullptr : stats + tile * 2 * p.dst_c + first;
    write_tile(a, where, first, columns, c, ldc, in_place, own, own == nullptr ? nullptr : own + p.dst_c);
  });
  if (stats != nullptr) merge_stats(p, stats, a.mean, a.m2, parallel);
}

// --- input gradient -----------------------------------------------------------------------------------------------------------------

// The epilogue of `R` pixels over all columns: rows are read along memory, and per-channel vectors once for all R. The sums of the tile
// accumulate in place, without the factor invstd.
template <int R, bool kMask, bool kSums, bool kOld, bool kScaled>
void dgrad_rows(const DgradArgs& a, const int64_t* pixel, int64_t first, int64_t columns, const float* c, int64_t ldc, float* sum_dz, float* sum_dz_xhat) {
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
    vec s0 = kSums ? load(sum_dz + n) : vec{}, s1 = kSums ? load(sum_dz_xhat + n) : vec{};
    const vec gamma = kMask || kScaled ? load(scale + n) : vec{}, beta = kMask ? load(shift + n) : vec{}, center = kSums ? load(mean + n) : vec{};
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
      store(sum_dz + n, s0);
      store(sum_dz_xhat + n, s1);
    }
  }
  for (; n < columns; ++n) {
    for (int i = 0; i < R; ++i) {
      float dz = c[i * ldc + n];
      if (kMask && scale[n] * to_float(x[i][n]) + shift[n] <= 0.f) dz = 0.f;
      if (kSums) {
        sum_dz[n] += dz;
        sum_dz_xhat[n] += dz * (to_float(x[i][n]) - mean[n]);
      }
      if (kScaled) dz *= scale[n];
      if (kOld) dz += to_float(old[i][n]);
      put(out[i] + n, dz);
    }
  }
}

template <bool kMask, bool kSums, bool kOld, bool kScaled>
void dgrad_tile(const DgradArgs& a, const Tile& where, int64_t first, int64_t columns, const float* c, int64_t ldc, float* sum_dz, float* sum_dz_xhat) {
  int64_t m = 0;
  for (; m + 4 <= where.pixels; m += 4) dgrad_rows<4, kMask, kSums, kOld, kScaled>(a, where.pixel + m, first, columns, c + m * ldc, ldc, sum_dz, sum_dz_xhat);
  for (; m < where.pixels; ++m) dgrad_rows<1, kMask, kSums, kOld, kScaled>(a, where.pixel + m, first, columns, c + m * ldc, ldc, sum_dz, sum_dz_xhat);
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
  for (int64_t m = 0; m < where.pixels; ++m) {
    const Value* x = a.x.data + where.pixel[m] * a.x.stride + first;
    for (int64_t begin = 0; begin < columns; begin += kPiece) {
      const int64_t width = least(kPiece, columns - begin);
      const float *scale = a.scale + first + begin, *shift = a.shift + first + begin;
      for (int64_t n = 0; n < width; ++n) z[n] = scale[n] * to_float(x[begin + n]) + shift[n];
      gradient_row(c + m * ldc + begin, z, width, a.act);
    }
  }
}

void finish_dgrad(const DgradArgs& a, const Tile& where, int64_t first, int64_t columns, float* c, int64_t ldc, float* sum_dz, float* sum_dz_xhat) {
  if (a.scale != nullptr && a.act.is_other()) derive_tile(a, where, first, columns, c, ldc);
  const bool mask = a.scale != nullptr && a.act.is_relu(), sums = sum_dz != nullptr, old = a.accumulate || a.base.data != nullptr;
  if (sums) {
    std::memset(sum_dz, 0, columns * sizeof(float));
    std::memset(sum_dz_xhat, 0, columns * sizeof(float));
  }
  const DgradTile tile = mask ? (sums ? dgrad_tile_for<true, true>(old, a.scaled) : dgrad_tile_for<true, false>(old, a.scaled))
                              : (sums ? dgrad_tile_for<false, true>(old, a.scaled) : dgrad_tile_for<false, false>(old, a.scaled));
  tile(a, where, first, columns, c, ldc, sum_dz, sum_dz_xhat);
}

// The sums of the only tile go to `sums`.
template <class Args>
void dgrad_few(const Args& a, const Problem& p, float* sums, Parallel parallel) {
  Run runs[kMaxRuns];
  const int count = make_runs(p, a.weight, false, runs);
  run_parallel(parallel, div_up(p.dst_c, kPanel), p.dst_c * p.depth(), [&](int64_t panel) {
    const int64_t first = panel * kPanel, width = panel_width(p.dst_c, panel);
    const int vectors = static_cast<int>(width / kLanes);
    Tile where;
    const float* operand = load_whole(p, a.grad, &where);
    float* c = scratch_c.get(p.tile_pixels * width);
    const int64_t block = even_block(where.pixels, rows_for(vectors)), part = even_block(p.src_c, kSegment);
    for (int i = 0; i < count; ++i) {
      for (int64_t k = 0; k < p.src_c; k += part) {
        const float* weights = a.weight.data + runs[i].weight + k * a.weight.so + first;
        for (int64_t m = 0; m < where.pixels; m += block)
          kernels().multiply[vectors][least(block, where.pixels - m)](operand + runs[i].operand + k, where.base + m, weights, a.weight.so, least(part, p.src_c - k),
                                                                      c + m * width, width, i == 0 && k == 0);
      }
    }
    float* own = sums == nullptr ? nullptr : sums + first;
    finish_dgrad(a, where, first, width, c, width, own, own == nullptr ? nullptr : own + p.dst_c);
  });
}

template <class Args>
void dgrad(const Args& a, Parallel parallel) {
  const Geometry2d& g = a.g;
  const int64_t phases = g.stride_h * g.stride_w;
  Problem problems[16];
  bool few[16] = {};
  int64_t tiles = 0, first_tile[17] = {0};
  for (int64_t i = 0; i < phases; ++i) {
    Problem& p = problems[i];
    p = Problem{dgrad_axis(g.in_h, g.out_h, g.kernel_h, g.stride_h, g.pad_h, g.dilation_h, i / g.stride_w),
                dgrad_axis(g.in_w, g.out_w, g.kernel_w, g.stride_w, g.pad_w, g.dilation_w, i % g.stride_w),
                g.batch, g.out_c / kChannelsPerUnit, g.in_c, g.in_h, g.in_w, kChannelsPerUnit};
    if (p.h.grid > 0 && p.w.grid > 0) {
      few[i] = p.plan_few(a.weight, g.in_c, kFewPixels);
      if (!few[i]) p.plan();
      tiles += p.tiles;
    }
    first_tile[i + 1] = tiles;
  }
  const int64_t panels = div_up(g.in_c, kPanel);
  float* sums = a.sum_dz == nullptr ? nullptr : partial_sums.get(tiles * 2 * g.in_c);
  for (int64_t i = 0; i < phases; ++i) {
    const Problem& p = problems[i];
    if (first_tile[i + 1] == first_tile[i]) continue;
    if constexpr (!kPairs) {
      if (few[i]) {
        dgrad_few(a, p, sums == nullptr ? nullptr : sums + first_tile[i] * 2 * g.in_c, parallel);
        continue;
      }
    }
    const int64_t each = panels_per_task(p), parts = div_up(panels, each);
    float* weights = packed_weights.get(round_up(p.dst_c, kLanes) * p.depth());
    pack_weights(p, a.weight, a.weight.so, a.weight.si, weights, parallel);
    run_parallel(parallel, p.tiles * parts, p.rows() * p.w.grid * p.dst_c * 8, [&](int64_t task) {
      const int64_t tile = task / parts, begin = task % parts * each, end = least(panels, begin + each);
      const int64_t first = begin * kPanel, columns = least(p.dst_c, end * kPanel) - first;
      const int64_t ldc = round_up(columns, kLanes);
      float* c = scratch_c.get(p.tile_pixels * ldc);
      Tile where;
      multiply_tile(p, a.grad, tile, weights, begin, end, c, ldc, &where, [&](const Tile& t, Prefetch* prefetch) {
        if (phases > 1) return;  // its pixels are not side by side
        const int64_t from = t.pixel[0], to = t.pixel[t.pixels - 1] + 1;
        prefetch->add(a.x, from, to, first, columns);
        prefetch->add(a.accumulate ? a.dx : a.base, from, to, first, columns);
      });
      float* own = sums == nullptr ? nullptr : sums + (first_tile[i] + tile) * 2 * g.in_c + first;
      finish_dgrad(a, where, first, columns, c, ldc, own, own == nullptr ? nullptr : own + g.in_c);
    });
  }
  if (sums == nullptr) return;
  run_parallel(parallel, div_up(g.in_c, 64), tiles * g.in_c, [&](int64_t b) {
    for (int64_t n = b * 64; n < least(g.in_c, b * 64 + 64); ++n) {
      double s0 = 0, s1 = 0;
      for (int64_t t = 0; t < tiles; ++t) {
        s0 += sums[t * 2 * g.in_c + n];
        s1 += sums[(t * 2 + 1) * g.in_c + n];
      }
      a.sum_dz[n] = static_cast<float>(s0);
      a.sum_dz_xhat[n] = static_cast<float>(s1 * a.invstd[n]);
    }
  });
}

// --- weight gradient ----------------------------------------------------------------------------------------------------------------

// Where a weight gradient's sums lie: per group of tiles, panel by panel, within a panel by Problem::chunk_at, tap (or position), channel.
struct WgradPlan {
  Problem p;
  int64_t panels, parts, each;  // panels, and how they are divided into tasks
  int64_t groups, group_tiles;  // each group of tiles sums into a partial of its own
  int64_t size() const { return p.depth() * round_up(p.dst_c, kLanes); }
  int64_t used_groups() const { return div_up(p.tiles, group_tiles); }

  // Follows from the shape alone.
  explicit WgradPlan(const Problem& problem) : p(problem) {
    p.plan();
    // Winograd's sums are 16/9 as large: those of a task have to stay in cache from tile to tile
    if (p.winograd) p.chunk = least(p.chunk, kPanel);
    const int64_t pixels = p.rows() * p.w.grid, chunks = p.chunks();
    panels = div_up(p.dst_c, kPanel);
    groups = most(1, least(16, least(pixels / 512, (int64_t(1) << 22) / size())));
    each = p.winograd ? 1 : most(1, least(kScratchFloats / (p.tile_pixels * kPanel), div_up(panels, div_up(8, groups * chunks))));
    parts = div_up(panels, each);
    // a small map: more groups rather than idle threads, down to groups that still outweigh their partials
    groups = least(p.tiles, most(groups, least(div_up(8, chunks * parts), most(1, pixels / 96))));
    group_tiles = div_up(p.tiles, groups);
  }
};

// The bases of pixels that lie `stride` apart.
const int64_t* strided_base(int64_t pixels, int64_t stride) {
  int64_t* base = scratch_strided.get(pixels);
  for (int64_t m = 0; m < pixels; ++m) base[m] = m * stride;
  return base;
}

// The products of one tile: panels [begin, end) of one chunk, added to the sums of a group unless they are `fresh`. `gradient` holds the
// tile's output gradients, `ldg` floats a pixel.
void outer_tile(const WgradPlan& plan, Chunk chunk, const Tile& where, const float* scratch, const float* gradient, int64_t ldg, int64_t begin, int64_t end, float* sums, bool fresh, Prefetch* prefetch) {
  const Problem& p = plan.p;
  Segment segments[kMaxSegments];
  const int count = make_segments(p, chunk, int64_t(1) << 40, segments);
  const int64_t* gradient_base = strided_base(where.pixels, ldg);
  const int64_t calls = (end - begin) * count * div_up(segments[0].depth, rows_for(kPanelVectors)), lines = div_up(prefetch->total, calls);
  for (int64_t panel = begin; panel < end; ++panel) {
    const int64_t width = panel_width(p.dst_c, panel);
    const int vectors = static_cast<int>(width / kLanes);
    const float* values = gradient + (panel - begin) * kPanel;
    float* to = sums + panel * kPanel * p.depth();
    for (int i = 0; i < count; ++i) {
      const int64_t block = even_block(segments[i].depth, rows_for(vectors));
      for (int64_t k = 0; k < segments[i].depth; k += block) {
        const int64_t rows = least(block, segments[i].depth - k);
        kernels().outer[vectors][rows](scratch + segments[i].offset + k, where.base, values, gradient_base, where.pixels,
                                       to + (segments[i].row + k) * width, width, fresh);
        prefetch->issue(lines);
      }
    }
  }
}

// As outer_tile, for one panel, by Winograd's algorithm.
void outer_winograd(const WgradPlan& plan, int64_t tile, Chunk chunk, const float* scratch, const float* gradient, int64_t panel, float* sums, bool fresh, Prefetch* prefetch) {
  const Problem& p = plan.p;
  const int64_t patches = patches_of(p, tile), width = panel_width(p.dst_c, panel);
  const int64_t step = position_step(patches, chunk.width), gradient_step = position_step(patches, width);
  float* transformed = scratch_v.get(kPositions * step);
  float* gradients = scratch_m.get(kPositions * gradient_step);
  transform_input(p, tile, scratch, chunk.width, transformed, step);
  transform_gradient(p, tile, gradient, width, gradients, gradient_step);
  int64_t* base = scratch_base.get(patches);
  for (int64_t i = 0; i < patches; ++i) base[i] = i * chunk.width;
  const int64_t* gradient_base = strided_base(patches, width);
  const int vectors = static_cast<int>(width / kLanes);
  const int64_t block = even_block(chunk.width, rows_for(vectors));
  const int64_t lines = div_up(prefetch->total, kPositions * div_up(chunk.width, block));
  float* to = sums + panel * kPanel * p.depth() + chunk.row * width;
  for (int position = 0; position < kPositions; ++position, to += chunk.width * width) {
    for (int64_t k = 0; k < chunk.width; k += block) {
      kernels().outer[vectors][least(block, chunk.width - k)](transformed + position * step + k, base, gradients + position * gradient_step, gradient_base, patches,
                                                              to + k * width, width, fresh);
      prefetch->issue(lines);
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
        transpose([&](int i) { return load(block + (c + i) * width + n); }, [&](int j, vec column) { store(to + (n + j) * w.so + c, column); });
      for (int64_t c = whole; c < rows; ++c)
        for (int64_t i = n; i < n + kLanes; ++i) put(to + i * w.so + c, block[c * width + i]);
    }
  }
  for (; n < valid; ++n)
    for (int64_t c = 0; c < rows; ++c) put(to + n * w.so + c * w.si, block[c * width + n]);
}

// Every product is a finished number of the weight's gradient, which is written in its rows.
template <class Args>
void wgrad_few(const Args& a, const Problem& p, Parallel parallel) {
  Run runs[kMaxRuns];
  const auto& dweight = a.dweight;
  const int count = make_runs(p, dweight, true, runs);
  const int64_t block = rows_for(kPanelVectors), each = few_per_task(p.dst_c, block);
  run_parallel(parallel, div_up(p.dst_c, each), p.dst_c * p.depth(), [&](int64_t task) {
    const int64_t first = task * each, columns = least(each, p.dst_c - first);
    Tile where;
    const float* operand = load_whole(p, a.x, &where);
    float* gradient = scratch_b.get(where.pixels * columns);
    for (int64_t m = 0; m < where.pixels; ++m) load_pixel(a.grad, where.pixel[m], first, columns, gradient + m * columns);
    const int64_t* base = strided_base(where.pixels, columns);
    for (int64_t n = 0; n < columns; n += block) {
      for (int i = 0; i < count; ++i) {
        float* to = dweight.data + (first + n) * dweight.so + runs[i].weight;
        for (int64_t k = 0; k < runs[i].depth; k += kPanel) {
          const int64_t vectors = least(kPanel, runs[i].depth - k) / kLanes;
          kernels().outer[vectors][least(block, columns - n)](gradient + n, base, operand + runs[i].operand + k, where.base, where.pixels, to + k, dweight.so, true);
        }
      }
    }
  });
}

#ifdef FUSEDRES_PAIRS
// The operand of a tile for the weight gradient: units of a pixel and the one that the next output pixel reads through the same tap.
void load_operand(const Problem& p, const Source& s, int64_t tile, Chunk chunk, float* scratch) {
  const int64_t width = chunk.width, begin = tile * p.tile_rows, end = least(p.rows(), begin + p.tile_rows);
  float* const values = scratch_v.get(most(2, p.scratch_w) * width);
  const auto load = [&](int64_t line, int64_t j, float* to) {
    const int64_t x = p.w.source(0, j);
    if (line < 0 || x < 0 || x >= p.w.src_size) std::memset(to, 0, width * sizeof(float));
    else load_pixel(s, line + x, chunk.first, width, to);
  };
  int64_t pixel = 0;
  if (p.one_to_one()) {
    int64_t before = -1;
    for (int64_t row = begin; row < end; ++row) {
      const int64_t line = (row / p.h.grid * p.h.src_size + row % p.h.grid * p.h.step) * p.w.src_size;
      for (int64_t j = 0; j < p.w.grid; ++j, ++pixel) {
        const int64_t now = line + j * p.w.step;
        if (pixel % 2 == 1) interleave_pixels(s, before, now, chunk.first, width, values, scratch + pixel / 2 * width);
        before = now;
      }
    }
    if (pixel % 2 == 1) interleave_pixels(s, before, -1, chunk.first, width, values, scratch + pixel / 2 * width);
    return;
  }
  for (int64_t row = begin; row < end;) {
    const int64_t n = row / p.h.grid, first = row % p.h.grid, count = least(end - row, p.h.grid - first), in_rows = p.h.scratch_size(count);
    for (int64_t i = 0; i < in_rows; ++i) {
      const int64_t y = p.h.source(first, i), line = y < 0 || y >= p.h.src_size ? -1 : (n * p.h.src_size + y) * p.w.src_size;
      float* to = scratch + pixel * width;
      pixel += p.scratch_w;
      if (line < 0) {
        std::memset(to, 0, p.scratch_w * width * sizeof(float));
        continue;
      }
      for (int64_t j = 0; j < p.scratch_w; ++j) load(line, j, values + j * width);
      const int64_t next = p.w.scratch_step();
      for (int64_t j = 0; j < p.scratch_w; ++j)
        interleave(values + j * width, j + next < p.scratch_w ? values + (j + next) * width : nullptr, width, to + j * width);
    }
    row += count;
  }
}

// The pixels that pair up: of a whole tile or of a row.
int64_t line_pixels(const Problem& p, int64_t pixels) { return p.one_to_one() ? pixels : p.w.grid; }

// How many units a tile has; their bases replace those of its pixels.
int64_t locate_units(const Problem& p, int64_t width, const Tile& where) {
  const int64_t line = line_pixels(p, where.pixels);
  int64_t* base = scratch_base.data;
  int64_t units = 0;
  for (int64_t start = 0; start < where.pixels; start += line)
    for (int64_t j = 0; j < line; j += 2, ++units) base[units] = p.one_to_one() ? units * width : base[start + j];
  return units;
}

void load_gradient(const Problem& p, const Source& s, const Tile& where, int64_t first, int64_t columns, int64_t ldg, float* gradient) {
  const int64_t line = line_pixels(p, where.pixels);
  float* const values = scratch_v.get(2 * columns);
  for (int64_t start = 0; start < where.pixels; start += line) {
    for (int64_t j = 0; j < line; j += 2, gradient += ldg) {
      const bool two = j + 1 < line;
      interleave_pixels(s, where.pixel[start + j], two ? where.pixel[start + j + 1] : -1, first, columns, values, gradient);
      for (int64_t n = columns; n < ldg; ++n) gradient[n] = 0.f;
    }
  }
}
#else
void load_operand(const Problem& p, const Source& s, int64_t tile, Chunk chunk, float* scratch) { load_tile(p, s, tile, chunk, scratch); }

int64_t locate_units(const Problem&, int64_t, const Tile& where) { return where.pixels; }

void load_gradient(const Problem&, const Source& s, const Tile& where, int64_t first, int64_t columns, int64_t ldg, float* gradient) {
  for (int64_t m = 0; m < where.pixels; ++m) {
    load_pixel(s, where.pixel[m], first, columns, gradient + m * ldg);
    for (int64_t n = columns; n < ldg; ++n) gradient[m * ldg + n] = 0.f;
  }
}
#endif

template <class Args>
void wgrad(const Args& a, Parallel parallel) {
  const Geometry2d& g = a.g;
  Problem problem{forward_axis(g.in_h, g.out_h, g.kernel_h, g.stride_h, g.pad_h, g.dilation_h),
                  forward_axis(g.in_w, g.out_w, g.kernel_w, g.stride_w, g.pad_w, g.dilation_w),
                  g.batch, g.in_c, g.out_c, g.out_h, g.out_w};
  if constexpr (!kPairs)
    if (problem.plan_few(a.dweight, g.in_c, kFewPixels)) return wgrad_few(a, problem, parallel);
  const WgradPlan plan(problem);
  const Problem& p = plan.p;
  const int64_t pixels = p.rows() * p.w.grid, panels = plan.panels, parts = plan.parts, chunks = p.chunks();
  float* sums = partial_sums.get(plan.groups * plan.size());
  run_parallel(parallel, plan.groups * chunks * parts, pixels * p.dst_c * 8, [&](int64_t task) {
    const int64_t group = task / (chunks * parts), begin = task % parts * plan.each, end = least(panels, begin + plan.each);
    const Chunk chunk = p.chunk_at(task / parts % chunks);
    const int64_t first = begin * kPanel, columns = least(p.dst_c, end * kPanel) - first, ldg = round_up(columns, kLanes);
    const int64_t stop = least(p.tiles, (group + 1) * plan.group_tiles);
    float* scratch = scratch_a.get(p.scratch_pixels * p.chunk);
    float* gradient = scratch_b.get(p.tile_pixels * ldg);
    for (int64_t tile = group * plan.group_tiles; tile < stop; ++tile) {
      const bool fresh = tile == group * plan.group_tiles;
      load_operand(p, a.x, tile, chunk, scratch);
      Tile where = locate(p, tile, chunk.width);
      load_gradient(p, a.grad, where, first, columns, ldg, gradient);
      where.pixels = locate_units(p, chunk.width, where);
      Prefetch prefetch;
      if (tile + 1 < stop) {
        prefetch_tile(p, a.x, tile + 1, chunk, &prefetch);
        const int64_t from = (tile + 1) * p.tile_pixels, to = least(pixels, from + p.tile_pixels);
        prefetch.add(a.grad.map, from, to, first, columns);
        if (a.grad.q != nullptr) prefetch.add(a.grad.second, from, to, first, columns);
      }
      float* own = sums + group * plan.size();
      if (p.winograd) outer_winograd(plan, tile, chunk, scratch, gradient, begin, own, fresh, &prefetch);
      else outer_tile(plan, chunk, where, scratch, gradient, ldg, begin, end, own, fresh, &prefetch);
    }
  });
  run_parallel(parallel, panels * chunks, plan.used_groups() * plan.size(), [&](int64_t task) {
    const int64_t panel = task / chunks, first = panel * kPanel, width = panel_width(p.dst_c, panel);
    const int64_t valid = least(width, p.dst_c - first);
    const Chunk chunk = p.chunk_at(task % chunks);
    float* from = sums + first * p.depth() + chunk.row * width;
    // the groups, in order, into the first
    for (int64_t k = 1; k < plan.used_groups(); ++k)
      for (int64_t i = 0; i < p.taps() * chunk.width * width; ++i) from[i] += from[i + k * plan.size()];
    const auto place = [&](int i, int j, int64_t c) {
      return a.dweight.data + i * a.dweight.sh + j * a.dweight.sw + (chunk.first + c) * a.dweight.si + first * a.dweight.so;
    };
    if (!p.winograd) {
      for (int t = 0; t < p.taps(); ++t)
        store_weights(a.dweight, from + t * chunk.width * width, width, chunk.width, valid, place(t / p.w.taps, t % p.w.taps, 0));
      return;
    }
    for (int64_t c0 = 0; c0 < chunk.width; c0 += kLanes) {
      float block[9][kLanes][kPanel];
      for (int64_t c = 0; c < kLanes; ++c) {
        for (int64_t n = 0; n < width; n += kLanes) {
          vec u[4][4], dw[3][3];
          load_positions(from + (c0 + c) * width + n, chunk.width * width, u);
          both_axes(u, dw, weight_gradient_line);
          for (int t = 0; t < 9; ++t) store(block[t][c] + n, dw[t / 3][t % 3]);
        }
      }
      for (int t = 0; t < 9; ++t) store_weights(a.dweight, block[t][0], kPanel, kLanes, valid, place(t / 3, t % 3, c0));
    }
  });
}

}  // namespace
}  // namespace FUSEDRES_CAPABILITY
}  // namespace fusedres
