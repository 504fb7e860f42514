// Vectors of elements as they lie in memory, and their conversion to and from fp32.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace tgi {

// Elements of one 16-byte access.
template <typename T>
inline constexpr int kVec = 16 / static_cast<int>(sizeof(T));

// Words, not elements: a struct of 16-bit elements would be taken apart where it is loaded, which waits for
// the load.
template <typename T, int kSize = kVec<T>>
struct alignas(kSize * sizeof(T)) Vec {
  static constexpr int kWords = kSize * static_cast<int>(sizeof(T)) / 4;
  uint32_t word[kWords];
};

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

// Rounds to nearest even, as torch does.
template <typename T>
__device__ __forceinline__ T from_float(float x) {
  if constexpr (__is_same(T, __half)) {
    return __float2half_rn(x);
  } else if constexpr (__is_same(T, __nv_bfloat16)) {
    return __float2bfloat16_rn(x);
  } else {
    return x;
  }
}

// x as it is after being stored as T.
template <typename T>
__device__ __forceinline__ float rounded(float x) {
  return to_float(from_float<T>(x));
}

template <typename T, int kSize>
__device__ __forceinline__ float element(const Vec<T, kSize>& vec, int i) {
  if constexpr (__is_same(T, __half)) {
    const uint32_t word = vec.word[i / 2];
    return __half2float(__ushort_as_half(static_cast<uint16_t>(i % 2 ? word >> 16 : word)));
  } else if constexpr (__is_same(T,
                                 __nv_bfloat16)) {  // a bfloat16 is the upper half of the float of its value
    return __uint_as_float(i % 2 ? vec.word[i / 2] & 0xffff0000u : vec.word[i / 2] << 16);
  } else {
    return __uint_as_float(vec.word[i]);
  }
}

template <typename T, int kSize>
__device__ __forceinline__ Vec<T, kSize> pack(const float (&x)[kSize]) {
  Vec<T, kSize> vec;
#pragma unroll
  for (int w = 0; w < vec.kWords; ++w) {
    if constexpr (__is_same(T, __half)) {
      const __half2 both = __floats2half2_rn(x[2 * w], x[2 * w + 1]);
      vec.word[w] = *reinterpret_cast<const uint32_t*>(&both);
    } else if constexpr (__is_same(T, __nv_bfloat16)) {
      const __nv_bfloat162 both = __floats2bfloat162_rn(x[2 * w], x[2 * w + 1]);
      vec.word[w] = *reinterpret_cast<const uint32_t*>(&both);
    } else {
      vec.word[w] = __float_as_uint(x[w]);
    }
  }
  return vec;
}

// Loads that are read once: they leave L1 to what is read again.
template <typename T>
__device__ __forceinline__ Vec<T> load_streaming(const T* from) {
  Vec<T> vec;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(vec.word[0]), "=r"(vec.word[1]), "=r"(vec.word[2]), "=r"(vec.word[3])
               : "l"(from));
  return vec;
}

// Loads of what is constant for the whole kernel and read by many CTAs.
template <typename T>
__device__ __forceinline__ Vec<T> load_constant(const T* from) {
  return __builtin_bit_cast(Vec<T>, __ldg(reinterpret_cast<const uint4*>(from)));
}

template <typename T, int kSize>
__device__ __forceinline__ void store(T* to, const Vec<T, kSize>& vec) {
  *reinterpret_cast<Vec<T, kSize>*>(to) = vec;
}

// One vector of a row whose address or length may not be whole vectors: `first` is the index of its first
// element; `missing` stands where the row has ended. `aligned` is uniform over the grid.
template <typename T>
__device__ __forceinline__ Vec<T> load_row(const T* row, int first, int length, bool aligned,
                                           float missing = 0.0f) {
  if (aligned && first < length) return load_streaming(row + first);
  float x[kVec<T>];
#pragma unroll
  for (int i = 0; i < kVec<T>; ++i) x[i] = first + i < length ? to_float(row[first + i]) : missing;
  return pack<T>(x);
}

template <typename T>
__device__ __forceinline__ void store_row(T* row, int first, int length, bool aligned,
                                          const float (&x)[kVec<T>]) {
  if (aligned) {
    if (first < length) store(row + first, pack<T>(x));
    return;
  }
#pragma unroll
  for (int i = 0; i < kVec<T>; ++i) {
    if (first + i < length) row[first + i] = from_float<T>(x[i]);
  }
}

}  // namespace tgi
