#include "tape.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <memory>
#include <string>

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
enum Step : int64_t { kEmpty, kEmptyLike, kView, kFill, kCopy, kAdd, kTorch, kSum, kCall, kLaunch };

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

// An argument of an operator of torch's: what it is, and itself; `kMaybe` more where none could stand in its place.
enum Argument : int64_t {
  kNone,
  kTensor,
  kScalar,
  kInteger,
  kNumber,
  kFlag,
  kText,
  kDtype,
  kIntegers,
  kNumbers,
  kFlags,
  kTensors,
  kMaybe
};

// A tensor of a device with these strides.
Tensor empty(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides, int32_t dtype,
             const Device& device) {
  if (device.type == kCpu) return fresh(sizes, strides, static_cast<torch::headeronly::ScalarType>(dtype));
  AtenTensorHandle made = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(sizes.size()), sizes.data(), strides.data(), dtype,
                                                         device.type, device.index, &made));
  return Tensor(made);
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

template <class T>
StableIValue given(Reader& r, bool maybe) {
  const T value = r.next<T>();
  return maybe ? from(std::optional<T>(value)) : from(value);
}

StableIValue flags(Reader& r) {
  const std::vector<int64_t> written = r.integers();
  const auto values = std::make_unique<bool[]>(written.size());
  std::copy(written.begin(), written.end(), values.get());
  return from(torch::headeronly::HeaderOnlyArrayRef<bool>(values.get(), written.size()));
}

// A number in the place of a tensor.
Tensor scalar(Reader& r, const Tensor& numbers) {
  const int64_t at = r.integer();
  STD_TORCH_CHECK(at >= 0 && at < numbers.numel(), "there is no number ", at);
  AtenTensorHandle made = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(numbers.get(), 0, nullptr, nullptr, at, &made));
  return Tensor(made);
}

StableIValue argument(Reader& r, const Tensor& numbers) {
  const int64_t written = r.integer();
  const bool maybe = written >= kMaybe;
  switch (maybe ? written - kMaybe : written) {
    case kNone: return from(std::nullopt);
    case kTensor: return given<Tensor>(r, maybe);
    case kInteger: return given<int64_t>(r, maybe);
    case kNumber: return given<double>(r, maybe);
    case kFlag: return given<bool>(r, maybe);
    case kScalar: return from(scalar(r, numbers));
    case kText: return from(r.text());
    case kIntegers: return given<std::vector<int64_t>>(r, maybe);
    case kNumbers: return given<std::vector<double>>(r, maybe);
    case kTensors: return given<std::vector<Tensor>>(r, maybe);
    case kFlags: return flags(r);
    case kDtype: {
      const auto dtype = static_cast<torch::headeronly::ScalarType>(r.integer());
      return maybe ? from(std::optional(dtype)) : from(dtype);
    }
    default: STD_TORCH_CHECK(false, "an argument of a recorded operator that is none");
  }
}

// What an operator of torch's has made, as it lay in memory when it was recorded: what reads it counts on that.
Tensor as_recorded(const Tensor& made, const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides,
                   const Device& device) {
  int64_t* lies = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(made.get(), &lies));
  const auto found = made.sizes();
  STD_TORCH_CHECK(std::equal(found.begin(), found.end(), sizes.begin(), sizes.end()),
                  "a recorded operator has made a tensor of another shape");
  if (std::equal(strides.begin(), strides.end(), lies)) return made;
  Tensor copy = empty(sizes, strides, int32_t(made.scalar_type()), device);
  torch::stable::copy_(copy, made);
  return copy;
}

// Keeps what was made where the schedule says, and as it says (-1: nowhere, being none, or an argument that was
// overwritten).
void keep(Reader& r, const Tensor& made, const Device& device) {
  const int64_t to = r.integer();
  if (to < 0) return;
  const std::vector<int64_t> sizes = r.integers(), strides = r.integers();
  r.slot(to) = as_recorded(made, sizes, strides, device);
}

// An operator of torch's: its name and overload, its arguments; then of each result where it is kept.
void torch_operator(Reader& r, const Device& device, const Tensor& numbers) {
  const std::string name = r.text(), overload = r.text();
  std::vector<StableIValue> stack;
  for (int64_t n = r.integer(); n > 0; --n) stack.push_back(argument(r, numbers));
  const int64_t results = r.integer();
  if (results > int64_t(stack.size())) stack.resize(results);
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name.c_str(), overload.c_str(), stack.data(), TORCH_ABI_VERSION));
  for (int64_t i = 0; i < results; ++i) keep(r, torch::stable::detail::to<Tensor>(stack[i]), device);
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

void step(Reader& r, const Device& device, const Queue& queue, const Tensor& numbers) {
  switch (r.integer()) {
    case kEmpty: {
      const int64_t to = r.integer(), dtype = r.integer();
      const std::vector<int64_t> sizes = r.integers(), strides = r.integers();
      r.slot(to) = empty(sizes, strides, int32_t(dtype), device);
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
    case kTorch: return torch_operator(r, device, numbers);
    case kSum: {
      const Tensor a = r.next<Tensor>(), b = r.integer() == kScalar ? scalar(r, numbers) : r.next<Tensor>();
      STD_TORCH_CHECK(device.type == kCpu, "a recorded sum of maps is on a CPU");
      AtenTensorHandle made = nullptr;
      // of two tensors alone, since the dispatcher takes no scalar from here
      STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_add_Tensor(a.get(), b.get(), 1.0, &made));
      return keep(r, Tensor(made), device);
    }
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
    step(r, device, queue, numbers);
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

std::vector<double> Reader::numbers() {
  std::vector<double> found;
  for (int64_t at : integers()) found.push_back(number(at));
  return found;
}

std::vector<Tensor> Reader::tensors() {
  std::vector<Tensor> found;
  for (int64_t number : integers()) found.push_back(tensor(number));
  return found;
}

std::string Reader::text() {
  const std::vector<int64_t> letters = integers();
  return {letters.begin(), letters.end()};
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
