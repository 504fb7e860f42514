// A row of logits comes into the shared memory of its cluster, once.
#pragma once

#include "sampling/greedy.cuh"
#include "sampling/team.cuh"

namespace tgi {

// Tokens of a row that each CTA of its cluster holds.
inline int share_of_cta(int vocab) {
  constexpr int kGranule = kCluster * 128;  // the watermark's words begin at multiples of 128 tokens
  return (vocab + kGranule - 1) / kGranule * 128;
}

// Four logits: as many whatever their type, so that a row's sums have one order and its bits do not depend on
// the type its values are stored in.
template <typename T>
__device__ __forceinline__ Vec<T, 4> load_four(const T* row, int first, int length, bool aligned) {
  if constexpr (sizeof(T) == 4) {
    return load_row(row, first, length, aligned, -INFINITY);
  } else {
    if (aligned && first < length) {
      Vec<T, 4> four;
      asm volatile("ld.global.L1::no_allocate.v2.u32 {%0, %1}, [%2];"
                   : "=r"(four.word[0]), "=r"(four.word[1])
                   : "l"(row + first));
      return four;
    }
    float x[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = first + i < length ? to_float(row[first + i]) : -INFINITY;
    return pack<T>(x);
  }
}

// Copies the logits into the slice, a NaN as −∞, and returns this thread's best of them.
template <typename T>
__device__ __forceinline__ Best load_slice(const T* logits, const Slice& slice, bool aligned) {
  constexpr int kRound = 8;
  const int end = slice.begin + slice.size;
  Best best;
  for (int base = static_cast<int>(threadIdx.x) * 4; base < slice.size; base += kThreads * 4 * kRound) {
    Vec<T, 4> loaded[kRound];
#pragma unroll
    for (int i = 0; i < kRound; ++i) {
      loaded[i] = load_four(logits, slice.begin + base + i * kThreads * 4, end, aligned);
    }
    Vec<float> round[kRound];
#pragma unroll
    for (int i = 0; i < kRound; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) round[i].word[j] = __float_as_uint(element(loaded[i], j));
    }
    best = best_of_round<float, kThreads>(best, round, slice.begin + base);
#pragma unroll
    for (int i = 0; i < kRound; ++i) {
      float scores[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float x = element(round[i], j);
        scores[j] = x == x ? x : -INFINITY;
      }
      // Slices are padded to whole vectors; what lies past the row is −∞.
      if (base + i * kThreads * 4 < slice.size)
        store(slice.scores + base + i * kThreads * 4, pack<float>(scores));
    }
  }
  return best;
}

}  // namespace tgi
