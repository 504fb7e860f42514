// Tensor core products of 16-bit operands, m16n8k16, and the loads and conversions that feed them (sm_80 and
// later).
//
// Fragments as PTX names them, with g = lane / 4 and t = lane % 4:
//   A [16 rows, 16 k]  a0: (g; 2t, 2t+1)  a1: (g+8; 2t, 2t+1)  a2: (g; 2t+8, 2t+9)  a3: (g+8; 2t+8, 2t+9)
//   B [16 k, 8 cols]   b0: (2t, 2t+1; g)  b1: (2t+8, 2t+9; g)
//   D [16 rows, 8 cols] d0, d1: (g; 2t, 2t+1)  d2, d3: (g+8; 2t, 2t+1)
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace tgi {

// An fp8 number with 4 exponent and 3 mantissa bits, as torch.float8_e4m3fn stores it.
struct E4M3 {
  uint8_t bits;
};

// The type in which elements of T are multiplied: fp16 holds every e4m3 number exactly, and Hopper converts
// in one step.
template <typename T>
struct OperandOf {
  using type = T;
};
template <>
struct OperandOf<E4M3> {
  using type = __half;
};
template <typename T>
using Operand = typename OperandOf<T>::type;

// d += a · b
template <typename T>
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (sizeof(T) == 2 && __is_same(T, __half)) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    static_assert(__is_same(T, __nv_bfloat16));
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// Four 8×8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

__device__ __forceinline__ void load_matrices_transposed(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

__device__ __forceinline__ void load_matrices_transposed(uint32_t (&r)[2], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(address)
               : "memory");
}

// Two floats, rounded, the first in the low half.
template <typename T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  if constexpr (__is_same(T, __half)) {
    const __half2 both = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&both);
  } else {
    const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&both);
  }
}

template <typename T>
__device__ __forceinline__ float2 unpack(uint32_t both) {
  if constexpr (__is_same(T, __half)) {
    return __half22float2(*reinterpret_cast<const __half2*>(&both));
  } else {
    return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&both));
  }
}

// Four e4m3 numbers as two pairs of fp16: exact.
__device__ __forceinline__ void widen(uint32_t four, uint32_t& low, uint32_t& high) {
#if __CUDA_ARCH__ >= 890
  asm("{\n"
      ".reg .b16 l, h;\n"
      "mov.b32 {l, h}, %2;\n"
      "cvt.rn.f16x2.e4m3x2 %0, l;\n"
      "cvt.rn.f16x2.e4m3x2 %1, h;\n"
      "}"
      : "=r"(low), "=r"(high)
      : "r"(four));
#else
  // The exponent's bias goes from 7 to 15: shift the fields into place, then multiply by 2^8.
  const __half2 bias = __halves2half2(__ushort_as_half(0x5c00), __ushort_as_half(0x5c00));
  const auto shifted = [&](uint32_t bytes) {
    const uint32_t bits = (bytes & 0x80008000u) | ((bytes & 0x7f007f00u) >> 1);
    const __half2 scaled = __hmul2(*reinterpret_cast<const __half2*>(&bits), bias);
    return *reinterpret_cast<const uint32_t*>(&scaled);
  };
  low = shifted(__byte_perm(four, 0, 0x1404));
  high = shifted(__byte_perm(four, 0, 0x3424));
#endif
}

}  // namespace tgi
