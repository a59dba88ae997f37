#include "tape.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <array>

#include "cpu/fresh.h"

namespace fusedres {
namespace {

using torch::stable::Tensor;

// As torch numbers it.
constexpr int32_t kCpu = 0;
// No kernel has as many parameters.
constexpr int64_t kMostParameters = 64;

struct Entry {
  const char* name;
  TapeOperator run;
};

// In a function, because operators are added while the library is being loaded, in no order.
std::vector<Entry>& entries() {
  static std::vector<Entry> all;
  return all;
}

// What a recorded schedule does beside calling operators; `fusedres/backends/tape.py` writes these numbers.
enum Step : int64_t {
  kEmpty,
  kEmptyLike,
  kView,
  kFill,
  kCopy,
  kAdd,
  kConvolution,
  kConvolutionBackward,
  kCall,
  kLaunch
};

// A device by the numbers that torch gives it.
struct Device {
  int32_t type, index;
};

// As CUDA's driver has them (CUlaunchAttribute, CUlaunchConfig). The attribute of a dependent launch: the kernel may be
// scheduled before the one in front of it on the stream has ended
// (CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION).
struct Attribute {
  int name = 6;
  char gap[4] = {};
  union {
    int allowed;
    char room[64];
  } value = {1};
};
struct Config {
  unsigned grid[3], block[3], shared;
  void* stream;
  const Attribute* attributes;
  unsigned count;
};
static_assert(sizeof(Attribute) == 72 && sizeof(Config) == 56, "as the driver reads them");

// Where kernels are launched: the queue of a GPU, and its driver's functions of the types of CUDA's `cuLaunchKernel`
// and `cuLaunchKernelEx`.
struct Queue {
  using Launcher = int (*)(void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                           unsigned block_y, unsigned block_z, unsigned shared, void* stream, void** parameters,
                           void** extra);
  using Dependent = int (*)(const Config* config, void* function, void** parameters, void** extra);
  void* stream;
  Launcher launcher;
  Dependent dependent;
};

using torch::stable::detail::from;

// Calls an operator of torch's, whose results replace its arguments on `stack`.
template <size_t kArguments>
void call_torch(const char* name, const char* overload, std::array<StableIValue, kArguments>& stack) {
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION));
}

// Adds C numbers to C numbers.
void add(const Tensor& to, const Tensor& other) {
  STD_TORCH_CHECK(to.scalar_type() == other.scalar_type() && to.numel() == other.numel() && to.is_contiguous() &&
                      other.is_contiguous(),
                  "a recorded sum wants tensors of one shape and dtype without gaps");
  const auto sum = [&](auto zero) {
    auto* a = static_cast<decltype(zero)*>(to.data_ptr());
    const auto* b = static_cast<const decltype(zero)*>(other.data_ptr());
    for (int64_t i = 0; i < to.numel(); ++i) a[i] += b[i];
  };
  if (to.scalar_type() == torch::headeronly::ScalarType::Double) return sum(double{});
  STD_TORCH_CHECK(to.scalar_type() == torch::headeronly::ScalarType::Float, "a recorded sum is of float32 or float64");
  sum(float{});
}

// A map of the library's in channels_last, whatever it chose.
Tensor as_map(const Tensor& t) { return torch::stable::contiguous(t, torch::headeronly::MemoryFormat::ChannelsLast); }

// Stride, padding, dilation of a convolution with no output padding, and its groups.
struct Geometry {
  std::vector<int64_t> stride, padding, dilation;
  int64_t groups;

  explicit Geometry(Reader& r)
      : stride(r.integers()), padding(r.integers()), dilation(r.integers()), groups(r.integer()) {}
};

void convolution(Reader& r) {
  const int64_t to = r.integer();
  const Tensor x = r.next<Tensor>(), weight = r.next<Tensor>();
  const auto bias = r.next<std::optional<Tensor>>();
  const Geometry g(r);
  const std::vector<int64_t> no_padding(g.padding.size(), 0);
  std::array<StableIValue, 9> stack{from(x),          from(weight), from(bias),       from(g.stride), from(g.padding),
                                    from(g.dilation), from(false),  from(no_padding), from(g.groups)};
  call_torch("aten::convolution", "", stack);
  r.slot(to) = as_map(torch::stable::detail::to<Tensor>(stack[0]));
}

void convolution_backward(Reader& r) {
  const int64_t to_input = r.integer(), to_weight = r.integer();
  const Tensor grad = r.next<Tensor>(), x = r.next<Tensor>(), weight = r.next<Tensor>();
  const Geometry g(r);
  const std::vector<int64_t> no_padding(g.padding.size(), 0);
  const bool needs_input = to_input >= 0, needs_weight = to_weight >= 0;
  const std::array<bool, 3> wanted{needs_input, needs_weight, false};
  std::array<StableIValue, 11> stack{from(grad),
                                     from(x),
                                     from(weight),
                                     from(std::nullopt),
                                     from(g.stride),
                                     from(g.padding),
                                     from(g.dilation),
                                     from(false),
                                     from(no_padding),
                                     from(g.groups),
                                     from(torch::headeronly::HeaderOnlyArrayRef<bool>(wanted.data(), wanted.size()))};
  call_torch("aten::convolution_backward", "", stack);
  // all three are taken off the stack, since each is owned
  const Tensor dx = torch::stable::detail::to<Tensor>(stack[0]), dweight = torch::stable::detail::to<Tensor>(stack[1]);
  torch::stable::detail::to<Tensor>(stack[2]);
  if (needs_input) r.slot(to_input) = as_map(dx);
  if (needs_weight) r.slot(to_weight) = dweight;
}

// A kernel of a GPU: its handle, grid, threads and shared memory, whether it is dependent, then its parameters, each
// eight bytes of which the kernel reads as many as it wants: the number of a tensor with an offset to its address, or
// -1 with the bits of a number.
void launch(Reader& r, const Queue& queue) {
  void* function = reinterpret_cast<void*>(r.integer());
  const auto next = [&] { return unsigned(r.integer()); };
  const unsigned x = next(), y = next(), z = next(), threads = next(), shared = next();
  const bool dependent = r.integer() != 0;
  STD_TORCH_CHECK(dependent ? queue.dependent != nullptr : queue.launcher != nullptr,
                  "a recorded launch has no driver");
  const int64_t count = r.integer();
  STD_TORCH_CHECK(count >= 0 && count <= kMostParameters, "a recorded launch of ", count, " parameters");
  std::array<int64_t, kMostParameters> values;
  std::array<void*, kMostParameters> parameters;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t tensor = r.integer(), rest = r.integer();
    values[i] = tensor < 0 ? rest : reinterpret_cast<int64_t>(r.tensor(tensor).data_ptr()) + rest;
    parameters[i] = &values[i];
  }
  int error;
  if (dependent) {
    const Attribute attribute;
    const Config config{{x, y, z}, {threads, 1, 1}, shared, queue.stream, &attribute, 1};
    error = queue.dependent(&config, function, parameters.data(), nullptr);
  } else {
    error = queue.launcher(function, x, y, z, threads, 1, 1, shared, queue.stream, parameters.data(), nullptr);
  }
  STD_TORCH_CHECK(error == 0, "the driver has refused a recorded launch: error ", error);
}

void step(Reader& r, const Device& device, const Queue& queue) {
  switch (r.integer()) {
    case kEmpty: {
      const int64_t to = r.integer(), dtype = r.integer();
      const std::vector<int64_t> sizes = r.integers(), strides = r.integers();
      if (device.type == kCpu) {
        r.slot(to) = fresh(sizes, strides, static_cast<torch::headeronly::ScalarType>(dtype));
        return;
      }
      AtenTensorHandle made = nullptr;
      STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(sizes.size()), sizes.data(), strides.data(),
                                                             int32_t(dtype), device.type, device.index, &made));
      r.slot(to) = Tensor(made);
      return;
    }
    case kEmptyLike: {
      const int64_t to = r.integer();
      r.slot(to) = torch::stable::empty_like(r.next<Tensor>());
      return;
    }
    case kView: {
      const int64_t to = r.integer();
      const Tensor of = r.next<Tensor>();
      const std::vector<int64_t> sizes = r.integers(), strides = r.integers();
      AtenTensorHandle made = nullptr;
      STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(of.get(), int64_t(sizes.size()), sizes.data(),
                                                                   strides.data(), r.integer(), &made));
      r.slot(to) = Tensor(made);
      return;
    }
    case kFill: {
      const Tensor to = r.next<Tensor>();
      torch::stable::fill_(to, r.next<double>());
      return;
    }
    case kCopy: {
      Tensor to = r.next<Tensor>();
      torch::stable::copy_(to, r.next<Tensor>());
      return;
    }
    case kAdd: {
      const Tensor to = r.next<Tensor>(), other = r.next<Tensor>();
      return add(to, other);
    }
    case kConvolution: return convolution(r);
    case kConvolutionBackward: return convolution_backward(r);
    case kCall: {
      const int64_t number = r.integer();
      STD_TORCH_CHECK(number >= 0 && number < int64_t(entries().size()), "no operator has the number ", number);
      entries()[number].run(r);
      return;
    }
    case kLaunch: return launch(r, queue);
    default: STD_TORCH_CHECK(false, "a recorded schedule that is none");
  }
}

// Whether a recorded schedule can be played with this tensor: it is where the recorded one was, as aligned, and has its
// dtype, sizes and strides, which the reader stands at; the stride of a dimension of one value says nothing.
bool fits(const Tensor& t, const Device& device, int64_t alignment, Reader& r) {
  int32_t type = 0, index = 0, dtype = 0;
  int64_t *sizes = nullptr, *strides = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t.get(), &type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(t.get(), &index));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &dtype));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(t.get(), &sizes));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(t.get(), &strides));
  bool same = type == device.type && index == device.index &&
              reinterpret_cast<uintptr_t>(t.data_ptr()) % alignment == 0 && dtype == r.integer();
  const int64_t dims = r.integer();
  same = same && t.dim() == dims;
  for (int64_t i = 0; i < dims; ++i) {
    const int64_t size = r.integer(), stride = r.integer();
    same = same && sizes[i] == size && (size == 1 || strides[i] == stride);
  }
  return same;
}

// `code`: type and index of the device, what divides the addresses of all inputs, how many tensors there are in all,
// how many of them are inputs, and of each of these its dtype, its number of dimensions, and size and stride of each;
// the numbers of those that are returned, then steps, each followed by the numbers of the tensors that nothing reads
// any more. `inputs` are the first tensors. Returns nothing, having done nothing, where it was not recorded for such
// inputs.
std::vector<Tensor> play(std::vector<Tensor> inputs, const Tensor& code, const Tensor& numbers, int64_t stream,
                         int64_t launcher, int64_t dependent) {
  STD_TORCH_CHECK(code.scalar_type() == torch::headeronly::ScalarType::Long && code.is_contiguous() &&
                      numbers.scalar_type() == torch::headeronly::ScalarType::Double && numbers.is_contiguous(),
                  "code must hold 64-bit integers, numbers float64, side by side");
  Slots slots;
  Reader r(static_cast<const int64_t*>(code.data_ptr()), code.numel(), static_cast<const double*>(numbers.data_ptr()),
           numbers.numel(), slots);
  const Queue queue{reinterpret_cast<void*>(stream), reinterpret_cast<Queue::Launcher>(launcher),
                    reinterpret_cast<Queue::Dependent>(dependent)};
  const auto type = int32_t(r.integer());
  const Device device{type, int32_t(r.integer())};
  const int64_t alignment = r.integer(), size = r.integer();
  STD_TORCH_CHECK(alignment > 0, "nothing is aligned to ", alignment, " bytes");
  const int64_t count = r.integer();
  STD_TORCH_CHECK(count == int64_t(inputs.size()) && size >= count, "a recorded schedule of ", size, " tensors, ",
                  count, " of them inputs, got ", inputs.size());
  for (const Tensor& t : inputs)
    if (!fits(t, device, alignment, r)) return {};
  slots.resize(size);
  for (size_t i = 0; i < inputs.size(); ++i) slots[i] = std::move(inputs[i]);
  const std::vector<int64_t> outputs = r.integers();
  while (!r.done()) {
    step(r, device, queue);
    for (int64_t n = r.integer(); n > 0; --n) r.slot(r.integer()).reset();
  }
  std::vector<Tensor> returned;
  returned.reserve(outputs.size());
  for (int64_t number : outputs) {
    STD_TORCH_CHECK(r.slot(number).has_value(), "a recorded schedule returns what it has not made");
    returned.push_back(*r.slot(number));
  }
  return returned;
}

}  // namespace

int64_t Reader::integer() {
  STD_TORCH_CHECK(code_ != end_, "a recorded schedule ends in the middle of a step");
  return *code_++;
}

std::vector<int64_t> Reader::integers() {
  const int64_t n = integer();
  STD_TORCH_CHECK(n >= 0 && n <= end_ - code_, "a recorded schedule ends in the middle of a list");
  const int64_t* begin = code_;
  code_ += n;
  return {begin, code_};
}

std::optional<Tensor>& Reader::slot(int64_t number) {
  STD_TORCH_CHECK(number >= 0 && number < int64_t(slots_.size()), "no tensor has the number ", number);
  return slots_[number];
}

double Reader::number(int64_t at) const {
  STD_TORCH_CHECK(at >= 0 && at < count_, "there is no number ", at);
  return numbers_[at];
}

const Tensor& Reader::tensor(int64_t number) {
  const std::optional<Tensor>& found = slot(number);
  STD_TORCH_CHECK(found.has_value(), "tensor ", number, " is not there");
  return *found;
}

std::optional<Tensor> Reader::maybe(int64_t number) {
  return number < 0 ? std::nullopt : std::optional<Tensor>(tensor(number));
}

bool add_tape_operator(const char* name, TapeOperator run) {
  entries().push_back({name, run});
  return true;
}

const char* tape_operator_name(int64_t number) {
  return number < int64_t(entries().size()) ? entries()[number].name : nullptr;
}

}  // namespace fusedres

STABLE_TORCH_LIBRARY_FRAGMENT(fusedres_cpp, m) {
  m.def(
      "play(Tensor[] inputs, Tensor code, Tensor numbers, int stream=0, int launcher=0, int dependent=0) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(fusedres_cpp, CPU, m) { m.impl("play", TORCH_BOX(&fusedres::play)); }
STABLE_TORCH_LIBRARY_IMPL(fusedres_cpp, CUDA, m) { m.impl("play", TORCH_BOX(&fusedres::play)); }
