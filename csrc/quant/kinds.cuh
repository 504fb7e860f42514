// Weights of every kind as 16-bit operands of the tensor cores, whatever the number of their bits.
//
// A block is 128 columns of a strip of 64 rows. A lane holds 64 codes of it, two in each of 32 slots: slot 4s
// + i is register i of the operand fragment of k16 step s (mma.cuh; m16n8k16, and m64nNk16 by warps). Its
// words are 2 · bits, in 16-byte loads and a last one of 8 where their number is no multiple of four:
//
//   [load][quarter of the strip][lane][16 bytes] … [quarter][lane][8 bytes]
//
// Integers and e4m3: the two codes of a slot lie at the same place of a word's halves, 16 / bits slots a
// word, in order. What is left at the top of the halves holds the last slots:
//   3 and 5 bits  slots 30 and 31, a bit of each of `bits` words, the lowest first
//   6 bits        slots 24 + 2u and 25 + 2u in words 3u … 3u + 2: four bits of the first (the third), and
//   above them
//                 the lower (upper) two of the second
// Codes of a table: byte i of word s is slot 4s + i, the first code in its low bits; it looks up both at
// once.
#pragma once

#include "quant/layout.cuh"

namespace tgi {

enum class Codes : int { i2 = 2, i3 = 3, i4 = 4, i5 = 5, i6 = 6, i8 = 8, table = 16, e4m3 = 17 };

constexpr int kBlock = 128;  // columns
constexpr int kTableBytes =
    256 * 128;  // of shared memory: of each pair of codes a word a lane, so banks are its own

template <Codes kCodes>
constexpr int kBitsOf = kCodes == Codes::table  ? 4
                        : kCodes == Codes::e4m3 ? 8
                                                : static_cast<int>(kCodes);

// A slot's two codes at bit 0 of the halves, over the bits of `rest`.
template <int kBits>
__device__ __forceinline__ uint32_t fields(const uint32_t* words, int slot, uint32_t rest) {
  constexpr int kFields = 16 / kBits, kWhole = 2 * kBits * kFields;
  constexpr uint32_t kMask = ((1u << kBits) - 1) * 0x00010001u;
  if (slot < kWhole) return merged(words[slot / kFields] >> (kBits * (slot % kFields)), kMask, rest);
  if constexpr (kBits == 6) {
    const uint32_t* three = words + (slot - kWhole) / 2 * 3;
    const int odd = slot % 2;
    rest = merged(three[2 * odd] >> 12, 0x000f000fu, rest);
    return merged(three[1] >> (8 + 2 * odd), 0x00300030u, rest);
  } else {
#pragma unroll
    for (int bit = 0; bit < kBits; ++bit) {
      rest = merged(words[(slot - kWhole) * kBits + bit] >> (15 - bit), 0x00010001u << bit, rest);
    }
    return rest;
  }
}

// Operands of one lane: whole numbers code − zero, or numbers of a table, rounded to T.
template <typename T, Codes kCodes>
struct Operands {
  using Two = typename TwoOf<T>::type;
  static constexpr bool kHasZero = true;
  // Exponents at which a unit is the lowest bit of the significand: 1024 in fp16, 128 in bf16.
  static constexpr uint32_t kMagic = __is_same(T, __half) ? 0x64006400u : 0x43004300u;
  Two zero[2];  // of rows g and g + 8

  __device__ __forceinline__ void set_zero(int h, uint32_t whole) {
    zero[h] = as<Two>(__byte_perm(whole, whole, 0x1010) + kMagic);
  }
  __device__ __forceinline__ void widen(uint32_t (&to)[4], const uint32_t* words, int step) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t codes = fields<kBitsOf<kCodes>>(words, 4 * step + i, kMagic);
      to[i] = as<uint32_t>(__hsub2(as<Two>(codes), zero[i & 1]));
    }
  }
};

// A bf16 significand has no eight bits below its first: by way of fp32.
template <>
struct Operands<__nv_bfloat16, Codes::i8> {
  static constexpr bool kHasZero = true;
  float zero[2];

  __device__ __forceinline__ void set_zero(int h, uint32_t whole) {
    zero[h] = 8388608.0f + static_cast<float>(whole);
  }
  __device__ __forceinline__ void widen(uint32_t (&to)[4], const uint32_t* words, int step) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float w[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {  // 2²³ + code: the code is the significand's lowest byte
        w[e] = __uint_as_float(__byte_perm(words[2 * step + i / 2], 0x4b000000u, 0x7440 + i % 2 + 2 * e)) -
               zero[i & 1];
      }
      to[i] = pack<__nv_bfloat16>(w[0], w[1]);
    }
  }
};

template <typename T>
struct Operands<T, Codes::table> {
  static constexpr bool kHasZero = false;
  uint32_t table;  // shared address of this lane's words

  __device__ __forceinline__ void widen(uint32_t (&to)[4], const uint32_t* words, int step) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t codes = __byte_perm(words[step], 0, 0x4440 + i);
      asm volatile("ld.shared.b32 %0, [%1];" : "=r"(to[i]) : "r"(table + codes * 128));
    }
  }
};

template <typename T>
struct Operands<T, Codes::e4m3> {
  using Two = typename TwoOf<T>::type;
  static constexpr bool kHasZero = false;

  __device__ __forceinline__ void widen(uint32_t (&to)[4], const uint32_t* words, int step) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t word = words[2 * step + i / 2];
      if constexpr (__is_same(T, __half)) {
        const auto two = static_cast<uint16_t>(__byte_perm(word, 0, i % 2 == 0 ? 0x4420 : 0x4431));
        asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(to[i]) : "h"(two));
      } else {
        // Sign and fields in the places of bf16, whose exponent's bias is 120 more; subnormal numbers are,
        // too.
        const uint32_t number = i % 2 == 0 ? word << 4 : word >> 4, sign = i % 2 == 0 ? word << 8 : word;
        const uint32_t bits = merged(sign, 0x80008000u, number & 0x07f007f0u);
        to[i] = as<uint32_t>(__hmul2(as<Two>(bits), as<Two>(0x7b807b80u)));
      }
    }
  }
};

// Fills the table of pairs in shared memory, a word a lane. numbers: of each code, in T's bits.
__device__ __forceinline__ void fill_table(uint32_t to, const uint16_t (&numbers)[16]) {
  for (int i = threadIdx.x; i < kTableBytes / 16; i += blockDim.x) {
    const int codes = i / 8;
    const uint32_t both = numbers[codes % 16] | static_cast<uint32_t>(numbers[codes / 16]) << 16;
    asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(to + i * 16), "r"(both) : "memory");
  }
}

}  // namespace tgi
