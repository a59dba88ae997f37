// The passes over channels_last maps: what the binding and the per-capability kernels agree on.
//
// A map is `rows` rows of `channels` values, `pitch` values apart. Arithmetic and every per-channel vector are double
// for f64 maps and float for the others. Nothing here depends on torch, so that the kernels can be compiled once per
// CPU capability.
#pragma once

#include <cstdint>

#include "activation.h"
#include "parallel.h"
#include "storage.h"

namespace fusedres {

struct Rows {
  void* data;  // null: absent
  int64_t pitch;
};

// A per-channel vector that a pass reads; where data is null, every channel has the value `otherwise`.
struct Constant {
  const void* data;
  double otherwise;
};

// What a reduction writes: the sum times `factor` (null: 1), per channel. Not written where data is null.
struct Sum {
  void* data;
  const void* factor;
};

constexpr int kMaxInputs = 4, kMaxConstants = 6, kMaxSums = 4, kMaxMore = 2;

// One pass. Which inputs, constants and sums there are, in which order, is said at the operations in pass_ops-inl.h.
struct PassArgs {
  Storage storage;
  int64_t rows, channels;
  Rows in[kMaxInputs];
  Rows out;
  Rows more[kMaxMore];  // the outputs behind the first, of operations that write several
  Constant constants[kMaxConstants];
  Sum sums[kMaxSums];
  Activation act;
  Rows measured;  // the map whose statistics are taken: x, or out as it was stored; data null: none
  void* mean;
  void* m2;
};

// A pooling window over maps of batch x height x width pixels.
struct PoolArgs {
  PassArgs pass;  // rows: pixels of out in the forward, of x in the backward; in[0]: x; in[1]: grad (backward)
  int64_t batch, in_h, in_w, out_h, out_w;
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w;
  uint8_t* index;  // of the maxima, channels_last; null: mean
  int64_t index_pitch;
};

struct PassKernels {
  void (*statistics)(const PassArgs&, Parallel);
  void (*add_act_forward)(const PassArgs&, bool scale_shift, bool residual, bool residual_scale_shift, Parallel);
  void (*add_act_backward)(const PassArgs&, bool residual, bool residual_scale_shift, int sums, Parallel);
  void (*highway_forward)(const PassArgs&, bool relu, Parallel);
  void (*highway_backward)(const PassArgs&, bool relu, Parallel);
  void (*apply_grad_coeff)(const PassArgs&, bool raw, Parallel);
  void (*dgrad_epilogue)(const PassArgs&, bool sums, bool base, Parallel);
  void (*pool_forward)(const PoolArgs&, Parallel);
  void (*pool_backward)(const PoolArgs&, bool sums, bool write, Parallel);
};

// One table per capability, each in its own translation unit.
extern const PassKernels pass_kernels_default;
#if defined(__x86_64__)
extern const PassKernels pass_kernels_avx2;
extern const PassKernels pass_kernels_avx512;
#endif

}  // namespace fusedres
