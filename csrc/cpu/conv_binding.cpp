// The native convolutions as operators: checks shapes and layouts, and hands the kernels plain pointers.
#include <torch/csrc/stable/library.h>

#include <vector>

#include "capability.h"
#include "conv.h"
#include "tensors.h"

namespace fusedres {
namespace {

template <class Value>
constexpr ScalarType kType = ScalarType::Float;
template <>
constexpr ScalarType kType<Bfloat16> = ScalarType::BFloat16;
template <class Value>
constexpr const char* kTypeName = "float32";
template <>
constexpr const char* kTypeName<Bfloat16> = "bfloat16, as the other maps are";

template <class Value>
const ConvKernelsOf<Value>& kernels();
template <>
const ConvKernelsOf<float>& kernels() {
#if defined(__x86_64__)
  switch (cpu_capability()) {
    case Capability::avx512_bf16:
    case Capability::avx512: return conv_kernels_avx512;
    case Capability::avx2: return conv_kernels_avx2;
    case Capability::baseline: break;
  }
#endif
  return conv_kernels_default;
}
template <>
const ConvKernelsOf<Bfloat16>& kernels() {
#if defined(__x86_64__)
  if (cpu_capability() == Capability::avx512_bf16) return conv_kernels_avx512_bf16;
#endif
  STD_TORCH_CHECK(false, "bfloat16 convolutions need the CPU capability avx512_bf16, found ",
                  capability_name(cpu_capability()));
}

template <class Value>
Value* data(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == kType<Value>, name, " must be ", kTypeName<Value>);
  return static_cast<Value*>(t.data_ptr());
}

template <class Value>
MapOf<Value> conv_map_of(const Tensor& t, const char* name) {
  Value* values = data<Value>(t, name);
  return {values, map_of(t, name).pitch};
}

// A map with the shape of `like`, null where there is none.
template <class Value>
MapOf<Value> map_or_null(const OptionalTensor& t, const Tensor& like, const char* name) {
  if (!t.has_value()) return {nullptr, 0};
  const MapOf<Value> map = conv_map_of<Value>(*t, name);
  check_shape(*t, like, name);
  return map;
}

// Row `row` of a per-channel tensor of `rows`, null where there is none.
float* row_or_null(const OptionalTensor& t, int64_t rows, int64_t row, int64_t channels, const char* name) {
  return t.has_value() ? static_cast<float*>(row_of(*t, rows, row, channels, ScalarType::Float, name)) : nullptr;
}

template <class Value>
WeightOf<Value> weight_of(const Tensor& t) {
  STD_TORCH_CHECK(t.dim() == 4, "weight must have 4 dimensions, found ", t.dim());
  return {data<Value>(t, "weight"), t.stride(0), t.stride(1), t.stride(2), t.stride(3)};
}

template <class Value>
SourceOf<Value> lazy_map(const Tensor& x, const OptionalTensor& scale_shift, const Activation& act) {
  const int64_t c = x.size(1);
  return {conv_map_of<Value>(x, "x"),
          {nullptr, 0},
          row_or_null(scale_shift, 2, 0, c, "scale_shift"),
          row_or_null(scale_shift, 2, 1, c, "scale_shift"),
          nullptr,
          act};
}

template <class Value>
SourceOf<Value> lazy_grad(const Tensor& grad, const OptionalTensor& raw, const OptionalTensor& coeff) {
  const int64_t c = grad.size(1);
  return {conv_map_of<Value>(grad, "grad"),     map_or_null<Value>(raw, grad, "raw"),
          row_or_null(coeff, 3, 0, c, "coeff"), row_or_null(coeff, 3, 2, c, "coeff"),
          row_or_null(coeff, 3, 1, c, "coeff"), {}};
}

// body(a value of the maps' type).
template <class F>
void with_type(const Tensor& map, F&& body) {
  if (map.scalar_type() == ScalarType::BFloat16) return body(Bfloat16{});
  body(float{});
}

// `geometry` holds stride, padding and dilation, two each.
Geometry2d geometry_of(const Tensor& in, const Tensor& out, const Tensor& weight, const std::vector<int64_t>& v) {
  STD_TORCH_CHECK(v.size() == 6, "geometry must hold stride, padding and dilation, two numbers each");
  const Geometry2d g{in.size(0),  in.size(2),  in.size(3),     in.size(1),     out.size(2),
                     out.size(3), out.size(1), weight.size(2), weight.size(3), v[0],
                     v[1],        v[2],        v[3],           v[4],           v[5]};
  const auto size = [](int64_t n, int64_t k, int64_t s, int64_t p, int64_t d) {
    return (n + 2 * p - d * (k - 1) - 1) / s + 1;
  };
  STD_TORCH_CHECK(weight.size(0) == g.out_c && weight.size(1) == g.in_c && out.size(0) == g.batch &&
                      g.out_h == size(g.in_h, g.kernel_h, g.stride_h, g.pad_h, g.dilation_h) &&
                      g.out_w == size(g.in_w, g.kernel_w, g.stride_w, g.pad_w, g.dilation_w),
                  "input, weight and output do not belong to one convolution");
  if (in.scalar_type() == ScalarType::BFloat16)
    STD_TORCH_CHECK(g.in_c % 2 == 0 && g.out_c % 2 == 0, "bfloat16 convolutions take even numbers of channels, found ",
                    g.in_c, " and ", g.out_c);
  STD_TORCH_CHECK(g.kernel_h <= 16 && g.kernel_w <= 16 && g.stride_h * g.stride_w <= 16,
                  "kernel or stride beyond the native kernels");
  return g;
}

void conv_forward(const Tensor& x, const OptionalTensor& scale_shift, int64_t act, double slope, const Tensor& weight,
                  const OptionalTensor& bias, std::vector<int64_t> geometry, Tensor out, const OptionalTensor& stats,
                  const OptionalTensor& out_scale_shift, const OptionalTensor& residual,
                  const OptionalTensor& residual_scale_shift, int64_t out_act, double out_slope) {
  with_type(x, [&](auto type) {
    using Value = decltype(type);
    ForwardArgsOf<Value> a{};
    a.g = geometry_of(x, out, weight, geometry);
    a.x = lazy_map<Value>(x, scale_shift, activation_of(act, slope));
    a.weight = weight_of<Value>(weight);
    a.out = conv_map_of<Value>(out, "out");
    if (bias.has_value()) {
      STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == a.g.out_c && (a.g.out_c <= 1 || bias->stride(0) == 1),
                      "bias must hold ", a.g.out_c, " channels side by side");
      a.bias = data<Value>(*bias, "bias");
    }
    a.mean = row_or_null(stats, 2, 0, a.g.out_c, "stats");
    a.m2 = row_or_null(stats, 2, 1, a.g.out_c, "stats");
    a.out_scale = row_or_null(out_scale_shift, 2, 0, a.g.out_c, "out_scale_shift");
    a.out_shift = row_or_null(out_scale_shift, 2, 1, a.g.out_c, "out_scale_shift");
    a.residual = map_or_null<Value>(residual, out, "residual");
    a.residual_scale = row_or_null(residual_scale_shift, 2, 0, a.g.out_c, "residual_scale_shift");
    a.residual_shift = row_or_null(residual_scale_shift, 2, 1, a.g.out_c, "residual_scale_shift");
    a.out_act = activation_of(out_act, out_slope);
    kernels<Value>().forward(a, parallel);
  });
}

void conv_dgrad(const Tensor& grad, const OptionalTensor& raw, const OptionalTensor& coeff, const Tensor& weight,
                std::vector<int64_t> geometry, Tensor dx, const OptionalTensor& x, const OptionalTensor& scale_shift,
                int64_t act, double slope, const OptionalTensor& mean_invstd, const OptionalTensor& base,
                bool accumulate, bool scaled, const OptionalTensor& sums) {
  with_type(grad, [&](auto type) {
    using Value = decltype(type);
    DgradArgsOf<Value> a{};
    a.g = geometry_of(dx, grad, weight, geometry);
    a.grad = lazy_grad<Value>(grad, raw, coeff);
    a.weight = weight_of<Value>(weight);
    a.dx = conv_map_of<Value>(dx, "dx");
    a.x = map_or_null<Value>(x, dx, "x");
    a.scale = row_or_null(scale_shift, 2, 0, a.g.in_c, "scale_shift");
    a.shift = row_or_null(scale_shift, 2, 1, a.g.in_c, "scale_shift");
    a.act = activation_of(act, slope);
    if (sums.has_value()) {
      STD_TORCH_CHECK(x.has_value() && mean_invstd.has_value(), "sums need x and mean_invstd");
      a.mean = row_or_null(mean_invstd, 2, 0, a.g.in_c, "mean_invstd");
      a.invstd = row_or_null(mean_invstd, 2, 1, a.g.in_c, "mean_invstd");
      a.sum_dz = row_or_null(sums, 2, 0, a.g.in_c, "sums");
      a.sum_dz_xhat = row_or_null(sums, 2, 1, a.g.in_c, "sums");
    }
    a.base = map_or_null<Value>(base, dx, "base");
    a.accumulate = accumulate;
    a.scaled = scaled;
    kernels<Value>().dgrad(a, parallel);
  });
}

void conv_wgrad(const Tensor& grad, const OptionalTensor& raw, const OptionalTensor& coeff, const Tensor& x,
                const OptionalTensor& scale_shift, int64_t act, double slope, std::vector<int64_t> geometry,
                Tensor dweight) {
  with_type(grad, [&](auto type) {
    using Value = decltype(type);
    WgradArgsOf<Value> a{};
    a.g = geometry_of(x, grad, dweight, geometry);
    a.grad = lazy_grad<Value>(grad, raw, coeff);
    a.x = lazy_map<Value>(x, scale_shift, activation_of(act, slope));
    a.dweight = weight_of<Value>(dweight);
    kernels<Value>().wgrad(a, parallel);
  });
}

}  // namespace
}  // namespace fusedres

STABLE_TORCH_LIBRARY_FRAGMENT(fusedres_cpp, m) {
  m.def(
      "conv_forward(Tensor x, Tensor? scale_shift, int act, float slope, Tensor weight, Tensor? bias, int[] geometry, "
      "Tensor(a!) out, Tensor(b!)? stats, "
      "Tensor? out_scale_shift, Tensor? residual, Tensor? residual_scale_shift, int out_act, float out_slope) -> ()");
  m.def(
      "conv_dgrad(Tensor grad, Tensor? raw, Tensor? coeff, Tensor weight, int[] geometry, Tensor(a!) dx, Tensor? x, "
      "Tensor? scale_shift, "
      "int act, float slope, Tensor? mean_invstd, Tensor? base, bool accumulate, bool scaled, Tensor(b!)? sums) -> ()");
  m.def(
      "conv_wgrad(Tensor grad, Tensor? raw, Tensor? coeff, Tensor x, Tensor? scale_shift, int act, float slope, int[] "
      "geometry, Tensor(a!) dweight) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fusedres_cpp, CPU, m) {
  m.impl("conv_forward", TORCH_BOX(&fusedres::conv_forward));
  m.impl("conv_dgrad", TORCH_BOX(&fusedres::conv_dgrad));
  m.impl("conv_wgrad", TORCH_BOX(&fusedres::conv_wgrad));
}
