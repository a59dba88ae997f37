// The native convolutions as operators: checks shapes and layouts, and hands the kernels plain pointers.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "capability.h"
#include "conv.h"
#include "tensors.h"

namespace fusedres {
namespace {

using torch::stable::Tensor;

void parallel(int64_t n, void (*body)(void*, int64_t, int64_t), void* context) {
  torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) { body(context, begin, end); });
}

template <class Value>
constexpr torch::headeronly::ScalarType kType = torch::headeronly::ScalarType::Float;
template <>
constexpr torch::headeronly::ScalarType kType<Bfloat16> = torch::headeronly::ScalarType::BFloat16;
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
    default: break;
  }
#endif
  return conv_kernels_default;
}
template <>
const ConvKernelsOf<Bfloat16>& kernels() {
#if defined(__x86_64__)
  if (cpu_capability() == Capability::avx512_bf16) return conv_kernels_avx512_bf16;
#endif
  STD_TORCH_CHECK(false, "bfloat16 convolutions need the CPU capability avx512_bf16, found ", capability_name(cpu_capability()));
}

template <class Value>
Value* data(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == kType<Value>, name, " must be ", kTypeName<Value>);
  return static_cast<Value*>(t.data_ptr());
}

// A channels_last map or channel slice. Dimensions of one element have any stride.
template <class Value>
MapOf<Value> map_of(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.dim() == 4, name, " must have 4 dimensions, found ", t.dim());
  const int64_t n = t.size(0), c = t.size(1), h = t.size(2), w = t.size(3);
  int64_t pixel = c;
  if (w > 1) pixel = t.stride(3);
  else if (h > 1) pixel = t.stride(2);
  else if (n > 1) pixel = t.stride(0);
  const bool rows = (c == 1 || t.stride(1) == 1) && (h == 1 || t.stride(2) == pixel * w) && (n == 1 || t.stride(0) == pixel * w * h);
  STD_TORCH_CHECK(rows && pixel >= c, name, " must be channels_last or a channel slice of a channels_last map");
  return {data<Value>(t, name), pixel};
}

template <class Value>
MapOf<Value> map_or_null(const std::optional<Tensor>& t, const char* name) {
  return t.has_value() ? map_of<Value>(*t, name) : MapOf<Value>{nullptr, 0};
}

// Row `row` of a per-channel tensor, null where there is none.
float* row_of(const std::optional<Tensor>& t, int64_t row, int64_t channels, const char* name) {
  if (!t.has_value()) return nullptr;
  STD_TORCH_CHECK(t->scalar_type() == torch::headeronly::ScalarType::Float && t->dim() == 2 && t->size(0) > row && t->size(1) == channels &&
                      (channels == 1 || t->stride(1) == 1),
                  name, " must be float32 with ", channels, " channels side by side");
  return static_cast<float*>(t->data_ptr()) + row * t->stride(0);
}

template <class Value>
WeightOf<Value> weight_of(const Tensor& t) {
  STD_TORCH_CHECK(t.dim() == 4, "weight must have 4 dimensions, found ", t.dim());
  return {data<Value>(t, "weight"), t.stride(0), t.stride(1), t.stride(2), t.stride(3)};
}

template <class Value>
SourceOf<Value> plain_or_affine(const Tensor& x, const std::optional<Tensor>& affine, const Activation& act) {
  const int64_t c = x.size(1);
  return {map_of<Value>(x, "x"), {nullptr, 0}, row_of(affine, 0, c, "affine"), row_of(affine, 1, c, "affine"), nullptr, act};
}

template <class Value>
SourceOf<Value> pending(const Tensor& grad, const std::optional<Tensor>& raw, const std::optional<Tensor>& coeff) {
  const int64_t c = grad.size(1);
  return {map_of<Value>(grad, "grad"), map_or_null<Value>(raw, "raw"), row_of(coeff, 0, c, "coeff"), row_of(coeff, 2, c, "coeff"),
          row_of(coeff, 1, c, "coeff"), {}};
}

// body(a value of the maps' type).
template <class F>
void with_type(const Tensor& map, F&& body) {
  if (map.scalar_type() == torch::headeronly::ScalarType::BFloat16) return body(Bfloat16{});
  body(float{});
}

// `geometry` holds stride, padding and dilation, two each.
Geometry2d geometry_of(const Tensor& in, const Tensor& out, const Tensor& weight, const std::vector<int64_t>& v) {
  STD_TORCH_CHECK(v.size() == 6, "geometry must hold stride, padding and dilation, two numbers each");
  const Geometry2d g{in.size(0), in.size(2), in.size(3), in.size(1), out.size(2), out.size(3), out.size(1),
                     weight.size(2), weight.size(3), v[0], v[1], v[2], v[3], v[4], v[5]};
  const auto size = [](int64_t n, int64_t k, int64_t s, int64_t p, int64_t d) { return (n + 2 * p - d * (k - 1) - 1) / s + 1; };
  STD_TORCH_CHECK(weight.size(0) == g.out_c && weight.size(1) == g.in_c && out.size(0) == g.batch &&
                      g.out_h == size(g.in_h, g.kernel_h, g.stride_h, g.pad_h, g.dilation_h) &&
                      g.out_w == size(g.in_w, g.kernel_w, g.stride_w, g.pad_w, g.dilation_w),
                  "input, weight and output do not belong to one convolution");
  if (in.scalar_type() == torch::headeronly::ScalarType::BFloat16)
    STD_TORCH_CHECK(g.in_c % 2 == 0 && g.out_c % 2 == 0, "bfloat16 convolutions take even numbers of channels, found ", g.in_c, " and ", g.out_c);
  STD_TORCH_CHECK(g.kernel_h <= 16 && g.kernel_w <= 16 && g.stride_h * g.stride_w <= 16, "kernel or stride beyond the native kernels");
  return g;
}

void conv_forward(const Tensor& x, const std::optional<Tensor>& affine, int64_t act, double slope, const Tensor& weight, const std::optional<Tensor>& bias,
                  std::vector<int64_t> geometry, Tensor out, const std::optional<Tensor>& stats, const std::optional<Tensor>& out_affine,
                  const std::optional<Tensor>& residual, const std::optional<Tensor>& residual_affine, int64_t out_act, double out_slope) {
  with_type(x, [&](auto type) {
    using Value = decltype(type);
    ForwardArgsOf<Value> a{};
    a.g = geometry_of(x, out, weight, geometry);
    a.x = plain_or_affine<Value>(x, affine, activation_of(act, slope));
    a.weight = weight_of<Value>(weight);
    a.out = map_of<Value>(out, "out");
    a.bias = bias.has_value() ? data<Value>(*bias, "bias") : nullptr;
    a.mean = row_of(stats, 0, a.g.out_c, "stats");
    a.m2 = row_of(stats, 1, a.g.out_c, "stats");
    a.out_scale = row_of(out_affine, 0, a.g.out_c, "out_affine");
    a.out_shift = row_of(out_affine, 1, a.g.out_c, "out_affine");
    a.residual = map_or_null<Value>(residual, "residual");
    a.residual_scale = row_of(residual_affine, 0, a.g.out_c, "residual_affine");
    a.residual_shift = row_of(residual_affine, 1, a.g.out_c, "residual_affine");
    a.out_act = activation_of(out_act, out_slope);
    kernels<Value>().forward(a, parallel);
  });
}

void conv_dgrad(const Tensor& grad, const std::optional<Tensor>& raw, const std::optional<Tensor>& coeff, const Tensor& weight,
                std::vector<int64_t> geometry, Tensor dx, const std::optional<Tensor>& x, const std::optional<Tensor>& affine, int64_t act,
                double slope, const std::optional<Tensor>& saved, const std::optional<Tensor>& base, bool accumulate, bool scaled,
                const std::optional<Tensor>& sums) {
  with_type(grad, [&](auto type) {
    using Value = decltype(type);
    DgradArgsOf<Value> a{};
    a.g = geometry_of(dx, grad, weight, geometry);
    a.grad = pending<Value>(grad, raw, coeff);
    a.weight = weight_of<Value>(weight);
    a.dx = map_of<Value>(dx, "dx");
    a.x = map_or_null<Value>(x, "x");
    a.scale = row_of(affine, 0, a.g.in_c, "affine");
    a.shift = row_of(affine, 1, a.g.in_c, "affine");
    a.act = activation_of(act, slope);
    if (sums.has_value()) {
      STD_TORCH_CHECK(x.has_value() && saved.has_value(), "sums need x and saved");
      a.mean = row_of(saved, 0, a.g.in_c, "saved");
      a.invstd = row_of(saved, 1, a.g.in_c, "saved");
      a.sum_dz = row_of(sums, 0, a.g.in_c, "sums");
      a.sum_dz_xhat = row_of(sums, 1, a.g.in_c, "sums");
    }
    a.base = map_or_null<Value>(base, "base");
    a.accumulate = accumulate;
    a.scaled = scaled;
    kernels<Value>().dgrad(a, parallel);
  });
}

void conv_wgrad(const Tensor& grad, const std::optional<Tensor>& raw, const std::optional<Tensor>& coeff, const Tensor& x,
                const std::optional<Tensor>& affine, int64_t act, double slope, std::vector<int64_t> geometry, Tensor dweight) {
  with_type(grad, [&](auto type) {
    using Value = decltype(type);
    WgradArgsOf<Value> a{};
    a.g = geometry_of(x, grad, dweight, geometry);
    a.grad = pending<Value>(grad, raw, coeff);
    a.x = plain_or_affine<Value>(x, affine, activation_of(act, slope));
    a.dweight = weight_of<Value>(dweight);
    kernels<Value>().wgrad(a, parallel);
  });
}

}  // namespace
}  // namespace fusedres

STABLE_TORCH_LIBRARY_FRAGMENT(fusedres_cpp, m) {
  m.def(
      "conv_forward(Tensor x, Tensor? affine, int act, float slope, Tensor weight, Tensor? bias, int[] geometry, Tensor(a!) out, Tensor(b!)? stats, "
      "Tensor? out_affine, Tensor? residual, Tensor? residual_affine, int out_act, float out_slope) -> ()");
  m.def(
      "conv_dgrad(Tensor grad, Tensor? raw, Tensor? coeff, Tensor weight, int[] geometry, Tensor(a!) dx, Tensor? x, Tensor? affine, "
      "int act, float slope, Tensor? saved, Tensor? base, bool accumulate, bool scaled, Tensor(b!)? sums) -> ()");
  m.def(
      "conv_wgrad(Tensor grad, Tensor? raw, Tensor? coeff, Tensor x, Tensor? affine, int act, float slope, int[] geometry, Tensor(a!) dweight) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fusedres_cpp, CPU, m) {
  m.impl("conv_forward", TORCH_BOX(&fusedres::conv_forward));
  m.impl("conv_dgrad", TORCH_BOX(&fusedres::conv_dgrad));
  m.impl("conv_wgrad", TORCH_BOX(&fusedres::conv_wgrad));
}
