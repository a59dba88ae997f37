#include "fresh.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>

#include "map_memory.h"

namespace fusedres {

// As c10::Device lies in memory, of the CPU.
struct CpuDevice {
  int8_t type = 0, index = -1;
};

#if defined(__linux__)
// c10::reportMemoryUsageToProfiler. The stable interface has none: weak, so that a torch without it loads this library,
// and only does not see maps in its profiler.
[[gnu::weak]] void report_memory(void* data, int64_t change, size_t used, size_t held,
                                 CpuDevice) __asm__("_ZN3c1027reportMemoryUsageToProfilerEPvlmmNS_6DeviceE");
#else
constexpr void (*report_memory)(void*, int64_t, size_t, size_t, CpuDevice) = nullptr;
#endif

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void tell_profiler(void* data, int64_t change) {
  if (report_memory == nullptr) return;
  const MapMemory now = map_memory();
  report_memory(data, change, size_t(now.used), size_t(now.held), {});
}

// Of the dtypes that maps have; 0 of others.
int64_t bytes_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Byte: return 1;
    case ScalarType::Half:
    case ScalarType::BFloat16: return 2;
    case ScalarType::Float: return 4;
    case ScalarType::Double: return 8;
    default: return 0;
  }
}

// Up to the last of the values, the first of which is at the beginning.
int64_t span(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides) {
  int64_t last = 0;
  for (size_t i = 0; i < sizes.size(); ++i) {
    if (sizes[i] <= 0) return 0;
    last += (sizes[i] - 1) * strides[i];
  }
  return last + 1;
}

}  // namespace

Tensor fresh(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides, ScalarType dtype) {
  STD_TORCH_CHECK(sizes.size() == strides.size(), "a stride for each size: found ", strides.size(), " for ",
                  sizes.size());
  const int64_t bytes = span(sizes, strides) * bytes_of(dtype), dims = int64_t(sizes.size());
  const int32_t number = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  const CpuDevice cpu;
  void* data = take_map(bytes);
  AtenTensorHandle made = nullptr;
  if (data == nullptr) {
    // torch 2.11 does not say what was in the way
    STD_TORCH_CHECK(aoti_torch_empty_strided(dims, sizes.data(), strides.data(), number, cpu.type, cpu.index, &made) ==
                        AOTI_TORCH_SUCCESS,
                    "a map of ", bytes, " bytes could not be allocated: there is too little memory");
    return Tensor(made);
  }
  const auto give = [](void* data, void* bytes) {
    tell_profiler(data, -reinterpret_cast<int64_t>(bytes));
    give_map(data);
  };
  const AOTITorchError error =
      torch_from_blob(data, dims, sizes.data(), strides.data(), 0, number, cpu.type, cpu.index, &made,
                      aoti_torch_layout_strided(), nullptr, 0, give, reinterpret_cast<void*>(bytes));
  if (error != AOTI_TORCH_SUCCESS) give_map(data);
  STABLE_TORCH_ERROR_CODE_CHECK(error);
  tell_profiler(data, bytes);
  return Tensor(made);
}

}  // namespace fusedres

STABLE_TORCH_LIBRARY_FRAGMENT(fusedres_cpp, m) {
  m.def("fresh(int[] sizes, int[] strides, ScalarType dtype) -> Tensor");
}

// Without a tensor among its arguments there is no device to choose by.
STABLE_TORCH_LIBRARY_IMPL(fusedres_cpp, CompositeExplicitAutograd, m) { m.impl("fresh", TORCH_BOX(&fusedres::fresh)); }
