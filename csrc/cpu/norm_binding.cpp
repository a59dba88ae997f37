// The C-sized arithmetic of BatchNorm as operators. Everything is computed in double and rounded once.
#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cmath>
#include <vector>

#include "tensors.h"

namespace fusedres {
namespace {

// A per-channel vector of any floating dtype: a row of a per-channel tensor, a parameter or a running statistic.
struct VectorRef {
  void* data;
  int64_t stride;
  ScalarType dtype;
};

VectorRef parameter_of(const Tensor& t, int64_t channels, const char* name) {
  STD_TORCH_CHECK(t.dim() == 1 && t.size(0) == channels, name, " must hold ", channels, " channels, found ", t.numel(),
                  " elements");
  return {t.data_ptr(), t.stride(0), t.scalar_type()};
}

template <class F>
void dispatch(ScalarType dtype, const F& f) {
  switch (dtype) {
    case ScalarType::Float: return f(float{});
    case ScalarType::Double: return f(double{});
    case ScalarType::BFloat16: return f(c10::BFloat16{});
    case ScalarType::Half: return f(c10::Half{});
    default:
      STD_TORCH_CHECK(false,
                      "a BatchNorm's parameters and running statistics must be float16, bfloat16, float32 or float64");
  }
}

std::vector<double> get(const VectorRef& v, int64_t channels) {
  std::vector<double> values(channels);
  dispatch(v.dtype, [&](auto zero) {
    const auto* from = static_cast<const decltype(zero)*>(v.data);
    for (int64_t c = 0; c < channels; ++c) values[c] = static_cast<double>(from[c * v.stride]);
  });
  return values;
}

void put(const VectorRef& v, const std::vector<double>& values) {
  dispatch(v.dtype, [&](auto zero) {
    using T = decltype(zero);
    auto* to = static_cast<T*>(v.data);
    for (size_t c = 0; c < values.size(); ++c) {
      if constexpr (sizeof(T) == 2) to[c * v.stride] = T(static_cast<float>(values[c]));
      else to[c * v.stride] = static_cast<T>(values[c]);
    }
  });
}

std::vector<double> get_or(const OptionalTensor& t, int64_t channels, double otherwise, const char* name) {
  return t.has_value() ? get(parameter_of(*t, channels, name), channels) : std::vector<double>(channels, otherwise);
}

VectorRef row(const Tensor& t, int64_t rows, int64_t i, int64_t channels, const char* name) {
  const ScalarType dtype = accum_of(t.scalar_type());
  return {row_of(t, rows, i, channels, dtype, name), 1, dtype};
}

// A value as the per-channel tensor `t` holds it.
double rounded(double value, const Tensor& t) {
  return accum_of(t.scalar_type()) == ScalarType::Double ? value : static_cast<double>(static_cast<float>(value));
}

void write_norm(const std::vector<double>& mean, const std::vector<double>& invstd, const OptionalTensor& weight,
                const OptionalTensor& bias, const Tensor& scale_shift, const Tensor& mean_invstd) {
  const int64_t channels = static_cast<int64_t>(mean.size());
  std::vector<double> scale = get_or(weight, channels, 1, "weight"), shift = get_or(bias, channels, 0, "bias");
  for (int64_t c = 0; c < channels; ++c) {
    // shift belongs to the scale that is stored: where the mean is far above the deviation, scale's rounding would
    // outweigh what they leave
    scale[c] = rounded(scale[c] * invstd[c], scale_shift);
    shift[c] -= mean[c] * scale[c];
  }
  put(row(scale_shift, 2, 0, channels, "scale_shift"), scale);
  put(row(scale_shift, 2, 1, channels, "scale_shift"), shift);
  put(row(mean_invstd, 2, 0, channels, "mean_invstd"), mean);
  put(row(mean_invstd, 2, 1, channels, "mean_invstd"), invstd);
}

void update_running(const VectorRef& running, const std::vector<double>& value, double momentum) {
  std::vector<double> r = get(running, static_cast<int64_t>(value.size()));
  for (size_t c = 0; c < value.size(); ++c) r[c] += momentum * (value[c] - r[c]);
  put(running, r);
}

void bn_coefficients(const Tensor& stats, int64_t count, const OptionalTensor& weight, const OptionalTensor& bias,
                     const OptionalTensor& running_mean, const OptionalTensor& running_var, double momentum, double eps,
                     Tensor scale_shift, Tensor mean_invstd) {
  STD_TORCH_CHECK(stats.dim() == 2, "stats must be [2, channels], found ", stats.dim(), " dimensions");
  const int64_t channels = stats.size(1);
  const std::vector<double> mean = get(row(stats, 2, 0, channels, "stats"), channels);
  std::vector<double> variance = get(row(stats, 2, 1, channels, "stats"), channels), invstd(channels);
  for (int64_t c = 0; c < channels; ++c) invstd[c] = 1 / std::sqrt(variance[c] / double(count) + eps);
  if (running_mean.has_value()) {
    STD_TORCH_CHECK(running_var.has_value(), "running_mean was given without running_var");
    for (double& v : variance) v /= double(count > 1 ? count - 1 : 1);
    update_running(parameter_of(*running_mean, channels, "running_mean"), mean, momentum);
    update_running(parameter_of(*running_var, channels, "running_var"), variance, momentum);
  }
  write_norm(mean, invstd, weight, bias, scale_shift, mean_invstd);
}

void bn_frozen(const OptionalTensor& weight, const OptionalTensor& bias, const Tensor& running_mean,
               const Tensor& running_var, double eps, Tensor scale_shift, Tensor mean_invstd) {
  const int64_t channels = running_mean.numel();
  const std::vector<double> mean = get(parameter_of(running_mean, channels, "running_mean"), channels);
  std::vector<double> invstd = get(parameter_of(running_var, channels, "running_var"), channels);
  for (double& v : invstd) v = 1 / std::sqrt(v + eps);
  write_norm(mean, invstd, weight, bias, scale_shift, mean_invstd);
}

void bn_backward(const Tensor& sums, int64_t count, const OptionalTensor& weight, const Tensor& mean_invstd,
                 bool training, Tensor coeff, bool accumulate) {
  STD_TORCH_CHECK(mean_invstd.dim() == 2, "mean_invstd must be [2, channels], found ", mean_invstd.dim(),
                  " dimensions");
  const int64_t channels = mean_invstd.size(1);
  const std::vector<double> mean = get(row(mean_invstd, 2, 0, channels, "mean_invstd"), channels);
  const std::vector<double> invstd = get(row(mean_invstd, 2, 1, channels, "mean_invstd"), channels);
  const std::vector<double> dz = get(row(sums, 2, 0, channels, "sums"), channels);
  const std::vector<double> dz_xhat = get(row(sums, 2, 1, channels, "sums"), channels);
  const VectorRef p_row = row(coeff, 3, 0, channels, "coeff"), q_row = row(coeff, 3, 1, channels, "coeff");
  const VectorRef r_row = row(coeff, 3, 2, channels, "coeff");
  std::vector<double> p = get_or(weight, channels, 1, "weight"), q(channels), r(channels);
  if (accumulate) {
    q = get(q_row, channels);
    r = get(r_row, channels);
  }
  for (int64_t c = 0; c < channels; ++c) {
    p[c] *= invstd[c];
    if (!training) continue;
    // r belongs to the q that is stored, as a shift to its scale
    const double before = q[c];
    q[c] = rounded(before - p[c] * invstd[c] * dz_xhat[c] / double(count), coeff);
    r[c] -= p[c] * dz[c] / double(count) + (q[c] - before) * mean[c];
  }
  if (!accumulate) put(p_row, p);
  put(q_row, q);
  put(r_row, r);
}

}  // namespace
}  // namespace fusedres

STABLE_TORCH_LIBRARY_FRAGMENT(fusedres_cpp, m) {
  m.def(
      "bn_coefficients(Tensor stats, int count, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, Tensor(b!)? "
      "running_var, "
      "float momentum, float eps, Tensor(c!) scale_shift, Tensor(d!) mean_invstd) -> ()");
  m.def(
      "bn_frozen(Tensor? weight, Tensor? bias, Tensor running_mean, Tensor running_var, float eps, Tensor(a!) "
      "scale_shift, Tensor(b!) mean_invstd) "
      "-> ()");
  m.def(
      "bn_backward(Tensor sums, int count, Tensor? weight, Tensor mean_invstd, bool training, Tensor(a!) coeff, bool "
      "accumulate) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fusedres_cpp, CPU, m) {
  m.impl("bn_coefficients", TORCH_BOX(&fusedres::bn_coefficients));
  m.impl("bn_frozen", TORCH_BOX(&fusedres::bn_frozen));
  m.impl("bn_backward", TORCH_BOX(&fusedres::bn_backward));
}
