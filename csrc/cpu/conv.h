// Native float32 convolutions on channels_last maps: what the binding and the per-capability kernels agree on.
//
// A map is rows of C values, `stride` floats apart; row (n * H + h) * W + w is a pixel. Nothing here depends on torch, so that the
// kernels can be compiled once per CPU capability.
#pragma once

#include <cstdint>

#include "activation.h"
#include "parallel.h"

namespace fusedres {

struct Map {
  float* data;
  int64_t stride;  // floats between pixels
};

// How a convolution's operand is read: a plain map, act(scale * x + shift), or the pending gradient p * x + q * second + r.
struct Source {
  Map map;
  Map second;                 // raw of a pending gradient; data may be null (q taken as zero)
  const float* scale;         // null: plain
  const float* shift;
  const float* q;             // non-null with second: a pending gradient, scale is p and shift is r
  Activation act;
};

struct Geometry2d {
  int64_t batch, in_h, in_w, in_c, out_h, out_w, out_c;
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
};

// A weight of out_c x in_c x kernel_h x kernel_w with any strides (floats).
struct Weight {
  float* data;
  int64_t so, si, sh, sw;
};

struct ForwardArgs {
  Geometry2d g;
  Source x;
  Weight weight;
  Map out;
  const float* bias;           // every pointer below may be null
  float* mean;                 // statistics of out
  float* m2;
  const float* out_scale;      // epilogue: act(out_scale * v + out_shift + residual_scale * residual + residual_shift)
  const float* out_shift;
  Map residual;
  const float* residual_scale;
  const float* residual_shift;
  Activation out_act;
};

struct DgradArgs {
  Geometry2d g;                // of the forward convolution
  Source grad;
  Weight weight;
  Map dx;
  Map x;                       // data null: no activation below, no sums
  const float* scale;          // affine of x; null: no mask, no scaling
  const float* shift;
  Activation act;
  const float* mean;           // saved of x, for sums
  const float* invstd;
  float* sum_dz;               // null: no sums
  float* sum_dz_xhat;
  Map base;                    // data null: nothing to add (or dx itself with accumulate)
  bool accumulate;
  bool scaled;
};

struct WgradArgs {
  Geometry2d g;
  Source grad;
  Source x;
  Weight dweight;
};

struct ConvKernels {
  void (*forward)(const ForwardArgs&, Parallel);
  void (*dgrad)(const DgradArgs&, Parallel);
  void (*wgrad)(const WgradArgs&, Parallel);
};

// One table per capability, each in its own translation unit.
extern const ConvKernels conv_kernels_default;
#if defined(__x86_64__)
extern const ConvKernels conv_kernels_avx2;
extern const ConvKernels conv_kernels_avx512;
#endif

}  // namespace fusedres
