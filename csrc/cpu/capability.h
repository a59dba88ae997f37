// Which instruction set the kernels use, chosen once per process.
#pragma once

namespace fusedres {

enum class Capability { baseline, avx2, avx512, avx512_bf16 };
constexpr Capability kCapabilities[] = {Capability::baseline, Capability::avx2, Capability::avx512,
                                        Capability::avx512_bf16};

// The best one of this CPU, or what FUSEDRES_CPU_CAPABILITY (default, avx2, avx512, avx512_bf16) asks for. Throws
// std::invalid_argument where that is unknown or not supported here. avx512_bf16 is avx512 with bfloat16 convolutions
// of its own; a CPU with AMX has to be asked for it, because its vendor's library computes them by matrix tiles.
Capability cpu_capability();

// Its name as FUSEDRES_CPU_CAPABILITY spells it.
const char* capability_name(Capability capability);

bool capability_supported(Capability capability);

}  // namespace fusedres
