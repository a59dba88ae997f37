#include "tape.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

namespace fusedres {
namespace {

using torch::stable::Tensor;

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
enum Step : int64_t { kEmpty, kEmptyLike, kView, kFill, kCall };

void step(Reader& r) {
  switch (r.integer()) {
    case kEmpty: {
      const int64_t to = r.integer(), dtype = r.integer();
      const std::vector<int64_t> sizes = r.integers(), strides = r.integers();
      AtenTensorHandle made = nullptr;
      STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(sizes.size()), sizes.data(), strides.data(),
                                                             int32_t(dtype), aoti_torch_device_type_cpu(), 0, &made));
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
    case kCall: {
      const int64_t number = r.integer();
      STD_TORCH_CHECK(number >= 0 && number < int64_t(entries().size()), "no operator has the number ", number);
      entries()[number].run(r);
      return;
    }
    default: STD_TORCH_CHECK(false, "a recorded schedule that is none");
  }
}

// `code`: how many tensors there are in all, the numbers of those that are returned, then steps, each followed by the
// numbers of the tensors that nothing reads any more. `inputs` are the first tensors.
std::vector<Tensor> play(std::vector<Tensor> inputs, const Tensor& code, const Tensor& numbers) {
  STD_TORCH_CHECK(code.scalar_type() == torch::headeronly::ScalarType::Long && code.is_contiguous() &&
                      numbers.scalar_type() == torch::headeronly::ScalarType::Double && numbers.is_contiguous(),
                  "code must hold 64-bit integers, numbers float64, side by side");
  Slots slots;
  Reader r(static_cast<const int64_t*>(code.data_ptr()), code.numel(), static_cast<const double*>(numbers.data_ptr()),
           numbers.numel(), slots);
  const int64_t size = r.integer();
  STD_TORCH_CHECK(size >= int64_t(inputs.size()), "a recorded schedule of ", size, " tensors got ", inputs.size());
  slots.resize(size);
  for (size_t i = 0; i < inputs.size(); ++i) slots[i] = std::move(inputs[i]);
  const std::vector<int64_t> outputs = r.integers();
  while (!r.done()) {
    step(r);
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
  m.def("play(Tensor[] inputs, Tensor code, Tensor numbers) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(fusedres_cpp, CPU, m) { m.impl("play", TORCH_BOX(&fusedres::play)); }
