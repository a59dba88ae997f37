// The activations: what the bindings and the per-capability kernels agree on.
#pragma once

#include <cstdint>

namespace fusedres {

// In the order of KINDS in fusedres/activations.py.
enum class Act : int64_t { none, relu, leaky_relu, relu6, hardswish, silu, gelu, gelu_tanh };
constexpr int64_t kActs = 8;

struct Activation {
  Act kind;
  double slope;  // of a leaky ReLU, where z is negative

  bool is_relu() const { return kind == Act::relu; }
  // Beyond none and ReLU, which the kernels compute in passing: a step of its own on rows that are in cache.
  bool is_other() const { return kind != Act::none && kind != Act::relu; }
};

}  // namespace fusedres
