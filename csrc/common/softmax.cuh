// The online softmax: parts of a row's keys give (maximum, sum, weighted values), and parts add up.
// Milakov & Gimelshein 2018, arXiv:1805.02867.
//
// Scores are in units of log2. A part's maximum is rounded up to a whole number, so that every rescaling is
// by a power of two and exact: only the additions of a merge round.
#pragma once

#include <cuda_runtime.h>

namespace tgi {

constexpr float kLog2e = 1.4426950408889634f;

__device__ __forceinline__ float negative_infinity() { return __int_as_float(0xff800000); }

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Subtracting an empty part's maximum, −inf, would make NaN of −inf − −inf.
__device__ __forceinline__ float finite_max(float maximum) {
  return maximum == negative_infinity() ? 0.f : maximum;
}

// What both sides of a merge are multiplied by.
struct MergeFactors {
  float left, right;
};

// Merges the maximum and sum of `right` into `maximum` and `sum`.
__device__ __forceinline__ MergeFactors merge_sums(float& maximum, float& sum, float right_maximum,
                                                   float right_sum) {
  const float both = fmaxf(maximum, right_maximum);
  const float reference = finite_max(both);
  const MergeFactors by{exp2_fast(maximum - reference), exp2_fast(right_maximum - reference)};
  sum = __fmaf_rn(sum, by.left, __fmul_rn(right_sum, by.right));
  maximum = both;
  return by;
}

__device__ __forceinline__ float merge_value(float left, float right, MergeFactors by) {
  return __fmaf_rn(left, by.left, __fmul_rn(right, by.right));
}

// What weighted values are multiplied by at the end. `sink` is a further score with no value, or −inf. No
// keys: 0.
__device__ __forceinline__ float normalizer(float maximum, float sum, float sink) {
  const float top = fmaxf(maximum, sink);
  const float reference = finite_max(top);
  const float scale = exp2_fast(maximum - reference);
  const float total = sum * scale + exp2_fast(sink - reference);
  return total > 0.f ? scale / total : (total == 0.f ? 0.f : total);
}

// What makes a score of a product: scale, cap, distance bias. `gain` is scale·log2(e), or
// 2·log2(e)·scale/softcap where there is a cap, as tanh is made of exp2.
struct ScoreRule {
  float gain;
  float cap;  // softcap·log2(e), or 0
};

__device__ __forceinline__ float score_of(float product, float gain, float cap) {
  const float scaled = product * gain;
  if (cap == 0.f) return scaled;
  return cap * (1.f - 2.f / (exp2_fast(scaled) + 1.f));
}

}  // namespace tgi
