// Sums over a warp and over a CTA. The order of additions depends on the number of threads alone.
#pragma once

namespace tgi {

inline constexpr unsigned kFullWarp = 0xffffffffu;

// Every lane of a group of kLanes (a power of two) gets the group's sum.
template <int kLanes = 32>
__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(kFullWarp, value, offset);
  return value;
}

__device__ __forceinline__ float warp_max(float value) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2)
    value = fmaxf(value, __shfl_xor_sync(kFullWarp, value, offset));
  return value;
}

// Every thread of the CTA gets the CTA's sum. partial: shared, one float a warp; not reusable before a
// barrier.
__device__ __forceinline__ float block_sum(float value, float* partial) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int warps = (blockDim.x + 31) / 32;
  value = warp_sum(value);
  if (warps == 1) return value;
  if (lane == 0) partial[warp] = value;
  __syncthreads();
  return warp_sum(lane < warps ? partial[lane] : 0.0f);
}

}  // namespace tgi
