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

// Merges the maximum of `right` into `maximum`.
__device__ __forceinline__ MergeFactors merge_maximum(float& maximum, float right) {
  const float both = fmaxf(maximum, right);
  const float reference = finite_max(both);
  const MergeFactors by{exp2_fast(maximum - reference), exp2_fast(right - reference)};
  maximum = both;
  return by;
}

// Merges a sum or a weighted value.
__device__ __forceinline__ float merge_value(float left, float right, MergeFactors by) {
  return __fmaf_rn(left, by.left, __fmul_rn(right, by.right));
}

// What weighted values are multiplied by at the end. `sink` is a further score with no value, or −inf. No
// keys: 0.
__device__ __forceinline__ float normalizer(float maximum, float sum, float sink) {
  const float reference = finite_max(fmaxf(maximum, sink));
  const float scale = exp2_fast(maximum - reference);
  const float total = sum * scale + exp2_fast(sink - reference);
  return total == 0.f ? 0.f : __fdividef(scale, total);
}

// The score of a product of a query and a key. `gain` is scale·log2(e) without a cap; with one,
// softcap·log2(e), it is 2·log2(e)·scale/softcap, as tanh is made of exp2.
__device__ __forceinline__ float score_of(float product, float gain, float cap) {
  const float scaled = product * gain;
  return cap == 0.f ? scaled : cap * (1.f - __fdividef(2.f, exp2_fast(scaled) + 1.f));
}

}  // namespace tgi
