// Schedules that were recorded: operators in a row on numbered tensors, run without Python between them.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

namespace fusedres {

using Slots = std::vector<std::optional<torch::stable::Tensor>>;

// Where in a recorded schedule it stands, and the tensors that there are so far.
class [[gnu::visibility("hidden")]] Reader {
 public:
  Reader(const int64_t* code, int64_t size, const double* numbers, int64_t count, Slots& slots)
      : code_(code), end_(code + size), numbers_(numbers), count_(count), slots_(slots) {}

  bool done() const { return code_ == end_; }

  // The next argument of an operator: what it is follows from the operator's own type.
  template <class T>
  T next() {
    if constexpr (std::is_same_v<T, torch::stable::Tensor>) return tensor(integer());
    else if constexpr (std::is_same_v<T, std::optional<torch::stable::Tensor>>) return maybe(integer());
    else if constexpr (std::is_same_v<T, double>) return number(integer());
    else if constexpr (std::is_same_v<T, bool>) return integer() != 0;
    else if constexpr (std::is_same_v<T, std::vector<int64_t>>) return integers();
    else if constexpr (std::is_same_v<T, std::vector<double>>) return numbers();
    else if constexpr (std::is_same_v<T, std::vector<torch::stable::Tensor>>) return tensors();
    else {
      static_assert(std::is_same_v<T, int64_t>, "no recorded operator takes this");
      return integer();
    }
  }

  int64_t integer();
  std::vector<int64_t> integers();
  std::vector<double> numbers();
  std::vector<torch::stable::Tensor> tensors();
  std::string text();
  // Where the tensor of that number is kept, and the tensor itself.
  std::optional<torch::stable::Tensor>& slot(int64_t number);
  const torch::stable::Tensor& tensor(int64_t number);

 private:
  double number(int64_t at) const;
  std::optional<torch::stable::Tensor> maybe(int64_t number);

  const int64_t *code_, *end_;
  const double* numbers_;
  int64_t count_;
  Slots& slots_;
};

using TapeOperator = void (*)(Reader&);

// Adds an operator to those that a recorded schedule may hold.
bool add_tape_operator(const char* name, TapeOperator run);

// The names of all of them, each at the place that is its number; null behind the last.
const char* tape_operator_name(int64_t number);

template <class... Args, class F>
void call_with(Reader& reader, F&& body, void (*)(Args...)) {
  // in braces, so that they are read in their order
  std::tuple<std::decay_t<Args>...> arguments{reader.next<std::decay_t<Args>>()...};
  std::apply(body, std::move(arguments));
}

// Adds the operator `kRun`, which writes into its arguments and returns nothing.
template <auto kRun>
bool on_tape(const char* name) {
  return add_tape_operator(name, [](Reader& reader) { call_with(reader, kRun, kRun); });
}

}  // namespace fusedres
