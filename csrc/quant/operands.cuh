// How codes become operands of tensor core products: whole numbers code − zero, whose sums are scaled in
// fp32.
#pragma once

#include "quant/layout.cuh"

namespace tgi {

// Whole numbers code − zero as operands of T, exactly.
template <typename T, int kBits>
struct Exact;

template <typename T>
struct Exact<T, 4> {
  using Two = typename TwoOf<T>::type;
  static constexpr uint32_t kMagic = __is_same(T, __half) ? 0x64006400u : 0x43004300u;
  Two zero[2];  // of rows g and g + 8

  __device__ __forceinline__ void load(int h, uint32_t pair) {
    zero[h] = as<Two>(__byte_perm(pair, pair, 0x3232));
  }
  __device__ __forceinline__ void widen(uint32_t (&to)[4], const uint32_t* word) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      to[i] = as<uint32_t>(__hsub2(as<Two>(merged(*word >> (4 * i), 0x000f000fu, kMagic)), zero[i & 1]));
    }
  }
};

template <>
struct Exact<__half, 8> {
  __half2 zero[2];

  __device__ __forceinline__ void load(int h, uint32_t pair) {
    zero[h] = __half2half2(__float2half_rn(1024.0f + static_cast<float>(pair >> 16)));
  }
  __device__ __forceinline__ void widen(uint32_t (&to)[4], const uint32_t* words) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // 1024 + code: the code is the significand's lowest byte
      const uint32_t codes = __byte_perm(words[i / 2], 0x64646464u, i % 2 == 0 ? 0x4140 : 0x4342);
      to[i] = as<uint32_t>(__hsub2(as<__half2>(codes), zero[i & 1]));
    }
  }
};

template <>
struct Exact<__nv_bfloat16, 8> {
  float zero[2];

  __device__ __forceinline__ void load(int h, uint32_t pair) {
    zero[h] = 8388608.0f + static_cast<float>(pair >> 16);
  }
  __device__ __forceinline__ void widen(uint32_t (&to)[4], const uint32_t* words) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float w[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {  // 2²³ + code
        const uint32_t code = __byte_perm(words[i / 2], 0x4b000000u, 0x7440 + i % 2 * 2 + e);
        w[e] = __uint_as_float(code) - zero[i & 1];
      }
      to[i] = pack<__nv_bfloat16>(w[0], w[1]);
    }
  }
};

}  // namespace tgi
