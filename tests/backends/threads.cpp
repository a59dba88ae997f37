// The C++ kernels on threads that ThreadSanitizer sees whole: linked without torch, whose OpenMP it cannot follow.
//
//   threads          every kernel of every instruction set of this CPU, from two callers at once that share what they
//   read, each on
//                    threads of its own; their results must have the bits of a single thread's
//   threads race     the two callers write the same maps: the sanitizer has to report it
//   threads write FILE     as the first, and the results of the portable kernels into a file
//   threads compare FILE   as the first, and those results have to be the file's, but for roundings
//
// `make sanitize` builds and runs the first two; `make arm` the others, for two kinds of processor.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <type_traits>
#include <vector>

#include "cpu/capability.h"
#include "cpu/conv.h"
#include "cpu/kept.h"
#include "cpu/passes.h"

namespace fusedres {
namespace {

constexpr int kThreads = 3;

void alone(int64_t n, void (*body)(void*, int64_t, int64_t), void* context) { body(context, 0, n); }

void spread(int64_t n, void (*body)(void*, int64_t, int64_t), void* context) {
  std::vector<std::thread> threads;
  const int64_t each = (n + kThreads - 1) / kThreads;
  for (int64_t begin = 0; begin < n; begin += each)
    threads.emplace_back(body, context, begin, begin + each < n ? begin + each : n);
  for (auto& thread : threads) thread.join();
}

// Numbers of either sign, the same for the same seed.
template <class Value>
std::vector<Value> numbers(int64_t count, unsigned seed) {
  std::vector<Value> values(static_cast<size_t>(count));
  for (auto& value : values) {
    seed = seed * 1664525u + 1013904223u;
    const float number = static_cast<float>(seed >> 8) / 16777216.0f - 0.5f;
    if constexpr (sizeof(Value) == 4) {
      value = number;
    } else {
      uint32_t bits;
      std::memcpy(&bits, &number, 4);
      value = {static_cast<uint16_t>(bits >> 16)};
    }
  }
  return values;
}

struct Shape {
  int64_t batch, size, in_c, out_c, kernel, stride, groups = 1;
  int64_t weights() const { return out_c * (in_c / groups) * kernel * kernel; }
  int64_t out_size() const { return (size + 2 * (kernel / 2) - kernel) / stride + 1; }
};

// What a caller writes.
template <class Value>
struct Written {
  std::vector<Value> out, dx, dweight;
  std::vector<float> sums;
  Written(const Shape& s)
      : out(s.batch * s.out_size() * s.out_size() * s.out_c),
        dx(s.batch * s.size * s.size * s.in_c),
        dweight(s.weights()),
        sums(4 * (s.in_c + s.out_c)) {}
  bool operator==(const Written& other) const {
    const auto same = [](const auto& a, const auto& b) {
      return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(a[0])) == 0;
    };
    return same(out, other.out) && same(dx, other.dx) && same(dweight, other.dweight) && same(sums, other.sums);
  }
};

// A convolution with all that may be pending, forward and backward, of a weight that stays packed.
template <class Value>
struct Convolution {
  Shape s;
  std::vector<Value> x, grad, raw, residual, weight;
  std::vector<float> vectors;
  std::shared_ptr<KeptWeight> kept;

  explicit Convolution(const Shape& shape)
      : s(shape),
        x(numbers<Value>(s.batch * s.size * s.size * s.in_c, 1)),
        grad(numbers<Value>(s.batch * s.out_size() * s.out_size() * s.out_c, 2)),
        raw(numbers<Value>(static_cast<int64_t>(grad.size()), 3)),
        residual(numbers<Value>(static_cast<int64_t>(grad.size()), 4)),
        weight(numbers<Value>(s.weights(), 5)),
        vectors(numbers<float>(8 * (s.in_c + s.out_c), 6)) {
    keep_weight(weight.data());
    kept = find_kept(weight.data());
  }
  ~Convolution() { forget_weight(weight.data()); }

  void run(const ConvKernelsOf<Value>& kernels, Parallel parallel, Written<Value>* to) {
    const int64_t taps = s.kernel * s.kernel, size = s.out_size(), pad = s.kernel / 2;
    const Geometry2d g{s.batch,  s.size,   s.size,   s.in_c / s.groups, size, size, s.out_c / s.groups,
                       s.kernel, s.kernel, s.stride, s.stride,          pad,  pad,  1,
                       1};
    const float *of_in = vectors.data(), *of_out = of_in + 4 * s.in_c;
    const Activation relu{Act::relu, 0}, none{Act::none, 0};
    const SourceOf<Value> lazy{{x.data(), s.in_c}, {nullptr, 0}, of_in, of_in + s.in_c, nullptr, relu};
    const SourceOf<Value> pending{{grad.data(), s.out_c}, {raw.data(), s.out_c}, of_out,
                                  of_out + 2 * s.out_c,   of_out + s.out_c,      none};
    const WeightOf<Value> w{weight.data(), g.in_c * taps, taps, s.kernel, 1};
    float* sums = to->sums.data();

    ForwardArgsOf<Value> forward{};
    forward.g = g;
    forward.groups = s.groups;
    forward.x = lazy;
    forward.weight = w;
    forward.out = {to->out.data(), s.out_c};
    forward.mean = sums;
    forward.m2 = sums + s.out_c;
    forward.residual = {residual.data(), s.out_c};
    forward.out_act = relu;
    forward.kept = kept.get();
    // packed by this caller or by the other, read, and packed anew while the other may read
    for (const int64_t version : {0, 0, 1}) {
      forward.version = version;
      kernels.forward(forward, parallel);
    }

    DgradArgsOf<Value> dgrad{};
    dgrad.g = g;
    dgrad.groups = s.groups;
    dgrad.grad = pending;
    dgrad.weight = w;
    dgrad.dx = {to->dx.data(), s.in_c};
    dgrad.x = lazy.map;
    dgrad.scale = of_in;
    dgrad.shift = of_in + s.in_c;
    dgrad.act = relu;
    dgrad.mean = of_in + 2 * s.in_c;
    dgrad.invstd = of_in + 3 * s.in_c;
    dgrad.sum_dz = sums + 2 * s.out_c;
    dgrad.sum_dz_xhat = dgrad.sum_dz + s.in_c;
    kernels.dgrad(dgrad, parallel);

    kernels.wgrad({g, s.groups, pending, lazy, {to->dweight.data(), g.in_c * taps, taps, s.kernel, 1}}, parallel);
  }
};

// The passes over one map, a pool with its index among them.
struct Passes {
  using Value = float;
  Shape s;
  std::vector<float> x, residual, grad, vectors;

  explicit Passes(const Shape& shape)
      : s(shape),
        x(numbers<float>(s.batch * s.size * s.size * s.in_c, 1)),
        residual(numbers<float>(static_cast<int64_t>(x.size()), 2)),
        grad(numbers<float>(static_cast<int64_t>(x.size()), 3)),
        vectors(numbers<float>(6 * s.in_c, 4)) {}

  void run(const PassKernels& kernels, Parallel parallel, Written<float>* to) {
    const int64_t c = s.in_c;
    float* sums = to->sums.data();
    PassArgs a{};
    a.storage = Storage::f32;
    a.rows = s.batch * s.size * s.size;
    a.channels = c;
    a.act = {Act::relu, 0};
    for (int i = 0; i < kMaxConstants; ++i) a.constants[i] = {vectors.data() + i * c, 0};
    a.in[0] = {x.data(), c};
    a.in[1] = {residual.data(), c};
    a.out = {to->dx.data(), c};
    a.measured = a.out;
    a.mean = sums;
    a.m2 = sums + c;
    kernels.add_act_forward(a, true, true, true, parallel);
    kernels.statistics(a, parallel);

    PassArgs back = a;
    back.measured = {nullptr, 0};
    back.in[0] = {grad.data(), c};
    back.in[1] = {x.data(), c};
    back.in[2] = {residual.data(), c};
    for (int i = 0; i < 3; ++i) back.sums[i] = {sums + (2 + i) * c, nullptr};
    kernels.add_act_backward(back, true, true, 3, parallel);
    kernels.dgrad_epilogue(back, true, true, parallel);
    kernels.apply_grad_coeff(back, true, parallel);

    PoolArgs pool{};
    pool.pass = a;
    const int64_t half = s.size / 2;
    pool.batch = s.batch;
    pool.in_h = pool.in_w = s.size;
    pool.out_h = pool.out_w = half;
    pool.kernel_h = pool.kernel_w = pool.stride_h = pool.stride_w = 2;
    pool.pass.rows = s.batch * half * half;
    pool.pass.out = {to->out.data(), c};
    pool.pass.measured = pool.pass.out;
    std::vector<uint8_t> index(static_cast<size_t>(pool.pass.rows * c));
    pool.index = index.data();
    pool.index_pitch = c;
    kernels.pool_forward(pool, parallel);
    pool.pass = back;
    pool.pass.in[0] = {x.data(), c};
    pool.pass.in[1] = {grad.data(), c};
    kernels.pool_backward(pool, true, true, parallel);
  }
};

// Results in a file: written, or compared with what is there.
class Transcript {
 public:
  Transcript(const std::string& mode, const char* path)
      : writes_(mode == "write"), file_(std::fopen(path, writes_ ? "wb" : "rb")) {}
  ~Transcript() {
    if (file_ != nullptr) std::fclose(file_);
  }

  bool holds(const Written<float>& w) { return holds(w.out) & holds(w.dx) & holds(w.dweight) & holds(w.sums); }

 private:
  bool holds(const std::vector<float>& values) {
    if (file_ == nullptr) return false;
    if (writes_) return std::fwrite(values.data(), sizeof(float), values.size(), file_) == values.size();
    std::vector<float> expected(values.size());
    if (std::fread(expected.data(), sizeof(float), expected.size(), file_) != expected.size()) return false;
    double largest = 0, difference = 0;
    for (size_t i = 0; i < values.size(); ++i) {
      if (!std::isfinite(values[i])) return false;
      largest = std::fmax(largest, std::fabs(expected[i]));
      difference = std::fmax(difference, std::fabs(values[i] - expected[i]));
    }
    return difference <= 1e-5 * largest;
  }

  bool writes_;
  std::FILE* file_;
};

struct Run {
  bool race = false;
  Transcript* transcript = nullptr;  // of the portable kernels
};

// Two callers at once; whether both have the bits of one that is alone.
template <class Work, class Kernels>
bool agree(const std::string& name, const Shape& shape, const Kernels& kernels, const Run& run) {
  Work work(shape);
  Written<typename Work::Value> wanted(shape), one(shape), two(shape);
  work.run(kernels, alone, &wanted);
  std::thread other([&] { work.run(kernels, spread, run.race ? &one : &two); });
  work.run(kernels, spread, &one);
  other.join();
  const bool same = run.race || (one == wanted && two == wanted);
  bool right = true;
  if constexpr (std::is_same_v<typename Work::Value, float>)
    right = run.transcript == nullptr || run.transcript->holds(wanted);
  std::printf("%s %s\n", name.c_str(), !same ? "differs from one thread" : right ? "ok" : "differs from the file");
  return same && right;
}

template <class T>
struct ConvolutionOf : Convolution<T> {
  using Value = T;
  using Convolution<T>::Convolution;
};

template <class Value>
bool convolutions(const std::string& name, const ConvKernelsOf<Value>& kernels, const Run& run) {
  bool right = true;
  // Winograd's by either tiles, a strided one, a product with more than one panel, an odd rest, few pixels; groups
  // abreast, and groups that read more than they write; depthwise, by rows of an image and by phases
  for (const Shape& shape :
       {Shape{2, 20, 64, 64, 3, 1}, Shape{2, 10, 64, 64, 3, 1}, Shape{2, 17, 32, 48, 3, 2}, Shape{2, 14, 72, 136, 1, 1},
        Shape{3, 13, 34, 18, 3, 1}, Shape{1, 5, 64, 96, 3, 1}, Shape{2, 12, 64, 64, 3, 1, 16},
        Shape{2, 13, 32, 32, 3, 2, 16}, Shape{1, 9, 96, 48, 3, 1, 3}, Shape{2, 22, 40, 40, 3, 1, 40},
        Shape{1, 45, 24, 24, 5, 2, 24}})
    right &= agree<ConvolutionOf<Value>>(name + " convolution " + std::to_string(shape.in_c), shape, kernels, run);
  return right;
}

bool passes(const std::string& name, const PassKernels& kernels, const Run& run) {
  bool right = true;
  for (const Shape& shape : {Shape{4, 20, 48, 48, 1, 1}, Shape{4, 26, 5, 5, 1, 1}})
    right &= agree<Passes>(name + " passes " + std::to_string(shape.in_c), shape, kernels, run);
  return right;
}

bool everything(const Run& run) {
  bool right = convolutions("default", conv_kernels_default, run) & passes("default", pass_kernels_default, run);
#if defined(__x86_64__)
  const Run others{run.race};
  if (capability_supported(Capability::avx2))
    right &= convolutions("avx2", conv_kernels_avx2, others) & passes("avx2", pass_kernels_avx2, others);
  if (capability_supported(Capability::avx512))
    right &= convolutions("avx512", conv_kernels_avx512, others) & passes("avx512", pass_kernels_avx512, others);
  if (capability_supported(Capability::avx512_bf16))
    right &= convolutions("avx512_bf16", conv_kernels_avx512_bf16, others);
#endif
  return right;
}

}  // namespace
}  // namespace fusedres

int main(int count, char** words) {
  const std::string mode = count > 1 ? words[1] : "";
  if (count < 3) return fusedres::everything({mode == "race"}) ? 0 : 1;
  fusedres::Transcript transcript(mode, words[2]);
  return fusedres::everything({false, &transcript}) ? 0 : 1;
}
