// Argmax and log-softmax's normaliser of part of a row, in one read; shared by the kernels of both generations.
#pragma once

#include <climits>

#include "common/reduce.cuh"
#include "common/vec.cuh"
#include "sampling/cuda.h"

namespace tgi {

// What is known of some logits: the largest, where it first occurs, and Σ exp(x − largest), NaN if any x is.
struct Best {
  float logit = -INFINITY;
  int id = INT_MAX;
  float mass = 0.0f;
};

// exp(x − largest), where a largest of −∞ stands for no logits at all.
__device__ __forceinline__ float weight_below(float x, float largest) {
  return __expf(x - (largest == -INFINITY ? 0.0f : largest));
}

__device__ __forceinline__ Best merge(const Best& a, const Best& b) {
  Best both;
  both.logit = fmaxf(a.logit, b.logit);
  both.id = a.logit == b.logit ? min(a.id, b.id) : a.logit > b.logit ? a.id : b.id;
  both.mass = a.mass * weight_below(a.logit, both.logit) + b.mass * weight_below(b.logit, both.logit);
  return both;
}

// One vector of a row, −∞ where it ends.
template <typename T>
__device__ __forceinline__ Vec<T> load_logits(const T* row, int first, int end, bool aligned) {
  if (aligned && first < end) return load_streaming(row + first);
  Vec<T> vec;
#pragma unroll
  for (int i = 0; i < kVec<T>; ++i) vec.at[i] = first + i < end ? row[first + i] : from_float<T>(-INFINITY);
  return vec;
}

// This thread's share of the elements [begin, end): vectors a CTA's width apart, all loads of a round before their use.
template <typename T, int kThreads>
__device__ __forceinline__ Best scan(const T* row, int begin, int end, bool aligned) {
  constexpr int kElements = 32, kRound = kElements / kVec<T>;
  Best best;
  for (int base = begin + static_cast<int>(threadIdx.x) * kVec<T>; base < end; base += kThreads * kElements) {
    Vec<T> round[kRound];
#pragma unroll
    for (int i = 0; i < kRound; ++i) round[i] = load_logits(row, base + i * kThreads * kVec<T>, end, aligned);
    float largest = best.logit;
    int at = -1;
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      const float x = to_float(round[i / kVec<T>].at[i % kVec<T>]);
      if (x > largest) largest = x, at = i;
    }
    if (at >= 0) best.id = base + at / kVec<T> * kThreads * kVec<T> + at % kVec<T>;
    best.mass *= weight_below(best.logit, largest);
    best.logit = largest;
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      best.mass += weight_below(to_float(round[i / kVec<T>].at[i % kVec<T>]), largest);
    }
  }
  return best;
}

// The CTA's best, in thread 0. shared: one Best a warp.
__device__ __forceinline__ Best block_best(Best best, Best* shared) {
  const auto warp_best = [](Best mine) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
      Best other;
      other.logit = __shfl_xor_sync(kFullWarp, mine.logit, offset);
      other.id = __shfl_xor_sync(kFullWarp, mine.id, offset);
      other.mass = __shfl_xor_sync(kFullWarp, mine.mass, offset);
      mine = merge(mine, other);
    }
    return mine;
  };
  best = warp_best(best);
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = best;
  __syncthreads();
  if (threadIdx.x >= 32) return best;
  return warp_best(threadIdx.x < blockDim.x / 32 ? shared[threadIdx.x] : Best{});
}

__device__ __forceinline__ void store_best(const GreedyParams& p, int64_t row, const Best& best) {
  p.ids[row] = best.id == INT_MAX ? 0 : best.id;
  p.logprobs[row] = best.id == INT_MAX ? NAN : -logf(best.mass);
}

}  // namespace tgi
