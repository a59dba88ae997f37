// The passes over maps as operators: checks dtypes, shapes and layouts, and hands the kernels plain pointers.
#include <torch/csrc/stable/library.h>

#include <cstring>
#include <vector>

#include "../tape.h"
#include "capability.h"
#include "passes.h"
#include "tensors.h"

namespace fusedres {
namespace {

const PassKernels& kernels() {
#if defined(__x86_64__)
  switch (cpu_capability()) {
    case Capability::avx512:
    case Capability::avx512_bf16: return pass_kernels_avx512;
    case Capability::avx2: return pass_kernels_avx2;
    case Capability::baseline: break;
  }
#endif
  return pass_kernels_default;
}

// A pass over maps like `like`, whose rows are the pass's rows.
struct Pass {
  PassArgs a{};
  const Tensor& like;
  ScalarType accum;

  explicit Pass(const Tensor& like, const char* name) : like(like) {
    switch (like.scalar_type()) {
      case ScalarType::Float: a.storage = Storage::f32; break;
      case ScalarType::Double: a.storage = Storage::f64; break;
      case ScalarType::BFloat16: a.storage = Storage::bf16; break;
      case ScalarType::Half: a.storage = Storage::f16; break;
      default: STD_TORCH_CHECK(false, name, " must be float16, bfloat16, float32 or float64");
    }
    accum = accum_of(like.scalar_type());
    STD_TORCH_CHECK(like.dim() == 4, name, " must have 4 dimensions, found ", like.dim());
    a.channels = like.size(1);
    a.rows = a.channels == 0 ? 0 : like.numel() / a.channels;
  }

  // A map with the dtype of `like`, and with its shape.
  Rows map(const Tensor& t, const char* name) const {
    const Rows result = other_map(t, name);
    check_shape(t, like, name);
    return result;
  }

  // A map with the dtype of `like` and another shape.
  Rows other_map(const Tensor& t, const char* name) const {
    STD_TORCH_CHECK(t.scalar_type() == like.scalar_type(), name, " must have the dtype of the other maps");
    return map_of(t, name);
  }

  void* row(const Tensor& t, int64_t rows, int64_t i, const char* name) const {
    return row_of(t, rows, i, a.channels, accum, name);
  }

  Constant constant(const OptionalTensor& t, int64_t rows, int64_t i, double otherwise, const char* name) const {
    return {t.has_value() ? row(*t, rows, i, name) : nullptr, otherwise};
  }

  void measure(const Rows& map, const OptionalTensor& stats) {
    if (!stats.has_value()) return;
    a.measured = map;
    a.mean = row(*stats, 2, 0, "stats");
    a.m2 = row(*stats, 2, 1, "stats");
  }

  // The two sums of a BatchNorm whose xhat is by `mean_invstd`, from the `first` of the pass's sums on.
  void reduce(const Tensor& sums, const OptionalTensor& mean_invstd, const char* name, int first = 0) {
    STD_TORCH_CHECK(mean_invstd.has_value(), name, " were asked for without mean_invstd");
    a.sums[first] = {row(sums, 2, 0, name), nullptr};
    a.sums[first + 1] = {row(sums, 2, 1, name), row(*mean_invstd, 2, 1, "mean_invstd")};
  }
};

void statistics(const Tensor& x, Tensor stats) {
  Pass pass(x, "x");
  pass.measure(pass.map(x, "x"), stats);
  kernels().statistics(pass.a, parallel);
}

void add_act_forward(const Tensor& raw, const OptionalTensor& scale_shift, const OptionalTensor& residual,
                     const OptionalTensor& residual_scale_shift, int64_t act, double slope, Tensor out,
                     const OptionalTensor& stats) {
  Pass pass(raw, "raw");
  PassArgs& a = pass.a;
  a.act = activation_of(act, slope);
  a.in[0] = pass.map(raw, "raw");
  if (residual.has_value()) a.in[1] = pass.map(*residual, "residual");
  a.out = pass.map(out, "out");
  a.constants[0] = pass.constant(scale_shift, 2, 0, 1, "scale_shift");
  a.constants[1] = pass.constant(scale_shift, 2, 1, 0, "scale_shift");
  a.constants[2] = pass.constant(residual_scale_shift, 2, 0, 1, "residual_scale_shift");
  a.constants[3] = pass.constant(residual_scale_shift, 2, 1, 0, "residual_scale_shift");
  pass.measure(a.out, stats);
  kernels().add_act_forward(a, scale_shift.has_value(), residual.has_value(), residual_scale_shift.has_value(),
                            parallel);
}

void add_act_backward(const Tensor& grad, const Tensor& raw, const OptionalTensor& scale_shift,
                      const OptionalTensor& mean_invstd, int64_t act, double slope, const OptionalTensor& dz,
                      const OptionalTensor& sums, const OptionalTensor& residual,
                      const OptionalTensor& residual_scale_shift, const OptionalTensor& residual_mean_invstd,
                      const OptionalTensor& residual_sums) {
  Pass pass(raw, "raw");
  PassArgs& a = pass.a;
  a.act = activation_of(act, slope);
  STD_TORCH_CHECK(dz.has_value() == (a.act.kind != Act::none),
                  "dz is written behind an activation, and without one is grad itself");
  const int sum_count = residual_sums.has_value() ? 3 : sums.has_value() ? 2 : 0;
  a.in[0] = pass.map(grad, "grad");
  a.in[1] = pass.map(raw, "raw");
  if (residual.has_value()) a.in[2] = pass.map(*residual, "residual");
  if (dz.has_value()) a.out = pass.map(*dz, "dz");
  a.constants[0] = pass.constant(scale_shift, 2, 0, 1, "scale_shift");
  a.constants[1] = pass.constant(scale_shift, 2, 1, 0, "scale_shift");
  a.constants[2] = pass.constant(mean_invstd, 2, 0, 0, "mean_invstd");
  a.constants[3] = pass.constant(residual_scale_shift, 2, 0, 1, "residual_scale_shift");
  a.constants[4] = pass.constant(residual_scale_shift, 2, 1, 0, "residual_scale_shift");
  a.constants[5] = pass.constant(residual_mean_invstd, 2, 0, 0, "residual_mean_invstd");
  void* residual_first = nullptr;  // the residual's sum of dz, which is that of the main path
  if (residual_sums.has_value()) {
    STD_TORCH_CHECK(residual.has_value() && residual_mean_invstd.has_value(),
                    "residual_sums need residual and residual_mean_invstd");
    residual_first = pass.row(*residual_sums, 2, 0, "residual_sums");
    a.sums[0] = {residual_first, nullptr};
    a.sums[2] = {pass.row(*residual_sums, 2, 1, "residual_sums"),
                 pass.row(*residual_mean_invstd, 2, 1, "residual_mean_invstd")};
  }
  if (sums.has_value()) pass.reduce(*sums, mean_invstd, "sums");
  kernels().add_act_backward(a, residual.has_value(), residual_scale_shift.has_value(), sum_count, parallel);
  if (residual_first != nullptr && residual_first != a.sums[0].data)
    std::memcpy(residual_first, a.sums[0].data, a.channels * (pass.accum == ScalarType::Double ? 8 : 4));
}

void highway_forward(const Tensor& raw, const OptionalTensor& scale_shift, bool relu, const Tensor& gate,
                     const OptionalTensor& gate_scale_shift, const Tensor& carry, Tensor out) {
  Pass pass(raw, "raw");
  PassArgs& a = pass.a;
  a.in[0] = pass.map(raw, "raw");
  a.in[1] = pass.map(gate, "gate");
  a.in[2] = pass.map(carry, "carry");
  a.out = pass.map(out, "out");
  a.constants[0] = pass.constant(scale_shift, 2, 0, 1, "scale_shift");
  a.constants[1] = pass.constant(scale_shift, 2, 1, 0, "scale_shift");
  a.constants[2] = pass.constant(gate_scale_shift, 2, 0, 1, "gate_scale_shift");
  a.constants[3] = pass.constant(gate_scale_shift, 2, 1, 0, "gate_scale_shift");
  kernels().highway_forward(a, relu, parallel);
}

void highway_backward(const Tensor& grad, const Tensor& raw, const OptionalTensor& scale_shift,
                      const OptionalTensor& mean_invstd, bool relu, const Tensor& gate,
                      const OptionalTensor& gate_scale_shift, const OptionalTensor& gate_mean_invstd,
                      const Tensor& carry, Tensor dz, Tensor dgate, Tensor dcarry, const OptionalTensor& sums,
                      const OptionalTensor& gate_sums) {
  Pass pass(raw, "raw");
  PassArgs& a = pass.a;
  a.in[0] = pass.map(grad, "grad");
  a.in[1] = pass.map(raw, "raw");
  a.in[2] = pass.map(gate, "gate");
  a.in[3] = pass.map(carry, "carry");
  a.out = pass.map(dz, "dz");
  a.more[0] = pass.map(dgate, "dgate");
  a.more[1] = pass.map(dcarry, "dcarry");
  a.constants[0] = pass.constant(scale_shift, 2, 0, 1, "scale_shift");
  a.constants[1] = pass.constant(scale_shift, 2, 1, 0, "scale_shift");
  a.constants[2] = pass.constant(mean_invstd, 2, 0, 0, "mean_invstd");
  a.constants[3] = pass.constant(gate_scale_shift, 2, 0, 1, "gate_scale_shift");
  a.constants[4] = pass.constant(gate_scale_shift, 2, 1, 0, "gate_scale_shift");
  a.constants[5] = pass.constant(gate_mean_invstd, 2, 0, 0, "gate_mean_invstd");
  if (sums.has_value()) pass.reduce(*sums, mean_invstd, "sums");
  if (gate_sums.has_value()) pass.reduce(*gate_sums, gate_mean_invstd, "gate_sums", 2);
  kernels().highway_backward(a, relu, parallel);
}

void apply_grad_coeff(const Tensor& grad, const OptionalTensor& raw, const Tensor& coeff, Tensor out) {
  Pass pass(grad, "grad");
  PassArgs& a = pass.a;
  a.in[0] = pass.map(grad, "grad");
  if (raw.has_value()) a.in[1] = pass.map(*raw, "raw");
  a.out = pass.map(out, "out");
  for (int i = 0; i < 3; ++i) a.constants[i] = {pass.row(coeff, 3, i, "coeff"), 0};
  kernels().apply_grad_coeff(a, raw.has_value(), parallel);
}

void dgrad_epilogue(const Tensor& da, const Tensor& x, const OptionalTensor& scale_shift,
                    const OptionalTensor& mean_invstd, int64_t act, double slope, Tensor dx, const OptionalTensor& base,
                    bool accumulate, bool scaled, const OptionalTensor& sums) {
  Pass pass(x, "x");
  PassArgs& a = pass.a;
  STD_TORCH_CHECK(!scaled || scale_shift.has_value(), "scaled asks for the scale of scale_shift, which was not given");
  const bool adds = accumulate || base.has_value();
  a.act = activation_of(act, slope);
  int inputs = 0;
  a.in[inputs++] = pass.map(da, "da");
  a.out = pass.map(dx, "dx");
  if (adds) a.in[inputs++] = accumulate ? a.out : pass.map(*base, "base");
  a.in[inputs++] = pass.map(x, "x");
  a.constants[0] = pass.constant(scale_shift, 2, 0, 1, "scale_shift");
  a.constants[1] = pass.constant(scale_shift, 2, 1, 0, "scale_shift");
  a.constants[2] = pass.constant(mean_invstd, 2, 0, 0, "mean_invstd");
  a.constants[3] = scaled ? a.constants[0] : Constant{nullptr, 1};
  if (sums.has_value()) pass.reduce(*sums, mean_invstd, "sums");
  kernels().dgrad_epilogue(a, sums.has_value(), adds, parallel);
}

// The window's geometry over x and out (or its gradient); `window` holds kernel, stride and padding, two each.
PoolArgs pool_of(const Tensor& x, const Tensor& out, const OptionalTensor& index, const std::vector<int64_t>& window) {
  STD_TORCH_CHECK(window.size() == 6, "window must hold kernel, stride and padding, two numbers each");
  PoolArgs p{};
  p.batch = x.size(0), p.in_h = x.size(2), p.in_w = x.size(3), p.out_h = out.size(2), p.out_w = out.size(3);
  p.kernel_h = window[0], p.kernel_w = window[1], p.stride_h = window[2], p.stride_w = window[3], p.pad_h = window[4],
  p.pad_w = window[5];
  STD_TORCH_CHECK(p.kernel_h > 0 && p.kernel_w > 0 && p.stride_h > 0 && p.stride_w > 0,
                  "a window and its stride must be at least 1");
  const auto size = [](int64_t n, int64_t k, int64_t s, int64_t pad) { return (n + 2 * pad - k) / s + 1; };
  STD_TORCH_CHECK(out.size(0) == p.batch && out.size(1) == x.size(1) &&
                      p.out_h == size(p.in_h, p.kernel_h, p.stride_h, p.pad_h) &&
                      p.out_w == size(p.in_w, p.kernel_w, p.stride_w, p.pad_w),
                  "input, window and output do not belong to one pooling");
  if (!index.has_value()) {
    STD_TORCH_CHECK(p.stride_h == p.kernel_h && p.stride_w == p.kernel_w && p.pad_h == 0 && p.pad_w == 0,
                    "the mean is taken over windows side by side: stride equal to kernel, no padding");
    return p;
  }
  STD_TORCH_CHECK(2 * p.pad_h <= p.kernel_h && 2 * p.pad_w <= p.kernel_w,
                  "the padding may be at most half of the window");
  STD_TORCH_CHECK(p.kernel_h * p.kernel_w <= 256,
                  "a window of the maximum may have at most 256 positions, which its uint8 index can tell ",
                  "apart; found ", p.kernel_h, " x ", p.kernel_w);
  STD_TORCH_CHECK(index->scalar_type() == ScalarType::Byte && index->dim() == 4,
                  "index must be uint8 with 4 dimensions");
  for (int i = 0; i < 4; ++i)
    STD_TORCH_CHECK(index->size(i) == out.size(i), "index must have the shape of the pooled map");
  const Rows rows = map_of(*index, "index");
  p.index = static_cast<uint8_t*>(rows.data);
  p.index_pitch = rows.pitch;
  return p;
}

void pool_forward(const Tensor& x, const OptionalTensor& scale_shift, int64_t act, double slope,
                  std::vector<int64_t> window, Tensor out, const OptionalTensor& index, const OptionalTensor& stats) {
  PoolArgs p = pool_of(x, out, index, window);
  Pass pass(out, "out");
  PassArgs& a = pass.a;
  a.act = activation_of(act, slope);
  a.in[0] = pass.other_map(x, "x");
  a.out = pass.map(out, "out");
  a.constants[0] = pass.constant(scale_shift, 2, 0, 1, "scale_shift");
  a.constants[1] = pass.constant(scale_shift, 2, 1, 0, "scale_shift");
  pass.measure(a.out, stats);
  p.pass = a;
  kernels().pool_forward(p, parallel);
}

void pool_backward(const Tensor& grad, const OptionalTensor& index, const Tensor& x, const OptionalTensor& scale_shift,
                   const OptionalTensor& mean_invstd, int64_t act, double slope, std::vector<int64_t> window,
                   const OptionalTensor& sums, const OptionalTensor& coeff, const OptionalTensor& dx) {
  PoolArgs p = pool_of(x, grad, index, window);
  Pass pass(x, "x");
  PassArgs& a = pass.a;
  a.act = activation_of(act, slope);
  a.in[0] = pass.map(x, "x");
  a.in[1] = pass.other_map(grad, "grad");
  a.constants[0] = pass.constant(scale_shift, 2, 0, 1, "scale_shift");
  a.constants[1] = pass.constant(scale_shift, 2, 1, 0, "scale_shift");
  a.constants[2] = pass.constant(mean_invstd, 2, 0, 0, "mean_invstd");
  for (int i = 0; i < 3; ++i) a.constants[3 + i] = pass.constant(coeff, 3, i, 0, "coeff");
  if (sums.has_value()) pass.reduce(*sums, mean_invstd, "sums");
  if (coeff.has_value()) {
    STD_TORCH_CHECK(dx.has_value(), "coeff was given without dx");
    a.out = pass.map(*dx, "dx");
  }
  STD_TORCH_CHECK(sums.has_value() || coeff.has_value(), "neither sums nor coeff was given: nothing to compute");
  p.pass = a;
  kernels().pool_backward(p, sums.has_value(), coeff.has_value(), parallel);
}

const bool kOnTape[] = {
    on_tape<&statistics>("statistics"),
    on_tape<&add_act_forward>("add_act_forward"),
    on_tape<&add_act_backward>("add_act_backward"),
    on_tape<&highway_forward>("highway_forward"),
    on_tape<&highway_backward>("highway_backward"),
    on_tape<&apply_grad_coeff>("apply_grad_coeff"),
    on_tape<&dgrad_epilogue>("dgrad_epilogue"),
    on_tape<&pool_forward>("pool_forward"),
    on_tape<&pool_backward>("pool_backward"),
};

}  // namespace
}  // namespace fusedres

STABLE_TORCH_LIBRARY_FRAGMENT(fusedres_cpp, m) {
  m.def("statistics(Tensor x, Tensor(a!) stats) -> ()");
  m.def(
      "add_act_forward(Tensor raw, Tensor? scale_shift, Tensor? residual, Tensor? residual_scale_shift, int act, float "
      "slope, Tensor(a!) out, Tensor(b!)? stats) "
      "-> ()");
  m.def(
      "add_act_backward(Tensor grad, Tensor raw, Tensor? scale_shift, Tensor? mean_invstd, int act, float slope, "
      "Tensor(a!)? dz, Tensor(b!)? sums, Tensor? residual, "
      "Tensor? residual_scale_shift, Tensor? residual_mean_invstd, Tensor(c!)? residual_sums) -> ()");
  m.def(
      "highway_forward(Tensor raw, Tensor? scale_shift, bool relu, Tensor gate, Tensor? gate_scale_shift, Tensor "
      "carry, Tensor(a!) out) -> ()");
  m.def(
      "highway_backward(Tensor grad, Tensor raw, Tensor? scale_shift, Tensor? mean_invstd, bool relu, Tensor gate, "
      "Tensor? gate_scale_shift, "
      "Tensor? gate_mean_invstd, Tensor carry, Tensor(a!) dz, Tensor(b!) dgate, Tensor(c!) dcarry, Tensor(d!)? sums, "
      "Tensor(e!)? gate_sums) "
      "-> ()");
  m.def("apply_grad_coeff(Tensor grad, Tensor? raw, Tensor coeff, Tensor(a!) out) -> ()");
  m.def(
      "dgrad_epilogue(Tensor da, Tensor x, Tensor? scale_shift, Tensor? mean_invstd, int act, float slope, Tensor(a!) "
      "dx, Tensor? base, bool accumulate, "
      "bool scaled, Tensor(b!)? sums) -> ()");
  m.def(
      "pool_forward(Tensor x, Tensor? scale_shift, int act, float slope, int[] window, Tensor(a!) out, Tensor(b!)? "
      "index, Tensor(c!)? stats) -> ()");
  m.def(
      "pool_backward(Tensor grad, Tensor? index, Tensor x, Tensor? scale_shift, Tensor? mean_invstd, int act, float "
      "slope, int[] window, Tensor(a!)? sums, "
      "Tensor? coeff, Tensor(b!)? dx) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fusedres_cpp, CPU, m) {
  m.impl("statistics", TORCH_BOX(&fusedres::statistics));
  m.impl("add_act_forward", TORCH_BOX(&fusedres::add_act_forward));
  m.impl("add_act_backward", TORCH_BOX(&fusedres::add_act_backward));
  m.impl("highway_forward", TORCH_BOX(&fusedres::highway_forward));
  m.impl("highway_backward", TORCH_BOX(&fusedres::highway_backward));
  m.impl("apply_grad_coeff", TORCH_BOX(&fusedres::apply_grad_coeff));
  m.impl("dgrad_epilogue", TORCH_BOX(&fusedres::dgrad_epilogue));
  m.impl("pool_forward", TORCH_BOX(&fusedres::pool_forward));
  m.impl("pool_backward", TORCH_BOX(&fusedres::pool_backward));
}
