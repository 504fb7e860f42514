// How a warpgroup stores its sums of weights' products on Hopper.
#pragma once

#include "common/mma.cuh"
#include "common/vec.cuh"
#include "quant/cuda.h"
#include "quant/layout.cuh"

namespace tgi {

// An 8 × 8 matrix of 16-bit elements, two of a row in each lane, transposed.
__device__ __forceinline__ uint32_t transposed(uint32_t two) {
  uint32_t to;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(to) : "r"(two));
  return to;
}

// Adds bias and residual to a warpgroup's products and stores them. Accumulator 4j + 2h + e is of row 16 ·
// warp + lane / 4 + 8h of the strip and of token 8j + 2 (lane % 4) + e of the block; they change places, so
// that a lane has four features of one token and a warp writes whole sectors: memory takes parts of them at a
// fifth of its speed.
template <typename T, int kTokens>
__device__ __forceinline__ void finish(const QuantMatmulParams& p, int strip, int block,
                                       const float (&d)[kTokens / 2]) {
  const int lane = threadIdx.x % 32, quad = lane % 4;
  const int row = strip * kStrip + threadIdx.x % 128 / 32 * 16;
  const int feature = row + quad * 4, features = p.weight.rows;
  float bias[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int of = row + lane / 4 + 8 * h;
    bias[h] = p.bias != nullptr && of < features ? to_float(static_cast<const T*>(p.bias)[of]) : 0.0f;
  }
#pragma unroll
  for (int j = 0; j < kTokens / 8; ++j) {
    uint32_t half[2];
#pragma unroll
    for (int h = 0; h < 2; ++h)
      half[h] = transposed(pack<T>(d[4 * j + 2 * h] + bias[h], d[4 * j + 2 * h + 1] + bias[h]));
    uint32_t y[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int from = lane / 4 * 4 + quad % 2 * 2 + i;
      const uint32_t low = __shfl_sync(~0u, half[0], from), high = __shfl_sync(~0u, half[1], from);
      y[i] = quad < 2 ? low : high;
    }
    const int token = block * kTokens + 8 * j + lane / 4;
    if (token >= p.tokens) continue;
    T* to = static_cast<T*>(p.out) + token * p.out_stride + feature;
    const T* residual = static_cast<const T*>(p.residual) + token * p.residual_stride + feature;
    if (p.is_wide && feature < features) {
      if (p.residual != nullptr) {
        const uint2 more = *reinterpret_cast<const uint2*>(residual);
        const float2 a = unpack<T>(y[0]), b = unpack<T>(y[1]), c = unpack<T>(more.x), e = unpack<T>(more.y);
        y[0] = pack<T>(a.x + c.x, a.y + c.y);
        y[1] = pack<T>(b.x + e.x, b.y + e.y);
      }
      *reinterpret_cast<uint2*>(to) = make_uint2(y[0], y[1]);
      continue;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (feature + i >= features) break;
      const float2 two = unpack<T>(y[i / 2]);
      float one = i % 2 == 0 ? two.x : two.y;
      if (p.residual != nullptr) one += to_float(residual[i]);
      to[i] = from_float<T>(one);
    }
  }
}

}  // namespace tgi
