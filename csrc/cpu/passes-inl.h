// The passes over channels_last maps.
//
// One mechanism for all of them. The rows are cut into tiles and the channels into chunks; a thread takes one (tile,
// chunk) after the other and walks it row by row: every map is read and written once, in the order of memory (several
// rows at a time would reload the per-channel vectors less often, but measured three times slower, because prefetchers
// and store buffers follow one stream per map). Where a map has few channels, several rows are folded into one long row
// with repeated per-channel vectors. Some rows make a block.
//
// Sums are taken in float over one block and in double from there on. Statistics are (count, mean, M2) per block,
// merged by Chan's formula in double (Chan, Golub and LeVeque 1983). Partial results are merged in the order of the
// tiles, and the tiles depend on shapes alone: the result has the same bits for any number of threads.
#pragma once

#include "pass_pool-inl.h"
#include "pass_rows-inl.h"

namespace fusedres {
namespace FUSEDRES_CAPABILITY {
namespace {

void statistics(const PassArgs& a, Parallel parallel) { run<Nothing>(a, parallel); }

template <bool kScaleShift>
void add_act_forward_of(const PassArgs& a, bool residual, bool residual_scale_shift, Parallel parallel) {
  if (!residual) run<AddActForward<kScaleShift, Residual::none, false>>(a, parallel);
  else if (!residual_scale_shift) run<AddActForward<kScaleShift, Residual::plain, false>>(a, parallel);
  else run<AddActForward<kScaleShift, Residual::scale_shift, false>>(a, parallel);
}

// Behind an activation beyond ReLU there are fewer kernels: what is absent has the constants 1 and 0, and a sum that
// nobody reads is taken.
void add_act_forward(const PassArgs& a, bool scale_shift, bool residual, bool residual_scale_shift, Parallel parallel) {
  if (a.act.is_other()) {
    if (residual) run<AddActForward<true, Residual::scale_shift, true>>(a, parallel);
    else run<AddActForward<true, Residual::none, true>>(a, parallel);
  } else if (scale_shift) add_act_forward_of<true>(a, residual, residual_scale_shift, parallel);
  else add_act_forward_of<false>(a, residual, residual_scale_shift, parallel);
}

template <Mask kMask, Residual kResidual>
void add_act_backward_of(const PassArgs& a, int sums, Parallel parallel) {
  if constexpr (kMask == Mask::none || kResidual != Residual::none) {
    if (sums == 3) return run<AddActBackward<kMask, kResidual, 3>>(a, parallel);
  }
  if (sums == 2) run<AddActBackward<kMask, kResidual, 2>>(a, parallel);
  else run<AddActBackward<kMask, kResidual, 0>>(a, parallel);
}

void add_act_backward(const PassArgs& a, bool residual, bool residual_scale_shift, int sums, Parallel parallel) {
  if (a.act.is_other()) {
    if (residual) run<AddActBackward<Mask::other, Residual::scale_shift, 3>>(a, parallel);
    else run<AddActBackward<Mask::other, Residual::none, 2>>(a, parallel);
  } else if (!a.act.is_relu()) add_act_backward_of<Mask::none, Residual::none>(a, sums, parallel);
  else if (!residual) add_act_backward_of<Mask::relu, Residual::none>(a, sums, parallel);
  else if (residual_scale_shift) add_act_backward_of<Mask::relu, Residual::scale_shift>(a, sums, parallel);
  else add_act_backward_of<Mask::relu, Residual::plain>(a, sums, parallel);
}

void highway_forward(const PassArgs& a, bool relu, Parallel parallel) {
  if (relu) run<HighwayForward<true>>(a, parallel);
  else run<HighwayForward<false>>(a, parallel);
}

void highway_backward(const PassArgs& a, bool relu, Parallel parallel) {
  if (relu) run<HighwayBackward<true>>(a, parallel);
  else run<HighwayBackward<false>>(a, parallel);
}

void apply_grad_coeff(const PassArgs& a, bool raw, Parallel parallel) {
  if (raw) run<ApplyGradCoeff<true>>(a, parallel);
  else run<ApplyGradCoeff<false>>(a, parallel);
}

template <Mask kMask, bool kReduce>
void dgrad_epilogue_of(const PassArgs& a, bool base, Parallel parallel) {
  if (base) run<DgradEpilogue<kMask, kReduce, true>>(a, parallel);
  else run<DgradEpilogue<kMask, kReduce, false>>(a, parallel);
}

void dgrad_epilogue(const PassArgs& a, bool sums, bool base, Parallel parallel) {
  if (a.act.is_other()) dgrad_epilogue_of<Mask::other, true>(a, base, parallel);
  else if (a.act.is_relu() && sums) dgrad_epilogue_of<Mask::relu, true>(a, base, parallel);
  else if (a.act.is_relu()) dgrad_epilogue_of<Mask::relu, false>(a, base, parallel);
  else if (sums) dgrad_epilogue_of<Mask::none, true>(a, base, parallel);
  else dgrad_epilogue_of<Mask::none, false>(a, base, parallel);
}

void pool_forward(const PoolArgs& a, Parallel parallel) {
  switch (a.pass.storage) {
    case Storage::f32: return pool_forward_of<float>(a, parallel);
    case Storage::f64: return pool_forward_of<double>(a, parallel);
    case Storage::bf16: return pool_forward_of<Bfloat16>(a, parallel);
    case Storage::f16: return pool_forward_of<Float16>(a, parallel);
  }
}

void pool_backward(const PoolArgs& a, bool sums, bool write, Parallel parallel) {
  switch (a.pass.storage) {
    case Storage::f32: return pool_backward_modes<float>(a, sums, write, parallel);
    case Storage::f64: return pool_backward_modes<double>(a, sums, write, parallel);
    case Storage::bf16: return pool_backward_modes<Bfloat16>(a, sums, write, parallel);
    case Storage::f16: return pool_backward_modes<Float16>(a, sums, write, parallel);
  }
}

constexpr PassKernels pass_kernels = {statistics,      add_act_forward,  add_act_backward,
                                      highway_forward, highway_backward, apply_grad_coeff,
                                      dgrad_epilogue,  pool_forward,     pool_backward};

}  // namespace
}  // namespace FUSEDRES_CAPABILITY
}  // namespace fusedres
