// The activations: what the bindings and the per-capability kernels agree on.
#pragma once

#include <cstdint>

namespace fusedres {

// One row per activation. Its place is the number by which operators are told of it, its name what Python calls it
// (_C.activations()); its value and gradient are in activation-inl.h.
#define FUSEDRES_ACTIVATIONS(row) \
  row(none) row(relu) row(leaky_relu) row(relu6) row(hardswish) row(silu) row(gelu) row(gelu_tanh) row(mish)

#define FUSEDRES_ROW(name) name,
enum class Act : int64_t { FUSEDRES_ACTIVATIONS(FUSEDRES_ROW) };
#undef FUSEDRES_ROW

#define FUSEDRES_ROW(name) #name,
constexpr const char* kActivationNames[] = {FUSEDRES_ACTIVATIONS(FUSEDRES_ROW)};
#undef FUSEDRES_ROW

constexpr int64_t kActivations = sizeof(kActivationNames) / sizeof(kActivationNames[0]);

struct Activation {
  Act kind;
  double slope;  // of a leaky ReLU, where z is negative

  bool is_relu() const { return kind == Act::relu; }
  // Beyond none and ReLU, which the kernels compute in passing: a step of its own on rows that are in cache.
  bool is_other() const { return kind != Act::none && kind != Act::relu; }
};

}  // namespace fusedres
