// Native convolutions on channels_last maps of float32 or bfloat16: what the binding and the per-capability kernels
// agree on.
//
// A map is rows of C values, `stride` values apart; row (n * H + h) * W + w is a pixel. Nothing here depends on torch,
// so that the kernels can be compiled once per CPU capability.
#pragma once

#include <cstdint>

#include "activation.h"
#include "parallel.h"
#include "storage.h"

namespace fusedres {

class KeptWeight;

template <class Value>
struct MapOf {
  Value* data;
  int64_t stride;  // values between pixels
};

// How a convolution's operand is read: a plain map, act(scale * x + shift), or the pending gradient p * x + q * second
// + r.
template <class Value>
struct SourceOf {
  MapOf<Value> map;
  MapOf<Value> second;  // raw of a pending gradient; data may be null (q taken as zero)
  const float* scale;   // null: plain
  const float* shift;
  const float* q;  // non-null with second: a pending gradient, scale is p and shift is r
  Activation act;
};

struct Geometry2d {
  int64_t batch, in_h, in_w, in_c, out_h, out_w, out_c;
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
};

// A weight of out_c x in_c x kernel_h x kernel_w with any strides (values).
template <class Value>
struct WeightOf {
  Value* data;
  int64_t so, si, sh, sw;
};

// A convolution in groups: `g` and the weight's second size are those of one group, maps, vectors and the weight's
// first size those of all. Group i reads channels [i * g.in_c, (i + 1) * g.in_c) and writes [i * g.out_c, (i + 1) *
// g.out_c).
template <class Value>
struct ForwardArgsOf {
  Geometry2d g;
  int64_t groups;
  SourceOf<Value> x;
  WeightOf<Value> weight;
  MapOf<Value> out;
  const Value* bias;  // every pointer below may be null
  float* mean;        // statistics of out
  float* m2;
  const float* out_scale;  // epilogue: act(out_scale * v + out_shift + residual_scale * residual + residual_shift)
  const float* out_shift;
  MapOf<Value> residual;
  const float* residual_scale;
  const float* residual_shift;
  Activation out_act;
  KeptWeight* kept;  // the place where the weight stays packed; null: nowhere
  int64_t version;   // of the weight: another one where its values may be others
};

template <class Value>
struct DgradArgsOf {
  Geometry2d g;  // of the forward convolution
  int64_t groups;
  SourceOf<Value> grad;
  WeightOf<Value> weight;
  MapOf<Value> dx;
  MapOf<Value> x;      // data null: no activation below, no sums
  const float* scale;  // scale_shift of x; null: no mask, no scaling
  const float* shift;
  Activation act;
  const float* mean;  // mean_invstd of x, for sums
  const float* invstd;
  float* sum_dz;  // null: no sums
  float* sum_dz_xhat;
  MapOf<Value> base;  // data null: nothing to add (or dx itself with accumulate)
  bool accumulate;
  bool scaled;
};

template <class Value>
struct WgradArgsOf {
  Geometry2d g;
  int64_t groups;
  SourceOf<Value> grad;
  SourceOf<Value> x;
  WeightOf<Value> dweight;
};

constexpr int kDepthwiseTaps = 7;    // of a row of a depthwise kernel, at most
constexpr int kDepthwiseStride = 2;  // at most

// Whether kernels of their own compute it, whose groups read one channel and write one.
inline bool is_depthwise(const Geometry2d& g, int64_t groups) {
  return groups > 1 && g.in_c == 1 && g.out_c == 1 && g.kernel_w <= kDepthwiseTaps && g.dilation_w == 1 &&
         g.stride_h <= kDepthwiseStride && g.stride_w <= kDepthwiseStride;
}

template <class Value>
struct ConvKernelsOf {
  void (*forward)(const ForwardArgsOf<Value>&, Parallel);
  void (*dgrad)(const DgradArgsOf<Value>&, Parallel);
  void (*wgrad)(const WgradArgsOf<Value>&, Parallel);
};

// One table per capability, each in its own translation unit.
extern const ConvKernelsOf<float> conv_kernels_default;
#if defined(__x86_64__)
extern const ConvKernelsOf<float> conv_kernels_avx2;
extern const ConvKernelsOf<float> conv_kernels_avx512;
extern const ConvKernelsOf<Bfloat16>
    conv_kernels_avx512_bf16;  // without functions where the compiler was too old for them
#endif

}  // namespace fusedres
