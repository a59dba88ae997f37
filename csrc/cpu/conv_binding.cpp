// The native convolutions as operators: checks shapes and layouts, and hands the kernels plain pointers.
#include <torch/csrc/stable/library.h>

#include <array>
#include <cstring>
#include <vector>

#include "../tape.h"
#include "capability.h"
#include "conv.h"
#include "kept.h"
#include "norm.h"
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

// The number of a convolution's groups, and the geometry of one.
struct Groups {
  int64_t count;
  Geometry2d g;
};

// `geometry` holds stride, padding and dilation, two each, and the number of groups where there are several.
Groups groups_of(const Tensor& in, const Tensor& out, const Tensor& weight, const std::vector<int64_t>& v) {
  STD_TORCH_CHECK(
      v.size() == 6 || (v.size() == 7 && v[6] > 0),
      "geometry must hold stride, padding and dilation, two numbers each, and at most the number of groups");
  const int64_t count = v.size() == 6 ? 1 : v[6];
  STD_TORCH_CHECK(in.size(1) % count == 0 && out.size(1) % count == 0, "maps of ", in.size(1), " and ", out.size(1),
                  " channels do not fall into ", count, " groups");
  const Geometry2d g{in.size(0),
                     in.size(2),
                     in.size(3),
                     in.size(1) / count,
                     out.size(2),
                     out.size(3),
                     out.size(1) / count,
                     weight.size(2),
                     weight.size(3),
                     v[0],
                     v[1],
                     v[2],
                     v[3],
                     v[4],
                     v[5]};
  const auto size = [](int64_t n, int64_t k, int64_t s, int64_t p, int64_t d) {
    return (n + 2 * p - d * (k - 1) - 1) / s + 1;
  };
  STD_TORCH_CHECK(weight.size(0) == out.size(1) && weight.size(1) == g.in_c && out.size(0) == g.batch &&
                      g.out_h == size(g.in_h, g.kernel_h, g.stride_h, g.pad_h, g.dilation_h) &&
                      g.out_w == size(g.in_w, g.kernel_w, g.stride_w, g.pad_w, g.dilation_w),
                  "input, weight and output do not belong to one convolution");
  if (in.scalar_type() == ScalarType::BFloat16 && !is_depthwise(g, count))
    STD_TORCH_CHECK(g.in_c % 2 == 0 && g.out_c % 2 == 0, "bfloat16 convolutions take even numbers of channels, found ",
                    g.in_c, " and ", g.out_c);
  STD_TORCH_CHECK(g.kernel_h <= 16 && g.kernel_w <= 16 && g.stride_h * g.stride_w <= 16,
                  "kernel or stride beyond the native kernels");
  return {count, g};
}

// What the output is multiplied by and moved by, channel by channel; null without.
struct ScaleShift {
  float *scale, *shift;
};

// What changes with a weight: how often it was written into, as torch counts, and some of its values, since torch does
// not count every write.
template <class Value>
int64_t version_of(const Tensor& t, const WeightOf<Value>& w) {
  constexpr int64_t kLooks = 32;
  std::array<StableIValue, 1> stack{torch::stable::detail::from(t)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::_version", "", stack.data(), TORCH_ABI_VERSION));
  auto version = static_cast<uint64_t>(torch::stable::detail::to<int64_t>(stack[0]));
  const int64_t count = t.numel(), columns = t.size(3), pixels = t.size(2) * columns, row = t.size(1) * pixels;
  for (int64_t look = 0; look < kLooks && count > 0; ++look) {
    const int64_t i = look * (count - 1) / (kLooks - 1);
    const Value* at =
        w.data + i / row * w.so + i % row / pixels * w.si + i % pixels / columns * w.sh + i % columns * w.sw;
    uint32_t bits = 0;
    std::memcpy(&bits, at, sizeof(Value));
    version = (version ^ bits) * 0x9E3779B97F4A7C15u;
    version ^= version >> 32;
  }
  return static_cast<int64_t>(version);
}

void forward(const Tensor& x, const OptionalTensor& scale_shift, const Activation& act, const Tensor& weight,
             const OptionalTensor& bias, const std::vector<int64_t>& geometry, const Tensor& out,
             const OptionalTensor& stats, const ScaleShift& behind, const OptionalTensor& residual,
             const OptionalTensor& residual_scale_shift, const Activation& out_act) {
  with_type(x, [&](auto type) {
    using Value = decltype(type);
    ForwardArgsOf<Value> a{};
    const Groups groups = groups_of(x, out, weight, geometry);
    const int64_t channels = out.size(1);
    a.g = groups.g;
    a.groups = groups.count;
    a.x = lazy_map<Value>(x, scale_shift, act);
    a.weight = weight_of<Value>(weight);
    a.out = conv_map_of<Value>(out, "out");
    if (bias.has_value()) {
      STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == channels && (channels <= 1 || bias->stride(0) == 1),
                      "bias must hold ", channels, " channels side by side");
      a.bias = data<Value>(*bias, "bias");
    }
    a.mean = row_or_null(stats, 2, 0, channels, "stats");
    a.m2 = row_or_null(stats, 2, 1, channels, "stats");
    a.out_scale = behind.scale;
    a.out_shift = behind.shift;
    a.residual = map_or_null<Value>(residual, out, "residual");
    a.residual_scale = row_or_null(residual_scale_shift, 2, 0, channels, "residual_scale_shift");
    a.residual_shift = row_or_null(residual_scale_shift, 2, 1, channels, "residual_scale_shift");
    a.out_act = out_act;
    const auto kept = find_kept(weight.data_ptr());
    a.kept = kept.get();
    a.version = kept == nullptr ? 0 : version_of(weight, a.weight);
    kernels<Value>().forward(a, parallel);
  });
}

void conv_forward(const Tensor& x, const OptionalTensor& scale_shift, int64_t act, double slope, const Tensor& weight,
                  const OptionalTensor& bias, std::vector<int64_t> geometry, Tensor out, const OptionalTensor& stats,
                  const OptionalTensor& out_scale_shift, const OptionalTensor& residual,
                  const OptionalTensor& residual_scale_shift, int64_t out_act, double out_slope) {
  const int64_t channels = out.size(1);
  const ScaleShift behind{row_or_null(out_scale_shift, 2, 0, channels, "out_scale_shift"),
                          row_or_null(out_scale_shift, 2, 1, channels, "out_scale_shift")};
  forward(x, scale_shift, activation_of(act, slope), weight, bias, geometry, out, stats, behind, residual,
          residual_scale_shift, activation_of(out_act, out_slope));
}

void conv_norm_forward(const Tensor& x, const OptionalTensor& scale_shift, int64_t act, double slope,
                       const Tensor& weight, const OptionalTensor& bias, std::vector<int64_t> geometry, Tensor out,
                       const OptionalTensor& norm_weight, const OptionalTensor& norm_bias, const Tensor& running_mean,
                       const Tensor& running_var, double eps, const OptionalTensor& residual,
                       const OptionalTensor& residual_scale_shift, int64_t out_act, double out_slope) {
  const int64_t channels = out.size(1);
  std::vector<float> numbers(2 * channels);
  const ScaleShift behind{numbers.data(), numbers.data() + channels};
  frozen_scale_shift(norm_weight, norm_bias, running_mean, running_var, eps, channels, behind.scale, behind.shift);
  forward(x, scale_shift, activation_of(act, slope), weight, bias, geometry, out, std::nullopt, behind, residual,
          residual_scale_shift, activation_of(out_act, out_slope));
}

void conv_dgrad(const Tensor& grad, const OptionalTensor& raw, const OptionalTensor& coeff, const Tensor& weight,
                std::vector<int64_t> geometry, Tensor dx, const OptionalTensor& x, const OptionalTensor& scale_shift,
                int64_t act, double slope, const OptionalTensor& mean_invstd, const OptionalTensor& base,
                bool accumulate, bool scaled, const OptionalTensor& sums) {
  with_type(grad, [&](auto type) {
    using Value = decltype(type);
    DgradArgsOf<Value> a{};
    const Groups groups = groups_of(dx, grad, weight, geometry);
    const int64_t channels = dx.size(1);
    a.g = groups.g;
    a.groups = groups.count;
    a.grad = lazy_grad<Value>(grad, raw, coeff);
    a.weight = weight_of<Value>(weight);
    a.dx = conv_map_of<Value>(dx, "dx");
    a.x = map_or_null<Value>(x, dx, "x");
    a.scale = row_or_null(scale_shift, 2, 0, channels, "scale_shift");
    a.shift = row_or_null(scale_shift, 2, 1, channels, "scale_shift");
    a.act = activation_of(act, slope);
    if (sums.has_value()) {
      STD_TORCH_CHECK(x.has_value() && mean_invstd.has_value(), "sums need x and mean_invstd");
      a.mean = row_or_null(mean_invstd, 2, 0, channels, "mean_invstd");
      a.invstd = row_or_null(mean_invstd, 2, 1, channels, "mean_invstd");
      a.sum_dz = row_or_null(sums, 2, 0, channels, "sums");
      a.sum_dz_xhat = row_or_null(sums, 2, 1, channels, "sums");
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
    const Groups groups = groups_of(x, grad, dweight, geometry);
    a.g = groups.g;
    a.groups = groups.count;
    a.grad = lazy_grad<Value>(grad, raw, coeff);
    a.x = lazy_map<Value>(x, scale_shift, activation_of(act, slope));
    a.dweight = weight_of<Value>(dweight);
    kernels<Value>().wgrad(a, parallel);
  });
}

const bool kOnTape[] = {
    on_tape<&conv_forward>("conv_forward"),
    on_tape<&conv_norm_forward>("conv_norm_forward"),
    on_tape<&conv_dgrad>("conv_dgrad"),
    on_tape<&conv_wgrad>("conv_wgrad"),
};

}  // namespace
}  // namespace fusedres

STABLE_TORCH_LIBRARY_FRAGMENT(fusedres_cpp, m) {
  m.def(
      "conv_forward(Tensor x, Tensor? scale_shift, int act, float slope, Tensor weight, Tensor? bias, int[] geometry, "
      "Tensor(a!) out, Tensor(b!)? stats, "
      "Tensor? out_scale_shift, Tensor? residual, Tensor? residual_scale_shift, int out_act, float out_slope) -> ()");
  m.def(
      "conv_norm_forward(Tensor x, Tensor? scale_shift, int act, float slope, Tensor weight, Tensor? bias, int[] "
      "geometry, Tensor(a!) out, Tensor? norm_weight, Tensor? norm_bias, Tensor running_mean, Tensor running_var, "
      "float eps, Tensor? residual, Tensor? residual_scale_shift, int out_act, float out_slope) -> ()");
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
  m.impl("conv_norm_forward", TORCH_BOX(&fusedres::conv_norm_forward));
  m.impl("conv_dgrad", TORCH_BOX(&fusedres::conv_dgrad));
  m.impl("conv_wgrad", TORCH_BOX(&fusedres::conv_wgrad));
}
