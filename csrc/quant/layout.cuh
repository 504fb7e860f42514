// How weights of 4 and 8 bits lie in memory, and how a lane makes 16-bit operands of them.
//
// A strip is 64 rows, a piece 64 columns of it. Within a piece a lane's words are those of its own operand
// fragments of m64nNk16 (for one warp: of m16n8k16), so one 16-byte load feeds four k16 steps of 4 bits or
// two of
// 8. With g = lane / 4 and t = lane % 4, register 2c + h of a fragment holds row 16 · warp + g + 8h, columns
// 8c + 2t and the next.
//   4 bits: a step is one word; register i takes bits 4i … and 16 + 4i …
//   8 bits: a step is two words; register i takes the bytes 2i and 2i + 1 of the eight
//   pairs:  for each group of columns and row a word, the scale in its low half; in its high half the zero
//   point:
//           4 bits as magic + zero in the operand's type, 8 bits as an integer
//
// Dequantising rounds once: code − zero is exact, and its product with the scale is the only rounding. Where
// the scale has 11 bits (fp16) and the operand 8 (bf16), the scale is split into two bf16 numbers: the
// product with the small one is exact, and the fma with the large one rounds the sum.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "common/mma.cuh"
#include "common/vec.cuh"

namespace tgi {

constexpr int kStrip = 64, kPiece = 64;
constexpr int kPairsBytes = kStrip * 4;  // of one group

template <int kBits>
constexpr int kPieceBytes = kStrip * kPiece * kBits / 8;

template <typename T>
struct TwoOf;
template <>
struct TwoOf<__half> {
  using type = __half2;
};
template <>
struct TwoOf<__nv_bfloat16> {
  using type = __nv_bfloat162;
};

template <typename To, typename From>
__device__ __forceinline__ To as(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  return *reinterpret_cast<const To*>(&from);
}

// (bits & mask) | rest, in one instruction: the compiler would take two where both are constants.
__device__ __forceinline__ uint32_t merged(uint32_t bits, uint32_t mask, uint32_t rest) {
  uint32_t to;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(to) : "r"(bits), "r"(mask), "r"(rest));
  return to;
}

template <typename S>
__device__ __forceinline__ float scale_of(uint32_t pair) {
  return to_float(as<S>(static_cast<uint16_t>(pair)));
}

// Makes the fragments of one lane: T is the operand's type, S that of the stored scale.
template <typename T, typename S, int kBits>
struct Widener;

template <typename T, typename S>
struct Widener<T, S, 4> {
  using Two = typename TwoOf<T>::type;
  static constexpr bool kSplit = !__is_same(T, S);
  static constexpr int kWords = 1;  // of a step
  // Exponents at which a unit is the lowest bit of the significand: 1024 in fp16, 128 in bf16.
  static constexpr uint32_t kMagic = __is_same(T, __half) ? 0x64006400u : 0x43004300u;
  Two zero[2], scale[2], rest[2];  // of rows g and g + 8

  __device__ __forceinline__ void load(int h, uint32_t pair) {
    zero[h] = as<Two>(__byte_perm(pair, pair, 0x3232));
    if constexpr (kSplit) {
      static_assert(__is_same(T, __nv_bfloat16));
      const float whole = scale_of<S>(pair);
      scale[h] = __float2bfloat162_rn(whole);
      rest[h] = __float2bfloat162_rn(whole - __low2float(scale[h]));
    } else {
      scale[h] = as<Two>(__byte_perm(pair, pair, 0x1010));
    }
  }

  __device__ __forceinline__ void widen(uint32_t (&to)[4], const uint32_t* word) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t code = merged(*word >> (4 * i), 0x000f000fu, kMagic);
      const Two exact = __hsub2(as<Two>(code), zero[i & 1]);
      if constexpr (kSplit) {
        to[i] = as<uint32_t>(__hfma2(exact, scale[i & 1], __hmul2(exact, rest[i & 1])));
      } else {
        to[i] = as<uint32_t>(__hmul2(exact, scale[i & 1]));
      }
    }
  }
};

template <typename T, typename S>
struct Widener<T, S, 8> {
  static constexpr int kWords = 2;
  float zero[2], scale[2];

  __device__ __forceinline__ void load(int h, uint32_t pair) {
    zero[h] = 8388608.0f + static_cast<float>(pair >> 16);
    scale[h] = scale_of<S>(pair);
  }

  __device__ __forceinline__ void widen(uint32_t (&to)[4], const uint32_t* words) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float w[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        // 2²³ + code: the code is the significand's lowest byte.
        const uint32_t code = __byte_perm(words[i / 2], 0x4b000000u, 0x7440 + i % 2 * 2 + e);
        w[e] = (__uint_as_float(code) - zero[i & 1]) * scale[i & 1];
      }
      to[i] = pack<T>(w[0], w[1]);
    }
  }
};

// Calls f.template operator()<T, S>() with the types of operand and scale; those that are kept apart are
// compiled.
template <typename F>
cudaError_t by_operand_and_scale(DType dtype, DType scale, F&& f) {
  if (dtype == DType::f16 && scale == DType::f16) return f.template operator()<__half, __half>();
  if (dtype == DType::bf16 && scale == DType::f16) return f.template operator()<__nv_bfloat16, __half>();
  if (dtype == DType::bf16 && scale == DType::bf16)
    return f.template operator()<__nv_bfloat16, __nv_bfloat16>();
  return cudaErrorInvalidValue;
}

}  // namespace tgi
