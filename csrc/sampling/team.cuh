// A cluster of CTAs that share a row of scores: what they hold, what they say to each other.
#pragma once

#include <cooperative_groups.h>

#include "common/reduce.cuh"
#include "sampling/adjust.cuh"
#include "sampling/order.cuh"

namespace tgi {

namespace cg = cooperative_groups;

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr int kCluster = 8;
constexpr int kListed = 2048;  // tokens that one CTA sorts
constexpr int kMostWanted =
    1024;  // of which a bound from the threads' maxima lets through this many and a few more
constexpr int kNucleusGuess = 512;  // the likeliest tokens, among which a nucleus is looked for first
constexpr int kBins = 1024;         // of scores below the largest, 1/32 of a factor of two wide
constexpr int kBinsEach = kBins / kThreads;

// The row's CTAs, and sums over all their threads.
struct Team {
  struct alignas(16) Item {
    uint32_t word[4];
  };
  struct Shared {
    Item parts[kWarps];
    Item slots[2][kCluster];  // by turns: a slot is read while the next turn's is written
  };

  cg::cluster_group cluster;
  Shared& shared;
  int rank, turn;

  template <typename T>
  static __device__ __forceinline__ T shuffle(T value, int offset) {
    constexpr int kWords = sizeof(T) / 4;
    struct Words {
      uint32_t word[kWords];
    } words = __builtin_bit_cast(Words, value);
#pragma unroll
    for (uint32_t& word : words.word) word = __shfl_xor_sync(kFullWarp, word, offset);
    return __builtin_bit_cast(T, words);
  }

  // Every thread of the cluster gets merge() over all threads' values, in an order that is always the same.
  template <typename T, typename Merge>
  __device__ __forceinline__ T reduce(T value, Merge&& merge) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) value = merge(value, shuffle(value, offset));
    const auto at = [](Item& item) -> T& { return reinterpret_cast<T&>(item); };
    if (threadIdx.x % 32 == 0) at(shared.parts[threadIdx.x / 32]) = value;
    __syncthreads();
    if (threadIdx.x < kCluster) {
      T all = at(shared.parts[0]);
      for (int i = 1; i < kWarps; ++i) all = merge(all, at(shared.parts[i]));
      at(*cluster.map_shared_rank(&shared.slots[turn][rank], threadIdx.x)) = all;
    }
    cluster.sync();
    T all = at(shared.slots[turn][0]);
    for (int i = 1; i < kCluster; ++i) all = merge(all, at(shared.slots[turn][i]));
    turn ^= 1;
    return all;
  }

  template <typename T>
  __device__ __forceinline__ T sum(T value) {
    return reduce(value, [](T a, T b) { return a + b; });
  }
};

struct Best64 {
  double value;
  int id;
  int padding;
};

__device__ __forceinline__ Best64 better(const Best64& a, const Best64& b) {
  return a.value > b.value || (a.value == b.value && a.id < b.id) ? a : b;
}

// What rank 0 found out.
struct Verdict {
  uint64_t border;  // keys from it on are kept
  int listed;       // how many those are, if all are among the sorted candidates; else one of these
  static constexpr int kUnlisted = -1, kUnknown = -2, kAgain = -3;
};

// Bins of scores: a weight is high · 2^15 + low, so that 32-bit counters hold the sums of a slice.
struct Bins {
  uint32_t count[kBins], low[kBins], high[kBins];
};

struct Shared {
  Team::Shared team;
  int counts[2][kWarps];
  uint64_t warp_sums[kWarps];
  uint64_t before;  // what the elements before the first that reaches the wanted sum add up to
  float bound;      // candidates' scores are at least this
  int found;        // candidates
  int first;        // the first element whose sum reaches what is wanted
  int bin;          // whose tokens are collected
  Verdict verdict;
  float raw_logit, raw_mass;  // the largest logit and what all weigh beside it; kept here for the end
};

// A draw's scores, and what it asks for: read when it is needed, to leave the registers to the scores.
struct Row {
  Slice slice;
  Weights weights;
  const float* numbers;
  const int64_t* wholes;
  uint32_t position;
  int vocab;

  __device__ __forceinline__ double temperature() const { return static_cast<double>(numbers[kTemperature]); }
  __device__ __forceinline__ int64_t top_k() const {
    return wholes[kTopK] < vocab ? wholes[kTopK] : 0;
  }  // 0: all
  __device__ __forceinline__ float top_p() const { return numbers[kTopP]; }
  __device__ __forceinline__ Noise noise() const {
    return {static_cast<uint64_t>(wholes[kSeed]), position, static_cast<uint32_t>(wholes[kChoice])};
  }
};

// Calls function(score, token) for this thread's tokens above −∞: vectors a CTA's width apart.
template <typename Function>
__device__ __forceinline__ void for_scores(const Slice& slice, Function&& function) {
  for (int at = static_cast<int>(threadIdx.x) * 4; at < slice.size; at += kThreads * 4) {
    const float4 four = *reinterpret_cast<const float4*>(slice.scores + at);
    const float scores[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (scores[i] > -INFINITY) function(scores[i], static_cast<uint32_t>(slice.begin + at + i));
    }
  }
}

// The same one by one: little code, for what is seldom asked for.
template <typename Function>
__device__ __forceinline__ void for_single_scores(const Slice& slice, Function&& function) {
#pragma unroll 1
  for (int at = threadIdx.x; at < slice.size; at += kThreads) {
    const float score = slice.scores[at];
    if (score > -INFINITY) function(score, static_cast<uint32_t>(slice.begin + at));
  }
}

}  // namespace tgi
