// 16-byte vectors of elements and their conversion to and from fp32.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cstdint>

namespace tgi {

// Elements of one 16-byte access.
template <typename T>
inline constexpr int kVec = 16 / static_cast<int>(sizeof(T));

template <typename T>
struct alignas(16) Vec {
  T at[kVec<T>];
};

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

// Rounds to nearest even, as torch does.
template <typename T>
__device__ __forceinline__ T from_float(float x) {
  if constexpr (sizeof(T) == 4) {
    return x;
  } else if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(x);
  } else {
    return __float2bfloat16_rn(x);
  }
}

// Loads that are read once: they leave L1 to what is read again.
template <typename T>
__device__ __forceinline__ Vec<T> load_streaming(const T* from) {
  uint4 bits;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(bits.x), "=r"(bits.y), "=r"(bits.z), "=r"(bits.w)
               : "l"(from));
  return __builtin_bit_cast(Vec<T>, bits);
}

// Loads of what is constant for the whole kernel and read by many CTAs.
template <typename T>
__device__ __forceinline__ Vec<T> load_constant(const T* from) {
  const uint4 bits = __ldg(reinterpret_cast<const uint4*>(from));
  return __builtin_bit_cast(Vec<T>, bits);
}

template <typename T>
__device__ __forceinline__ void store(T* to, const Vec<T>& vec) {
  *reinterpret_cast<uint4*>(to) = __builtin_bit_cast(uint4, vec);
}

// One vector of a row whose length or address may not be a multiple of 16 bytes: `first` is the index of its first
// element, elements past `length` read as zero. `aligned` is uniform over the grid.
template <typename T, bool kConstant = false>
__device__ __forceinline__ Vec<T> load_row(const T* row, int first, int length, bool aligned) {
  if (aligned) {
    if (first < length) return kConstant ? load_constant(row + first) : load_streaming(row + first);
    return Vec<T>{};
  }
  Vec<T> vec{};
#pragma unroll
  for (int i = 0; i < kVec<T>; ++i) {
    if (first + i < length) vec.at[i] = row[first + i];
  }
  return vec;
}

template <typename T>
__device__ __forceinline__ void store_row(T* row, int first, int length, bool aligned, const Vec<T>& vec) {
  if (aligned) {
    if (first < length) store(row + first, vec);
    return;
  }
#pragma unroll
  for (int i = 0; i < kVec<T>; ++i) {
    if (first + i < length) row[first + i] = vec.at[i];
  }
}

}  // namespace tgi
