// What the CPU kernels of this family are given.
#pragma once

#include <cstdint>

#include "common/cpu_isa.h"

namespace tgi {

struct GatedParams {
  const float* x;  // [tokens, 2·inner], gate first
  float* out;      // [tokens, inner]
  int64_t tokens;
  int64_t inner;
};

TGI_CPU_KERNEL(silu_and_mul, GatedParams)
TGI_CPU_KERNEL(gelu_and_mul, GatedParams)
TGI_CPU_KERNEL(gelu_tanh_and_mul, GatedParams)

}  // namespace tgi
