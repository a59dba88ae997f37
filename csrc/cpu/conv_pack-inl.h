// Packed weights: panels of destination channels whose rows follow the order in which the register kernels read the
// scratch.
#pragma once

#include <cstdint>
#include <cstring>

#include "conv_winograd-inl.h"

namespace fusedres {
namespace FUSEDRES_CAPABILITY {
namespace {

// Panels of kPanel destination channels, within a panel chunk by chunk; the rows of a chunk follow make_segments:
// kernel row, kernel column, channel. The last panel is padded with zeros to whole vectors.
int64_t panel_width(int64_t dst_c, int64_t panel) { return round_up(least(kPanel, dst_c - panel * kPanel), kLanes); }

// A weight as a factor of a problem's product: the strides of its channels that are the problem's source and
// destination, and where it is packed.
struct Factor {
  Weight weight;
  int64_t source_stride, destination_stride, group_stride;
  float* packed;
};

inline int64_t block_size(const Problem& p) { return round_up(p.dst_c, kLanes) * p.depth(); }
inline int64_t packed_size(const Problem& p) { return p.packs ? 0 : p.blocks * block_size(p); }

// That of a block of groups.
inline Factor factor_of(const Problem& p, Factor factor, int64_t block) {
  factor.weight.data += block * p.abreast * factor.group_stride;
  if (!p.packs) factor.packed += block * block_size(p);
  return factor;
}

// dst[j][i] = src[i][j] for kLanes x kLanes numbers or units. What lies some lines ahead in each row is asked for: as
// many rows at once are beyond what the hardware foresees.
template <class Of>
inline void transpose_ahead(const Value* src, int64_t src_stride, float* dst, int64_t dst_stride) {
  transpose(
      [&](int i) {
        __builtin_prefetch(src + i * src_stride + 256 / sizeof(Value), 0, 2);
        return Of::load_row(src + i * src_stride);
      },
      [&](int j, vec column) { store(dst + j * dst_stride, column); });
}

void pack_chunk(const Problem& p, const Factor& factor, int64_t panel, Chunk chunk, float* dst) {
  const Weight& w = factor.weight;
  const int64_t source_stride = factor.source_stride, destination_stride = factor.destination_stride;
  const int64_t first = panel * kPanel, width = panel_width(p.dst_c, panel), valid = least(width, p.dst_c - first);
  for (int i = 0; i < p.h.taps; ++i) {
    for (int j = 0; j < p.w.taps; ++j, dst += chunk.width * width) {
      const Value* src = w.data + p.h.kernel[i] * w.sh + p.w.kernel[j] * w.sw +
                         p.per_unit * chunk.first * source_stride + first * destination_stride;
      if (valid < width) std::memset(dst, 0, chunk.width * width * sizeof(float));
      if (destination_stride == 1) {
        for (int64_t c = 0; c < chunk.width; ++c)
          pack_row(src + p.per_unit * c * source_stride, source_stride, valid, dst + c * width);
        continue;
      }
      int64_t c = 0;
      if (source_stride == 1) {
        c = chunk.width / kLanes * kLanes;
        const int64_t whole = valid / kLanes * kLanes;
        // 16 rows from end to end before the next 16: memory is read in long runs
        for (int64_t n = 0; n < whole; n += kLanes)
          for (int64_t k = 0; k < c; k += kLanes)
            transpose_ahead<Units>(src + n * destination_stride + p.per_unit * k, destination_stride,
                                   dst + k * width + n, width);
        for (int64_t n = whole; n < valid; ++n)
          for (int64_t k = 0; k < c; ++k)
            dst[k * width + n] = unit_at(src + n * destination_stride + p.per_unit * k, 1);
      }
      for (; c < chunk.width; ++c)
        for (int64_t n = 0; n < valid; ++n)
          dst[c * width + n] = unit_at(src + n * destination_stride + p.per_unit * c * source_stride, source_stride);
    }
  }
}

// As pack_chunk, for groups abreast: vector of the destination, tap, channel.
void pack_abreast(const Problem& p, const Factor& factor, float* dst) {
  const Weight& w = factor.weight;
  for (int64_t first = 0; first < p.dst_c; first += kLanes) {
    for (int i = 0; i < p.h.taps; ++i) {
      for (int j = 0; j < p.w.taps; ++j, dst += p.src_c * kLanes) {
        for (int64_t l = 0; l < kLanes; ++l) {
          const int64_t n = least(first + l, p.dst_c - 1);  // lanes behind the last channel repeat it
          const Value* src = w.data + p.h.kernel[i] * w.sh + p.w.kernel[j] * w.sw + n / p.src_c * factor.group_stride +
                             n % p.src_c * factor.destination_stride;
          for (int64_t c = 0; c < p.src_c; ++c) dst[c * kLanes + l] = to_float(src[c * factor.source_stride]);
        }
      }
    }
  }
}

// As pack_chunk, for Winograd: position, channel. Of the chunk's channels, those in [begin, end), which are a multiple
// of kLanes.
template <class Winograd, class Of>
void pack_winograd(const Problem& p, const Of& factor, int64_t panel, Chunk chunk, int64_t begin, int64_t end,
                   float* dst) {
  const auto& w = factor.weight;
  const int64_t source_stride = factor.source_stride, destination_stride = factor.destination_stride;
  const int64_t first = panel * kPanel, width = panel_width(p.dst_c, panel), valid = least(width, p.dst_c - first);
  for (int64_t n0 = 0; n0 < width; n0 += kLanes) {
    for (int64_t c0 = begin; c0 < end; c0 += kLanes) {
      float taps[9][kLanes][kLanes] = {};
      const int64_t columns = least(kLanes, valid - n0);
      for (int t = 0; t < 9; ++t) {
        const auto* src = w.data + p.h.kernel[t / 3] * w.sh + p.w.kernel[t % 3] * w.sw +
                          (chunk.first + c0) * source_stride + (first + n0) * destination_stride;
        if (source_stride == 1 && columns == kLanes) {
          transpose_ahead<Numbers>(src, destination_stride, taps[t][0], kLanes);
        } else {
          for (int64_t c = 0; c < kLanes; ++c)
            for (int64_t n = 0; n < columns; ++n)
              taps[t][c][n] = to_float(src[c * source_stride + n * destination_stride]);
        }
      }
      for (int64_t c = 0; c < kLanes; ++c) {
        float* to = dst + (c0 + c) * width + n0;
        both_axes<3, Winograd::kPositions>([&](int i, int j) { return load(taps[3 * i + j][c]); }, Winograd::weight,
                                           store_positions<Winograd>(to, chunk.width * width));
      }
    }
  }
}

// A panel's weights for a chunk, by whichever algorithm; for Winograd's, piece `piece` of pack_pieces.
template <class Of>
void pack(const Problem& p, const Of& factor, int64_t panel, Chunk chunk, int64_t piece, float* dst) {
  if (p.abreast > 1) return pack_abreast(p, factor, dst);
  if (p.winograd) {
    const int64_t begin = piece * kPackChannels, end = least(chunk.width, begin + kPackChannels);
    return with_winograd(
        p, [&](auto winograd) { pack_winograd<decltype(winograd)>(p, factor, panel, chunk, begin, end, dst); });
  }
  pack_chunk(p, factor, panel, chunk, dst);
}

inline int64_t pack_pieces(const Problem& p) { return p.winograd ? div_up(p.chunk, kPackChannels) : 1; }

// Of one chunk of channels behind another nothing is to be seen where there is a single tap.
inline PackedLayout packed_layout(const Problem& p, const Weight& w) {
  const int64_t chunk = p.taps() == 1 ? p.src_c : p.chunk;
  return {{p.src_c, p.dst_c, p.h.taps, p.w.taps, chunk, p.winograd + 4 * kPairs, p.abreast, w.so, w.si, w.sh, w.sw},
          p.blocks * block_size(p)};
}

inline float* packed_at(const Problem& p, const Factor& factor, int64_t panel, Chunk chunk) {
  return factor.packed + panel * kPanel * p.depth() + chunk.row * panel_width(p.dst_c, panel);
}

// All weights, unless tiles pack their own.
template <class Of>
void pack_weights(const Problem& p, const Of& factor, Parallel parallel) {
  if (p.packs) return;
  // few panels are not enough for the threads
  const int64_t panels = div_up(p.dst_c, kPanel), pieces = pack_pieces(p), of_panel = p.chunks() * pieces;
  run_parallel(parallel, p.blocks * panels * of_panel, p.channels() * p.depth(), [&](int64_t task) {
    const int64_t panel = task / of_panel % panels;
    const Chunk chunk = p.chunk_at(task % of_panel / pieces);
    const int64_t block = task / of_panel / panels;
    const Problem of_block = p.of_block(block);
    const Of own = factor_of(p, factor, block);
    pack(of_block, own, panel, chunk, task % pieces, packed_at(of_block, own, panel, chunk));
  });
}

// What a tile multiplies a chunk by.
inline const float* weights_of(const Problem& p, const Factor& factor, int64_t panel, Chunk chunk) {
  if (!p.packs) return packed_at(p, factor, panel, chunk);
  float* own = scratch_weights.get(p.taps() * chunk.width * kPanel);
  for (int64_t piece = 0; piece < pack_pieces(p); ++piece) pack(p, factor, panel, chunk, piece, own);
  return own;
}

}  // namespace
}  // namespace FUSEDRES_CAPABILITY
}  // namespace fusedres
