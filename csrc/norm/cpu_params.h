// What the CPU kernels of this family are given.
#pragma once

#include <cstdint>

#include "common/cpu_isa.h"

namespace tgi {

struct RmsNormParams {
  const float* x;  // [tokens, hidden], rows x_stride apart
  int64_t x_stride;
  float* residual;      // [tokens, hidden] or nullptr: x is added to it in place, and the sum is normalised
  const float* weight;  // [hidden]
  float* out;           // [tokens, hidden]
  int64_t tokens;
  int64_t hidden;
  float eps;
};

TGI_CPU_KERNEL(rms_norm, RmsNormParams)

}  // namespace tgi
