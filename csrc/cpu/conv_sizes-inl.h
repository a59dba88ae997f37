// How the convolutions cut up their work: the blocks that a register kernel keeps in registers, the tiles and scratches
// that stay in cache, and the smallest problems that go another way.
#pragma once

#include <cstdint>

#include "vectors-inl.h"

namespace fusedres {
namespace FUSEDRES_CAPABILITY {
namespace {

#if FUSEDRES_LANES == 8 || (FUSEDRES_LANES == 4 && defined(__x86_64__))
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
constexpr int kMaxTaps = 16;                     // per dimension; larger kernels go to the library
constexpr int64_t kTilePixels = 160;             // enough rows to amortise a pass over the packed weights
constexpr int64_t kScratchFloats = 64 * 1024;    // 256 KiB, a quarter of a current L2
constexpr int64_t kSumsFloats = 128 * 1024;      // half of it: what a weight gradient adds up of one panel
constexpr int64_t kWinogradFloats = 160 * 1024;  // the transformed operand of a tile
constexpr int64_t kThreeChannels = 64;           // from here Winograd's output tiles may be 3 x 3
constexpr int64_t kThreeSum = 64;                // and their sums begin anew after so many channels
constexpr int64_t kShortSum = 32;                // as all do where eager's are short: of a single image of
constexpr int64_t kShortValues = 20480;          // up to so many values
constexpr int64_t kPackChannels = 32;            // that one thread packs for Winograd's algorithm
constexpr int64_t kFewPixels = 64;               // up to here gradients read a weight as it lies
constexpr int64_t kFewerPixels = 32;             // and forward, whose sums over a vector's lanes cost more
constexpr int64_t kFewFloats = 256 * 1024;       // of the operand, whole in one scratch
constexpr int64_t kOwnPixels = 256;              // up to here, and with panels for many threads, one tile packs weights
constexpr int64_t kSegment = 192;                // depth of one kernel call: its weights stay in L2, mostly L1

}  // namespace
}  // namespace FUSEDRES_CAPABILITY
}  // namespace fusedres
