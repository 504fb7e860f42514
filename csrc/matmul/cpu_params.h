// What the CPU kernels of this family are given.
#pragma once

#include <cstdint>

#include "common/cpu_isa.h"

namespace tgi {

// Weights are packed in panels of 32 output features, in_features by 32, so that a step along in_features
// reads one cache line of bfloat16. The last panel is filled up with zeros.
constexpr int64_t kPanel = 32;

struct PackLinearParams {
  const void* weight;  // [out_features, in_features], bfloat16 or float
  void* packed;        // [panels, in_features, 32], the same type
  int64_t out_features, in_features;
  bool is_bfloat16;
};

struct LinearParams {
  const float* x;         // [tokens, in_features], rows x_stride apart
  const void* packed;     // [panels, in_features, 32], bfloat16 or float
  const float* bias;      // [out_features] or nullptr
  const float* residual;  // [tokens, out_features] or nullptr; may be out
  float* out;             // [tokens, out_features]
  float* tiles;           // scratch of kRowBlock · in_features floats
  int64_t x_stride, tokens, in_features, out_features;
  bool is_bfloat16;
};

// Tokens that are worked on together: their x is interleaved once for all panels, and stays in the L2 or L3
// cache.
constexpr int64_t kRowBlock = 240;

TGI_CPU_KERNEL(pack_linear, PackLinearParams)
TGI_CPU_KERNEL(linear, LinearParams)

}  // namespace tgi
