// Which instruction set the kernels use, chosen once per process.
#pragma once

namespace fusedres {

enum class Capability { baseline, avx2, avx512 };

// The best one of this CPU, or what FUSEDRES_CPU_CAPABILITY (default, avx2, avx512) asks for. Throws std::invalid_argument where that
// is unknown or not supported here.
Capability cpu_capability();

// Its name as FUSEDRES_CPU_CAPABILITY spells it.
const char* capability_name(Capability capability);

bool capability_supported(Capability capability);

}  // namespace fusedres
