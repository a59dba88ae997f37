// What convolutions need of a BatchNorm.
#pragma once

#include "tensors.h"

namespace fusedres {

// Scale and shift, `channels` of each, of a BatchNorm that normalises by its running statistics.
void frozen_scale_shift(const OptionalTensor& weight, const OptionalTensor& bias, const Tensor& running_mean,
                        const Tensor& running_var, double eps, int64_t channels, float* scale, float* shift);

}  // namespace fusedres
