// Memory for the kernels.
#pragma once

#include <cstdint>

namespace fusedres {

// `bytes` uninitialised bytes, aligned for whole vectors, with room for one more vector behind them; freed by
// std::free. Throws std::runtime_error where there are not so many. Not inline: what throws is compiled once, for any
// CPU.
void* allocate(int64_t bytes);

}  // namespace fusedres
