// Convolutions in groups: what a block of groups reads and writes.
#pragma once

#include <cstdint>

#include "conv_grid-inl.h"
#include "conv_pixel-inl.h"

namespace fusedres {
namespace FUSEDRES_CAPABILITY {
namespace {

// What begins so many channels on; null stays null.
template <class T>
T* from(T* row, int64_t channels) {
  return row == nullptr ? nullptr : row + channels;
}
inline Map from(const Map& map, int64_t channels) { return {from(map.data, channels), map.stride}; }
inline Source from(const Source& s, int64_t channels) {
  return {from(s.map, channels),   from(s.second, channels), from(s.scale, channels),
          from(s.shift, channels), from(s.q, channels),      s.act};
}
inline Weight from(const Weight& w, int64_t channels) { return {w.data + channels * w.so, w.so, w.si, w.sh, w.sw}; }

// A block of `groups` groups as a convolution of its own.
inline ForwardArgs block_of(const ForwardArgs& a, int64_t groups, int64_t block) {
  const int64_t in = block * groups * a.g.in_c, to = block * groups * a.g.out_c;
  ForwardArgs of = a;
  of.groups = groups;
  of.x = from(a.x, in);
  of.weight = from(a.weight, to);
  of.out = from(a.out, to);
  of.bias = from(a.bias, to);
  of.mean = from(a.mean, to);
  of.m2 = from(a.m2, to);
  of.out_scale = from(a.out_scale, to);
  of.out_shift = from(a.out_shift, to);
  of.residual = from(a.residual, to);
  of.residual_scale = from(a.residual_scale, to);
  of.residual_shift = from(a.residual_shift, to);
  return of;
}
inline DgradArgs block_of(const DgradArgs& a, int64_t groups, int64_t block) {
  const int64_t to = block * groups * a.g.in_c, out = block * groups * a.g.out_c;
  DgradArgs of = a;
  of.groups = groups;
  of.grad = from(a.grad, out);
  of.weight = from(a.weight, out);
  of.dx = from(a.dx, to);
  of.x = from(a.x, to);
  of.scale = from(a.scale, to);
  of.shift = from(a.shift, to);
  of.mean = from(a.mean, to);
  of.invstd = from(a.invstd, to);
  of.sum_dz = from(a.sum_dz, to);
  of.sum_dz_xhat = from(a.sum_dz_xhat, to);
  of.base = from(a.base, to);
  return of;
}
inline WgradArgs block_of(const WgradArgs& a, int64_t groups, int64_t block) {
  const int64_t in = block * groups * a.g.in_c, out = block * groups * a.g.out_c;
  WgradArgs of = a;
  of.groups = groups;
  of.grad = from(a.grad, out);
  of.x = from(a.x, in);
  of.dweight = from(a.dweight, out);
  return of;
}

}  // namespace
}  // namespace FUSEDRES_CAPABILITY
}  // namespace fusedres
