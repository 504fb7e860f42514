// What the CPU kernels of this family are given.
#pragma once

#include <cstdint>

#include "common/cpu_isa.h"

namespace tgi {

struct NormParams {
  const float* x;  // [tokens, hidden], rows x_stride apart
  int64_t x_stride;
  float* residual;       // [tokens, hidden] or nullptr: x is added to it in place, and the sum is normalised
  const float* weight;   // [hidden]
  const float* bias;     // [hidden] or nullptr
  const int32_t* order;  // [hidden], within the row, or nullptr: which number of the row stands where in out
  float* out;            // [tokens, hidden]; with an order none of the inputs
  int64_t tokens;
  int64_t hidden;
  float eps;
  bool centred;  // LayerNorm: the mean is taken off first; else RMSNorm, without bias
};

TGI_CPU_KERNEL(norm, NormParams)

}  // namespace tgi
