// Argmax and log-softmax's normaliser of part of a row, in one read; shared by the kernels of both
// generations.
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

// `best` and a round of vectors, kThreads vectors apart, the first of which begins at element `base`.
template <typename T, int kThreads, int kRound>
__device__ __forceinline__ Best best_of_round(Best best, const Vec<T> (&round)[kRound], int base) {
  float largest = best.logit;
  int at = -1;
#pragma unroll
  for (int i = 0; i < kRound * kVec<T>; ++i) {
    const float x = element(round[i / kVec<T>], i % kVec<T>);
    if (x > largest) largest = x, at = i;
  }
  if (at >= 0) best.id = base + at / kVec<T> * kThreads * kVec<T> + at % kVec<T>;
  best.mass *= weight_below(best.logit, largest);
  best.logit = largest;
#pragma unroll
  for (int i = 0; i < kRound * kVec<T>; ++i) {
    best.mass += weight_below(element(round[i / kVec<T>], i % kVec<T>), largest);
  }
  return best;
}

// This thread's share of the elements [begin, end): vectors a CTA's width apart, all loads of a round before
// their use.
template <typename T, int kThreads>
__device__ __forceinline__ Best scan(const T* row, int begin, int end, bool aligned) {
  constexpr int kElements = 32, kRound = kElements / kVec<T>;
  Best best;
  for (int base = begin + static_cast<int>(threadIdx.x) * kVec<T>; base < end; base += kThreads * kElements) {
    Vec<T> round[kRound];
#pragma unroll
    for (int i = 0; i < kRound; ++i) {
      round[i] = load_row(row, base + i * kThreads * kVec<T>, end, aligned, -INFINITY);
    }
    best = best_of_round<T, kThreads>(best, round, base);
  }
  return best;
}

// Every lane gets the warp's best. The mass is brought to the common largest once, then summed.
__device__ __forceinline__ Best warp_best(const Best& mine) {
  Best best;
  best.logit = warp_max(mine.logit);
  best.id = __reduce_min_sync(kFullWarp, mine.logit == best.logit ? mine.id : INT_MAX);
  best.mass = warp_sum(mine.mass * weight_below(mine.logit, best.logit));
  return best;
}

// A row is read in eighths, whoever reads them: the order of its sums follows from the vocabulary alone.
inline constexpr int kSlices = 8;

template <typename T>
__device__ __forceinline__ int slice_begin(int slice, int vocab) {
  const int each = (vocab + kSlices * kVec<T> - 1) / (kSlices * kVec<T>)*kVec<T>;
  return min(slice * each, vocab);
}

// Reads kCount slices of a row from slice `first` on and leaves their bests in `slices`, valid in warp 0.
// parts: shared, [kCount][warps].
template <typename T, int kThreads, int kCount>
__device__ __forceinline__ void read_slices(const T* row, const GreedyParams& p, int first, Best* parts,
                                            Best (&slices)[kCount]) {
  constexpr int kWarps = kThreads / 32;
#pragma unroll 1
  for (int i = 0; i < kCount; ++i) {
    const int begin = slice_begin<T>(first + i, p.vocab), end = slice_begin<T>(first + i + 1, p.vocab);
    const Best best = warp_best(scan<T, kThreads>(row, begin, end, p.aligned));
    if (threadIdx.x % 32 == 0) parts[i * kWarps + threadIdx.x / 32] = best;
  }
  __syncthreads();
  if (threadIdx.x >= 32) return;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    slices[i] = warp_best(threadIdx.x < kWarps ? parts[i * kWarps + threadIdx.x] : Best{});
  }
}

__device__ __forceinline__ void store_best(const GreedyParams& p, int64_t row, const Best& best) {
  p.ids[row] = best.id == INT_MAX ? 0 : best.id;
  p.logprobs[row] = best.id == INT_MAX ? NAN : -logf(best.mass);
}

}  // namespace tgi
