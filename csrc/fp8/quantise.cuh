// Rounding of 16-bit numbers to e4m3: shared by the kernels that do it, whose bits agree.
#pragma once

#include <cuda_fp8.h>

#include "common/reduce.cuh"
#include "common/vec.cuh"
#include "fp8/cuda.h"

namespace tgi::fp8 {

constexpr float kLargest = 448.0f;
constexpr float kLeast = 0x1p-100f;  // so that the scale of a row of zeros has a reciprocal

// Eight numbers as codes. Values past the largest become the largest; NaN stays.
template <typename T>
__device__ __forceinline__ uint2 codes_of(const Vec<T>& x, float inverse) {
  uint32_t word[2];
#pragma unroll
  for (int w = 0; w < 2; ++w) {
    const auto pair = [&](int i) {
      const float2 both{element(x, 4 * w + i) * inverse, element(x, 4 * w + i + 1) * inverse};
      return static_cast<uint32_t>(__nv_cvt_float2_to_fp8x2(both, __NV_SATFINITE, __NV_E4M3));
    };
    word[w] = pair(0) | pair(2) << 16;
  }
  return {word[0], word[1]};
}

template <typename T>
__device__ __forceinline__ float largest_of(const Vec<T>& x) {
  float most = 0.0f;
#pragma unroll
  for (int i = 0; i < kVec<T>; ++i) most = fmaxf(most, fabsf(element(x, i)));
  return most;
}

__device__ __forceinline__ float scale_for(float most, float bound) {
  return fmaxf(fminf(most, bound), kLeast) * (1.0f / kLargest);
}

// The largest of the CTA's values, to every thread.
__device__ __forceinline__ float block_max(float value, float* partial) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
  value = warp_max(value);
  if (warps == 1) return value;
  if (lane == 0) partial[warp] = value;
  __syncthreads();
  return warp_max(lane < warps ? partial[lane] : 0.0f);
}

}  // namespace tgi::fp8
