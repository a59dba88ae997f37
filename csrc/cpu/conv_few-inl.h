// Few pixels: where a float32 weight meets so few of them (small batches, late stages) that packing it would cost more
// than the product, kernels read it as it lies, each number once.
#pragma once

#include <cstdint>

#include "conv_gemm-inl.h"
#include "conv_prologue-inl.h"

namespace fusedres {
namespace FUSEDRES_CAPABILITY {
namespace {

// For plan_few, the channels of whole vectors of which the last may overlap the one before.
inline int64_t with_rest(int64_t channels) { return channels < kLanes ? channels : kLanes; }

// The operand of a problem that plan_few took: loaded, or the source map itself where nothing is pending and nothing
// padded.
inline const float* load_whole(const Problem& p, const Source& s, Tile* where) {
  const Source* in_place = s.scale == nullptr && s.act.kind == Act::none && p.one_to_one() ? &s : nullptr;
  *where = locate(p, 0, p.src_c, in_place);
  if (in_place) return reinterpret_cast<const float*>(s.map.data);
  float* loaded = scratch_a.get(p.scratch_pixels * p.src_c);
  load_tile(p, s, 0, p.chunk_at(0), loaded);
  return loaded;
}

// The taps, as a weight lies. For the operand's channels side by side in it, a row of consecutive taps is one run where
// they are so, too.
inline int make_runs(const Problem& p, const Weight& w, bool side_by_side, Run* runs) {
  int count = 0;
  const bool merged = side_by_side && p.w.consecutive() && w.sw == p.src_c && p.w.kernel[0] == 0;
  const int columns = merged ? 1 : p.w.taps;
  for (int i = 0; i < p.h.taps; ++i)
    for (int j = 0; j < columns; ++j)
      runs[count++] = {p.shift(i, j) * p.src_c, p.h.kernel[i] * w.sh + p.w.kernel[j] * w.sw,
                       merged ? p.w.taps * p.src_c : p.src_c};
  return count;
}

constexpr int kMaxRuns = kMaxTaps * kMaxTaps;

// How many of a block's channels a task takes: enough tasks for many threads, each a multiple of `multiple`.
int64_t few_per_task(const Problem& p, int64_t multiple) {
  return round_up(div_up(p.dst_c, div_up(16, p.blocks)), multiple);
}

}  // namespace
}  // namespace FUSEDRES_CAPABILITY
}  // namespace fusedres
