// What the CPU kernels of this family are given.
#pragma once

#include <cstdint>

#include "common/cpu_isa.h"
#include "matmul/cpu_params.h"

namespace tgi {

// A weight is (code − zero) · scale. Panels of 32 output features as in matmul; a word holds 8 codes of 4
// bits or 4 of 8 bits that follow each other along in_features, the first in the lowest bits.
struct QuantWeight {
  const int32_t* words;        // [panels, ⌈in_features / codes of a word⌉, 32]
  const float* scales;         // [panels, groups, 32]
  const float* offsets;        // [panels, groups, 32]: −zero · scale
  int64_t groups, group_size;  // of in_features; a size is a multiple of 8, or there is one group
  int bits;                    // 4 or 8
};

struct QuantLinearParams {
  LinearParams product;  // but for the weight
  QuantWeight weight;
};

TGI_CPU_KERNEL(quant_linear, QuantLinearParams)

}  // namespace tgi
