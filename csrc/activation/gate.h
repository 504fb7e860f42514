// A gate after a product, for ops that have it as an argument.
#pragma once

#include "activation/cpu_params.h"
#include "common/torch_cpu.h"

namespace tgi {

// The numbers are those of tgi_kernels.quant.GATES.
inline void apply_gate(int64_t gate, const GatedParams& params) {
  static constexpr void (*kGates[])(const GatedParams&) = {silu_and_mul, gelu_and_mul, gelu_tanh_and_mul};
  check(gate >= 1 && gate <= 3, "gate is ", gate, "; 1 to 3 are known, 0 is none");
  kGates[gate - 1](params);
}

}  // namespace tgi
