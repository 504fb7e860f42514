// One vector type for every instruction set: kLanes floats, loads that widen bfloat16, fused multiply-add,
// exp. Compiled into the namespace TGI_ISA. A sum's order depends on kLanes, so results differ between sets,
// never within one.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace tgi::TGI_ISA {

#if defined(TGI_ISA_IS_avx512)
constexpr int kLanes = 16;
#elif defined(TGI_ISA_IS_avx2)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

using Vec [[gnu::vector_size(4 * kLanes)]] = float;
using Quad [[gnu::vector_size(16)]] = float;
using VecInt [[gnu::vector_size(4 * kLanes)]] = int32_t;
using VecUint [[gnu::vector_size(4 * kLanes)]] = uint32_t;
using VecHalf [[gnu::vector_size(2 * kLanes)]] = uint16_t;

struct bfloat16 {
  uint16_t bits;
};

#define TGI_INLINE [[gnu::always_inline]] static inline
#define TGI_MEMBER [[gnu::always_inline]] inline

TGI_INLINE Vec splat(float x) { return x - Vec{}; }  // −0 − 0 stays −0

TGI_INLINE Vec load(const float* from) {
  Vec to;
  std::memcpy(&to, from, sizeof(to));
  return to;
}

// A bfloat16 is the upper half of the float of the same value.
TGI_INLINE Vec load(const bfloat16* from) {
#if defined(TGI_ISA_IS_avx512)
  return reinterpret_cast<Vec>(_mm512_slli_epi32(
      _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))), 16));
#elif defined(TGI_ISA_IS_avx2)
  return reinterpret_cast<Vec>(
      _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))), 16));
#else
  VecHalf half;
  std::memcpy(&half, from, sizeof(half));
  return reinterpret_cast<Vec>(__builtin_convertvector(half, VecUint) << 16);
#endif
}

TGI_INLINE float to_float(float x) { return x; }
TGI_INLINE float to_float(bfloat16 x) {
  return __builtin_bit_cast(float, static_cast<uint32_t>(x.bits) << 16);
}

TGI_INLINE void store(float* to, Vec from) { std::memcpy(to, &from, sizeof(from)); }

// a·b + c, rounded once where the set has the instruction.
TGI_INLINE Vec fma(Vec a, Vec b, Vec c) {
#if defined(TGI_ISA_IS_avx512)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(TGI_ISA_IS_avx2)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

TGI_INLINE Vec select(VecInt mask, Vec yes, Vec no) { return mask ? yes : no; }
TGI_INLINE Vec max(Vec a, Vec b) { return a > b ? a : b; }

// Folds the upper half onto the lower with `op` until one lane is left.
template <typename Op>
TGI_INLINE float fold(Vec x, Op&& op) {
#if defined(TGI_ISA_IS_avx512)
  const auto eight = op(__builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7),
                        __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15));
#else
  const Vec eight = x;
#endif
#if defined(TGI_ISA_IS_avx512) || defined(TGI_ISA_IS_avx2)
  const Quad four = op(__builtin_shufflevector(eight, eight, 0, 1, 2, 3),
                       __builtin_shufflevector(eight, eight, 4, 5, 6, 7));
#else
  const Quad four = eight;
#endif
  const Quad two = op(four, __builtin_shufflevector(four, four, 2, 3, 2, 3));
  const Quad one = op(two, __builtin_shufflevector(two, two, 1, 1, 1, 1));
  return one[0];
}

TGI_INLINE float sum(Vec x) {
  return fold(x, [](auto a, auto b) { return a + b; });
}

TGI_INLINE float largest(Vec x) {
  return fold(x, [](auto a, auto b) { return a > b ? a : b; });
}

// First `count` < kLanes elements; the rest is zero.
TGI_INLINE Vec load_first(const float* from, int64_t count) {
  float lanes[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) lanes[i] = from[i];
  return load(lanes);
}

TGI_INLINE void store_first(float* to, Vec from, int64_t count) {
  float lanes[kLanes];
  store(lanes, from);
  for (int64_t i = 0; i < count; ++i) to[i] = lanes[i];
}

// e^x within 2 ulp: x = n·ln 2 + r, |r| ≤ ln 2 / 2, a degree-7 polynomial for e^r, and n into the exponent.
// exp(−∞) is 0 and exp(0) is exactly 1. Results under 1.2e-38 become 0, those over the largest float +∞; NaN
// stays NaN.
TGI_INLINE Vec exp(Vec x) {
  constexpr float kRound = 12582912.0f;  // 1.5·2^23: adding it rounds to an integer
  const Vec clamped = max(splat(-104.0f), x > 89.0f ? splat(89.0f) : x);
  const Vec n = (clamped * 1.44269504088896341f + kRound) - kRound;
  // ln 2 in two parts; the first has few enough bits that n times it is exact.
  Vec r = fma(n, splat(-0.693359375f), clamped);
  r = fma(n, splat(2.12194440e-4f), r);
  Vec p = splat(1.0f / 5040);
  p = fma(p, r, splat(1.0f / 720));
  p = fma(p, r, splat(1.0f / 120));
  p = fma(p, r, splat(1.0f / 24));
  p = fma(p, r, splat(1.0f / 6));
  p = fma(p, r, splat(0.5f));
  p = fma(p, r, splat(1.0f));
  p = fma(p, r, splat(1.0f));
  // 2^n as two factors, since 2^128 is no float.
  const VecInt whole = __builtin_convertvector(n, VecInt);
  const VecInt half = whole >> 1;
  const Vec scaled =
      p * reinterpret_cast<Vec>((half + 127) << 23) * reinterpret_cast<Vec>((whole - half + 127) << 23);
  const Vec finite = x < -87.3f ? splat(0.0f) : scaled;
  return x == x ? finite : x;
}

}  // namespace tgi::TGI_ISA
