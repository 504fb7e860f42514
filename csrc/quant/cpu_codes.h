// Codes of 2 to 9 bits to fp32 weights, a vector of output features at a time.
#pragma once

#include "common/vec.h"
#include "quant/cpu_params.h"

namespace tgi::TGI_ISA {

constexpr int kPanelVecs = kPanel / kLanes;

TGI_INLINE VecUint load_words(const int32_t* from) {
  VecUint to;
  std::memcpy(&to, from, sizeof(to));
  return to;
}

TGI_INLINE Vec as_float(VecUint bits) { return reinterpret_cast<Vec>(bits); }

// value · scale + offset, rounded once. Where the set has no such instruction it takes doubles: a product of
// two floats is exact in them.
TGI_INLINE Vec scaled(Vec value, Vec scale, Vec offset) {
#if defined(TGI_ISA_IS_avx512) || defined(TGI_ISA_IS_avx2)
  return fma(value, scale, offset);
#else
  using Wide [[gnu::vector_size(8 * kLanes)]] = double;
  return __builtin_convertvector(__builtin_convertvector(value, Wide) * __builtin_convertvector(scale, Wide) +
                                     __builtin_convertvector(offset, Wide),
                                 Vec);
#endif
}

// ---- values of codes; above a code's bits lie those of others ----

template <int kWidth>
struct IntegerCodes {
  static constexpr int kBits = kWidth;
  static constexpr uint32_t kMask = (1u << kBits) - 1;
  explicit IntegerCodes(const QuantWeight&) {}
  TGI_MEMBER Vec value(VecUint code) const { return converted(code & kMask); }

  // 2^kBits times the value of the code above the lowest.
  TGI_MEMBER Vec next_value(VecUint code) const { return converted(code & (kMask << kBits)); }

 private:
  // Numbers below 2³¹, so that the signed conversion, which every set has, serves.
  TGI_MEMBER static Vec converted(VecUint number) {
    return __builtin_convertvector(reinterpret_cast<VecInt>(number), Vec);
  }
};

struct TableCodes {
  static constexpr int kBits = 4;
#if defined(TGI_ISA_IS_avx512)
  __m512 table;
  explicit TableCodes(const QuantWeight& weight) : table(_mm512_loadu_ps(weight.table)) {}
  TGI_MEMBER Vec value(VecUint code) const {
    return _mm512_permutexvar_ps(reinterpret_cast<__m512i>(code), table);
  }
#elif defined(TGI_ISA_IS_avx2)
  __m256 low, high;
  explicit TableCodes(const QuantWeight& weight)
      : low(_mm256_loadu_ps(weight.table)), high(_mm256_loadu_ps(weight.table + 8)) {}
  TGI_MEMBER Vec value(VecUint code) const {
    const auto index = reinterpret_cast<__m256i>(code);
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, index), _mm256_permutevar8x32_ps(high, index),
                            reinterpret_cast<__m256>(code << 28));
  }
#else
  const float* table;
  explicit TableCodes(const QuantWeight& weight) : table(weight.table) {}
  TGI_MEMBER Vec value(VecUint code) const {
    Vec to;
    for (int i = 0; i < kLanes; ++i) to[i] = table[code[i] & 15];
    return to;
  }
#endif
};

// Sign, 4 bits of exponent, 3 of significand: put into those of a float, and the exponents' biases, 7 and
// 127, made one by a product, which also makes normal numbers of subnormal ones. There is no NaN among the
// codes.
struct Float8Codes {
  static constexpr int kBits = 8;
  explicit Float8Codes(const QuantWeight&) {}
  TGI_MEMBER Vec value(VecUint code) const {
    const VecInt spread = reinterpret_cast<VecInt>(code << 24) >> 4;
    return as_float(reinterpret_cast<VecUint>(spread) & 0x87f00000u) * 0x1p120f;
  }
};

// ---- codes of a run ----

// Calls body.operator()<i>() for i in kFirst … kLast − 1, unrolled.
template <int kFirst, int kLast, typename Body>
TGI_INLINE void unrolled(Body&& body) {
  if constexpr (kFirst < kLast) {
    body.template operator()<kFirst>();
    unrolled<kFirst + 1, kLast>(body);
  }
}

// Code kIndex of a run in the lowest bits. words: the run's, of this vector's features.
template <int kBits, int kIndex>
TGI_INLINE VecUint code_at(const int32_t* words) {
  constexpr int kWord = kIndex * kBits / 32, kShift = kIndex * kBits % 32;
  const VecUint low = load_words(words + kWord * kPanel) >> kShift;
  if constexpr (kShift + kBits <= 32) {
    return low;
  } else {
    return low | load_words(words + (kWord + 1) * kPanel) << (32 - kShift);
  }
}

// ---- scales and offsets ----

TGI_INLINE Vec load_half(const uint16_t* from) {
#if defined(TGI_ISA_IS_avx512)
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif defined(TGI_ISA_IS_avx2)
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#else
  VecHalf half;
  std::memcpy(&half, from, sizeof(half));
  const VecUint wide = __builtin_convertvector(half, VecUint);
  // As for e4m3: finite numbers only, which scales are.
  return as_float((wide & 0x7fffu) << 13 | (wide & 0x8000u) << 16) * 0x1p112f;
#endif
}

TGI_INLINE Vec load_float(const float* from) { return load(from); }
TGI_INLINE Vec load_bfloat16(const bfloat16* from) { return load(from); }

template <typename T, Vec (*kLoad)(const T*)>
TGI_INLINE void load_panel(const void* from, int64_t index, Vec (&to)[kPanelVecs]) {
  for (int v = 0; v < kPanelVecs; ++v) to[v] = kLoad(static_cast<const T*>(from) + index + v * kLanes);
}

// One group's numbers for the features of a panel.
TGI_INLINE void load_panel(const Numbers& numbers, int64_t index, Vec (&to)[kPanelVecs]) {
  switch (numbers.type) {
    case NumberType::f16:
      return load_panel<uint16_t, load_half>(numbers.data, index, to);
    case NumberType::bf16:
      return load_panel<bfloat16, load_bfloat16>(numbers.data, index, to);
    default:
      return load_panel<float, load_float>(numbers.data, index, to);
  }
}

// Scales and offsets of one group's 32 features.
struct GroupScales {
  Vec scale[kPanelVecs], offset[kPanelVecs], next_scale[kPanelVecs];  // the last is scale / 2^bits

  // index: of the group's first number.
  TGI_MEMBER void read(const QuantWeight& weight, int64_t index) {
    load_panel(weight.scales, index, scale);
    const float down = 1.0f / static_cast<float>(1 << weight.bits);
    for (int v = 0; v < kPanelVecs; ++v) next_scale[v] = scale[v] * down;
    if (weight.shifts.data == nullptr) {
      for (int v = 0; v < kPanelVecs; ++v) offset[v] = scale[v] * -weight.zero;
      if (weight.zero == 0) {
        for (Vec& each : offset) each = splat(-0.0f);  // which changes no product
      }
    } else {
      load_panel(weight.shifts, index, offset);
      if (weight.has_zeros) {
        for (int v = 0; v < kPanelVecs; ++v) offset[v] = -offset[v] * scale[v];
      }
    }
  }
};

}  // namespace tgi::TGI_ISA
