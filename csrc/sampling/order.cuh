// The order of tokens and their weights, in whole numbers: the same on every machine and in every order of
// addition.
#pragma once

#include <cstdint>

namespace tgi {

// Score and token in one number: larger for larger scores, and for lower ids among equal ones.
__device__ __forceinline__ uint32_t ordered_bits(float score) {
  const uint32_t bits = __float_as_uint(score + 0.0f);  // −0 + 0 is +0
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ uint64_t key_of(float score, uint32_t token) {
  return static_cast<uint64_t>(ordered_bits(score)) << 32 | static_cast<uint32_t>(~token);
}

__device__ __forceinline__ uint32_t token_of(uint64_t key) { return ~static_cast<uint32_t>(key); }

__device__ __forceinline__ float score_of_bits(uint32_t ordered) {
  return __uint_as_float(ordered >> 31 ? ordered & 0x7fffffffu : ~ordered);
}

__device__ __forceinline__ float score_of(uint64_t key) {
  return score_of_bits(static_cast<uint32_t>(key >> 32));
}

// Probabilities as whole numbers, 2^30 for the likeliest token. Products and sums are rounded one by one, as
// cpu_filters.h does it.
struct Weights {
  float largest;
  float scale;  // log2(e) / temperature

  __device__ __forceinline__ uint32_t of(float score) const {
    const float scaled = __fmul_rn(__fsub_rn(score, largest), scale);
    const float y = scaled > -40.0f ? scaled : -40.0f;
    const float whole = __fsub_rn(__fadd_rn(y, 12582912.0f), 12582912.0f);  // 1.5·2^23: rounds to an integer
    const float f = __fsub_rn(y, whole);
    float p = 1.5403530e-4f;  // Taylor's terms ln(2)^n / n!
    constexpr float kTerms[] = {1.3333558e-3f, 9.6181291e-3f, 5.5504109e-2f,
                                2.4022651e-1f, 6.9314718e-1f, 1.0f};
#pragma unroll
    for (const float term : kTerms) p = __fadd_rn(__fmul_rn(p, f), term);
    const float power = __uint_as_float(static_cast<uint32_t>(static_cast<int>(whole) + 127 + 30) << 23);
    return static_cast<uint32_t>(__fadd_rn(__fmul_rn(p, power), 0.5f));
  }
};

// The least weight a set needs to hold this share of `total`; at least one unit.
__device__ __forceinline__ uint64_t share_of(uint64_t total, float share) {
  const double wanted = ceil(__dmul_rn(static_cast<double>(total), static_cast<double>(share)));
  return wanted < 1.0 ? 1 : static_cast<uint64_t>(wanted);
}

// The key of the least score that min_p lets pass: every token of that score is above it.
__device__ __forceinline__ uint64_t min_p_border(float largest, double temperature, float min_p) {
  const double least = static_cast<double>(largest) + temperature * log(static_cast<double>(min_p));
  float border = static_cast<float>(least);
  if (static_cast<double>(border) < least) border = nextafterf(border, INFINITY);
  return key_of(border, 0xffffffffu);
}

}  // namespace tgi
