// What the CPU kernels of this family are given.
#pragma once

#include <cstdint>

#include "common/cpu_isa.h"
#include "matmul/cpu_params.h"

namespace tgi {

constexpr int64_t kQuad = 4;               // steps along in_features whose codes fill a word
constexpr int64_t kMostInt8Steps = 65535;  // of int32 sums that 128 · 255 is added to so often

// y = (x rounded to int8) · weightᵀ, where a weight is (code − 128) · its row's scale. Panels of 32 output
// features as in matmul. A word's bytes are steps 0, 2, 1 and 3: two neighbours lie in its even bytes.
struct Int8LinearParams {
  LinearParams product;  // but for the weight and the tiles
  const uint8_t* codes;  // [panels, ⌈in_features / 4⌉, 32, 4], 128 beyond in_features
  const float* scales;   // [panels, 32]
  float input_scale;     // of all x; 0: the largest number of a token becomes 127.5 steps
  int32_t* words;        // scratch: 2 words a quad of each row, for up to kRowBlock rows
  float* row_scales;     // scratch: [kRowBlock]
  int32_t* row_sums;     // scratch: [kRowBlock], of codes
  bool use_vnni;         // the CPU has vpdpbusd for 512 bits
};

TGI_CPU_KERNEL(int8_linear, Int8LinearParams)

}  // namespace tgi
