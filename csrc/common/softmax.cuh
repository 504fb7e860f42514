// The online softmax: parts of a row's keys give (maximum, sum, weighted values), and parts add up.
// Milakov & Gimelshein 2018, arXiv:1805.02867.
//
// Scores are in units of log2. Products and sums here round as written: kernels that must agree to the bit
// call the same functions, and no compiler joins their operations anew.
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
  const MergeFactors by{exp2_fast(__fsub_rn(maximum, reference)), exp2_fast(__fsub_rn(right, reference))};
  maximum = both;
  return by;
}

// Merges a sum or a weighted value.
__device__ __forceinline__ float merge_value(float left, float right, MergeFactors by) {
  return __fmaf_rn(left, by.left, __fmul_rn(right, by.right));
}

// What a score becomes: `gain` times a product, or a score itself where `gain` is 1; relative to its part's
// maximum, made finite.
__device__ __forceinline__ float weight_of(float score, float gain, float reference) {
  return exp2_fast(__fmaf_rn(score, gain, -reference));
}

// The sum of a row's weights in a tile. Of each eight keys, lane t of four has the keys 2t and 2t + 1: `even`
// and `odd` are its sums of those, in order.
__device__ __forceinline__ float sum_of_row(float even, float odd) {
  float sum = even + odd;
  sum += __shfl_xor_sync(~0u, sum, 1);
  return sum + __shfl_xor_sync(~0u, sum, 2);
}

// What weighted values are multiplied by at the end. `sink` is a further score with no value, or −inf. No
// keys: 0.
__device__ __forceinline__ float normalizer(float maximum, float sum, float sink) {
  const float reference = finite_max(fmaxf(maximum, sink));
  const float scale = exp2_fast(__fsub_rn(maximum, reference));
  const float total = __fmaf_rn(sum, scale, exp2_fast(__fsub_rn(sink, reference)));
  return total == 0.f ? 0.f : __fdividef(scale, total);
}

// The score of a product of a query and a key. `gain` is scale·log2(e) without a cap; with one,
// softcap·log2(e), it is 2·log2(e)·scale/softcap, as tanh is made of exp2.
__device__ __forceinline__ float score_of(float product, float gain, float cap) {
  const float scaled = __fmul_rn(product, gain);
  if (cap == 0.f) return scaled;
  return __fmul_rn(cap, __fsub_rn(1.f, __fdividef(2.f, __fadd_rn(exp2_fast(scaled), 1.f))));
}

// With a bias of `slope`, 0 for none, times the distance to the key, which is negative.
__device__ __forceinline__ float with_bias(float score, float slope, int distance) {
  return __fmaf_rn(slope, static_cast<float>(distance), score);
}

}  // namespace tgi
