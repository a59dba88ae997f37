// The C-sized arithmetic of BatchNorm as operators. Everything is computed in double and rounded once.
#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>

#include "../tape.h"
#include "norm.h"
#include "tensors.h"

namespace fusedres {
namespace {

// Channels that are computed at a time, on the stack.
constexpr int64_t kBlock = 256;

struct Block {
  double at[kBlock];
  double& operator[](int64_t i) { return at[i]; }
  double operator[](int64_t i) const { return at[i]; }
};

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

// One number per channel, of any floating dtype: a row of a per-channel tensor, a parameter, a running statistic; or,
// without memory, the same number for all channels.
struct Vector {
  void* data;
  int64_t stride;
  ScalarType dtype;
  double otherwise = 0;

  void load(int64_t begin, int64_t n, Block& to) const {
    if (data == nullptr) {
      for (int64_t i = 0; i < n; ++i) to[i] = otherwise;
      return;
    }
    dispatch(dtype, [&](auto zero) {
      const auto* from = static_cast<const decltype(zero)*>(data) + begin * stride;
      // told apart, because only numbers side by side are loaded as vectors
      if (stride == 1) {
        for (int64_t i = 0; i < n; ++i) to[i] = static_cast<double>(from[i]);
      } else {
        for (int64_t i = 0; i < n; ++i) to[i] = static_cast<double>(from[i * stride]);
      }
    });
  }

  void store(int64_t begin, int64_t n, const Block& from) const {
    dispatch(dtype, [&](auto zero) {
      using T = decltype(zero);
      auto* to = static_cast<T*>(data) + begin * stride;
      for (int64_t i = 0; i < n; ++i) {
        if constexpr (sizeof(T) == 2) to[i * stride] = T(static_cast<float>(from[i]));
        else to[i * stride] = static_cast<T>(from[i]);
      }
    });
  }

  // The values as the vector would hold them.
  void round(int64_t n, Block& values) const {
    if (dtype == ScalarType::Double) return;
    for (int64_t i = 0; i < n; ++i) values[i] = static_cast<double>(static_cast<float>(values[i]));
  }
};

Vector parameter_of(const Tensor& t, int64_t channels, const char* name) {
  STD_TORCH_CHECK(t.dim() == 1 && t.size(0) == channels, name, " must hold ", channels, " channels, found ", t.numel(),
                  " elements");
  return {t.data_ptr(), t.stride(0), t.scalar_type()};
}

Vector parameter_or(const OptionalTensor& t, int64_t channels, double otherwise, const char* name) {
  return t.has_value() ? parameter_of(*t, channels, name) : Vector{nullptr, 0, ScalarType::Double, otherwise};
}

Vector row(const Tensor& t, int64_t rows, int64_t i, int64_t channels, const char* name) {
  const ScalarType dtype = accum_of(t.scalar_type());
  return {row_of(t, rows, i, channels, dtype, name), 1, dtype};
}

// Where a normalisation's numbers go, and its parameters. `mean` and `invstd` without memory: nobody wants them.
struct NormVectors {
  Vector weight, bias, scale, shift, mean, invstd;

  NormVectors(int64_t channels, const OptionalTensor& weight, const OptionalTensor& bias, float* scale, float* shift)
      : weight(parameter_or(weight, channels, 1, "weight")),
        bias(parameter_or(bias, channels, 0, "bias")),
        scale{scale, 1, ScalarType::Float},
        shift{shift, 1, ScalarType::Float},
        mean{nullptr, 0, ScalarType::Float},
        invstd(mean) {}

  NormVectors(int64_t channels, const OptionalTensor& weight, const OptionalTensor& bias, const Tensor& scale_shift,
              const Tensor& mean_invstd)
      : weight(parameter_or(weight, channels, 1, "weight")),
        bias(parameter_or(bias, channels, 0, "bias")),
        scale(row(scale_shift, 2, 0, channels, "scale_shift")),
        shift(row(scale_shift, 2, 1, channels, "scale_shift")),
        mean(row(mean_invstd, 2, 0, channels, "mean_invstd")),
        invstd(row(mean_invstd, 2, 1, channels, "mean_invstd")) {}

  void write(int64_t begin, int64_t n, const Block& m, const Block& s) const {
    Block to_scale, to_shift;
    weight.load(begin, n, to_scale);
    bias.load(begin, n, to_shift);
    // shift belongs to the scale that is stored: where the mean is far above the deviation, scale's rounding would
    // outweigh what they leave
    for (int64_t i = 0; i < n; ++i) to_scale[i] *= s[i];
    scale.round(n, to_scale);
    for (int64_t i = 0; i < n; ++i) to_shift[i] -= m[i] * to_scale[i];
    scale.store(begin, n, to_scale);
    shift.store(begin, n, to_shift);
    if (mean.data != nullptr) mean.store(begin, n, m);
    if (invstd.data != nullptr) invstd.store(begin, n, s);
  }
};

void update_running(const Vector& running, int64_t begin, int64_t n, const Block& value, double momentum) {
  Block r;
  running.load(begin, n, r);
  for (int64_t i = 0; i < n; ++i) r[i] += momentum * (value[i] - r[i]);
  running.store(begin, n, r);
}

template <class F>
void by_blocks(int64_t channels, const F& f) {
  for (int64_t begin = 0; begin < channels; begin += kBlock) f(begin, std::min(kBlock, channels - begin));
}

void bn_coefficients(const Tensor& stats, int64_t count, const OptionalTensor& weight, const OptionalTensor& bias,
                     const OptionalTensor& running_mean, const OptionalTensor& running_var, double momentum, double eps,
                     Tensor scale_shift, Tensor mean_invstd) {
  STD_TORCH_CHECK(stats.dim() == 2, "stats must be [2, channels], found ", stats.dim(), " dimensions");
  const int64_t channels = stats.size(1);
  const bool updates = running_mean.has_value();
  STD_TORCH_CHECK(!updates || running_var.has_value(), "running_mean was given without running_var");
  const Vector means = row(stats, 2, 0, channels, "stats"), squares = row(stats, 2, 1, channels, "stats");
  const Vector moving_mean = parameter_or(running_mean, channels, 0, "running_mean");
  const Vector moving_var = parameter_or(running_var, channels, 0, "running_var");
  const NormVectors to(channels, weight, bias, scale_shift, mean_invstd);
  by_blocks(channels, [&](int64_t begin, int64_t n) {
    Block mean, m2, invstd;
    means.load(begin, n, mean);
    squares.load(begin, n, m2);
    for (int64_t i = 0; i < n; ++i) invstd[i] = 1 / std::sqrt(m2[i] / double(count) + eps);
    if (updates) {
      for (int64_t i = 0; i < n; ++i) m2[i] /= double(count > 1 ? count - 1 : 1);
      update_running(moving_mean, begin, n, mean, momentum);
      update_running(moving_var, begin, n, m2, momentum);
    }
    to.write(begin, n, mean, invstd);
  });
}

void frozen(int64_t channels, const Tensor& running_mean, const Tensor& running_var, double eps,
            const NormVectors& to) {
  const Vector means = parameter_of(running_mean, channels, "running_mean");
  const Vector variances = parameter_of(running_var, channels, "running_var");
  by_blocks(channels, [&](int64_t begin, int64_t n) {
    Block mean, invstd;
    means.load(begin, n, mean);
    variances.load(begin, n, invstd);
    for (int64_t i = 0; i < n; ++i) invstd[i] = 1 / std::sqrt(invstd[i] + eps);
    to.write(begin, n, mean, invstd);
  });
}

void bn_frozen(const OptionalTensor& weight, const OptionalTensor& bias, const Tensor& running_mean,
               const Tensor& running_var, double eps, Tensor scale_shift, Tensor mean_invstd) {
  const int64_t channels = running_mean.numel();
  frozen(channels, running_mean, running_var, eps, {channels, weight, bias, scale_shift, mean_invstd});
}

void bn_backward(const Tensor& sums, int64_t count, const OptionalTensor& weight, const Tensor& mean_invstd,
                 bool training, Tensor coeff, bool accumulate) {
  STD_TORCH_CHECK(mean_invstd.dim() == 2, "mean_invstd must be [2, channels], found ", mean_invstd.dim(),
                  " dimensions");
  const int64_t channels = mean_invstd.size(1);
  const Vector means = row(mean_invstd, 2, 0, channels, "mean_invstd");
  const Vector invstds = row(mean_invstd, 2, 1, channels, "mean_invstd");
  const Vector sum_dz = row(sums, 2, 0, channels, "sums"), sum_dz_xhat = row(sums, 2, 1, channels, "sums");
  const Vector weights = parameter_or(weight, channels, 1, "weight");
  const Vector to_p = row(coeff, 3, 0, channels, "coeff"), to_q = row(coeff, 3, 1, channels, "coeff");
  const Vector to_r = row(coeff, 3, 2, channels, "coeff");
  by_blocks(channels, [&](int64_t begin, int64_t n) {
    Block mean, invstd, dz, dz_xhat, p, q, r, before;
    means.load(begin, n, mean);
    invstds.load(begin, n, invstd);
    sum_dz.load(begin, n, dz);
    sum_dz_xhat.load(begin, n, dz_xhat);
    weights.load(begin, n, p);
    for (int64_t i = 0; i < n; ++i) {
      p[i] *= invstd[i];
      before[i] = r[i] = 0;
    }
    if (accumulate) {
      to_q.load(begin, n, before);
      to_r.load(begin, n, r);
    }
    q = before;
    if (training) {
      // r belongs to the q that is stored, as a shift to its scale
      for (int64_t i = 0; i < n; ++i) q[i] -= p[i] * invstd[i] * dz_xhat[i] / double(count);
      to_q.round(n, q);
      for (int64_t i = 0; i < n; ++i) r[i] -= p[i] * dz[i] / double(count) + (q[i] - before[i]) * mean[i];
    }
    if (!accumulate) to_p.store(begin, n, p);
    to_q.store(begin, n, q);
    to_r.store(begin, n, r);
  });
}

const bool kOnTape[] = {
    on_tape<&bn_coefficients>("bn_coefficients"),
    on_tape<&bn_frozen>("bn_frozen"),
    on_tape<&bn_backward>("bn_backward"),
};

}  // namespace

void frozen_scale_shift(const OptionalTensor& weight, const OptionalTensor& bias, const Tensor& running_mean,
                        const Tensor& running_var, double eps, int64_t channels, float* scale, float* shift) {
  frozen(channels, running_mean, running_var, eps, {channels, weight, bias, scale, shift});
}

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
