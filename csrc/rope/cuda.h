// Launchers of the rope family's CUDA kernels.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/dtype.h"

namespace tgi {

inline constexpr int kPageTokens = 16;

// Rotates q in place, writes rotated k and v to their slots. q, k and v share a dtype, which the pages have
// too unless they are e4m3; strides are in elements and between tokens: heads and head_dim are contiguous.
struct RotaryParams {
  void* q;                   // [tokens, heads, head_dim]
  const void* k;             // [tokens, kv_heads, head_dim]
  const void* v;             // [tokens, kv_heads, head_dim]
  void* kv_pages;            // [pages, 2, kv_heads, 16, head_dim]
  const float* cos_sin;      // [positions, rot_dim]: cosines, then sines
  const int32_t* positions;  // [tokens]
  const int64_t* slots;      // [tokens]: page · 16 + row; negative: nothing is written
  const void* q_norm;        // [head_dim] or null: RMSNorm of each head before the rotation
  const void* k_norm;
  int64_t tokens;
  int64_t q_stride, k_stride, v_stride;
  int heads, kv_heads, head_dim, rot_dim;
  float eps;
  bool interleaved;  // pairs are (2i, 2i+1) instead of (i, i + rot_dim/2)
  bool aligned;      // every head starts on 16 bytes
  bool e4m3;         // the pages are float8: largest value 448, at which what is larger is kept
};

inline constexpr int kRotaryMaxHeadDim = 512;

cudaError_t rotary_kv_write(const RotaryParams& params, DType dtype, cudaStream_t stream);

}  // namespace tgi
