// Implicit-GEMM convolutions in float32 or bfloat16 (conv_operand-inl.h).
//
// One mechanism for forward and both gradients. A tile is a few rows of output pixels of one or more images. The
// operand's pixels that a tile needs are loaded once into a scratch that stays in L2, padded with zeros, and whatever
// is pending (scale_shift and ReLU, or the gradient's p * g + q * raw + r) is applied during that load. A
// register-blocked kernel multiplies the scratch by packed weights, and an epilogue (statistics; scale_shift, residual
// and ReLU; or mask, sums and accumulation) visits the tile while it is in cache. So a pending operand is read once,
// the result is written once, and no intermediate map exists.
//
// Partial statistics and sums are kept per tile and merged in tile order in double: the result depends on shapes alone,
// not on threads.
//
// Large 3 x 3 convolutions of stride 1 go the same way by Winograd's algorithm, in float32 for either: the scratch is
// transformed, the register kernel runs for each of 16, 25 or 36 positions, and the result is transformed back before
// the epilogue.
//
// The groups of a convolution are problems of the same shape, whose tiles are the tasks of one loop. Narrow ones share
// vectors (conv_abreast-inl.h); others that do not fill a vector are the library's. Depthwise ones have no product to
// block for registers, and loops of their own (conv_depthwise-inl.h).
//
// Where a float32 weight meets few pixels (small batches, late stages), packing it would cost more than the product:
// kernels then read it as it lies, each number once.
#pragma once

#include "conv_depthwise-inl.h"

namespace fusedres {
namespace FUSEDRES_CAPABILITY {
namespace {

void forward(const ForwardArgs& a, Parallel parallel) {
  is_depthwise(a.g, a.groups) ? depthwise_forward(a, parallel) : conv_forward(a, parallel);
}
void dgrad(const DgradArgs& a, Parallel parallel) {
  is_depthwise(a.g, a.groups) ? depthwise_dgrad(a, parallel) : conv_dgrad(a, parallel);
}
void wgrad(const WgradArgs& a, Parallel parallel) {
  is_depthwise(a.g, a.groups) ? depthwise_wgrad(a, parallel) : conv_wgrad(a, parallel);
}

constexpr ConvKernelsOf<Value> conv_kernels = {forward, dgrad, wgrad};

}  // namespace
}  // namespace FUSEDRES_CAPABILITY
}  // namespace fusedres
