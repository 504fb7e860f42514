// The border of top-k and top-p among the likeliest tokens, which one CTA sorts.
#pragma once

#include "sampling/team.cuh"

namespace tgi {

// A lower bound on the wanted-th largest score: a value that at least `wanted` of the threads' maxima reach,
// and not many more. maxima: of the threads of all CTAs with this thread's index.
__device__ __forceinline__ float bound_of(const float (&maxima)[kCluster], const Weights& weights, int wanted,
                                          Shared& shared) {
  const int slack = wanted / 8 + 16;
  float high = weights.largest, low = -INFINITY, trial = weights.largest - 32.0f / weights.scale;
  for (int turn = 0; turn < 24; ++turn) {
    int count = 0;
#pragma unroll
    for (const float most : maxima) count += most >= trial;
    count = __reduce_add_sync(kFullWarp, count);
    if (threadIdx.x % 32 == 0) shared.counts[turn % 2][threadIdx.x / 32] = count;
    __syncthreads();
    count = threadIdx.x % 32 < kWarps ? shared.counts[turn % 2][threadIdx.x % 32] : 0;
    count = __reduce_add_sync(kFullWarp, count);
    (count < wanted ? high : low) = trial;
    if (low == -INFINITY || (count >= wanted && count <= wanted + slack)) break;
    trial = 0.5f * (low + high);
  }
  return low;
}

// Sorts the `found` keys, largest first: Batcher's bitonic network over the next power of two.
__device__ __forceinline__ void sort_keys(uint64_t* keys, int found) {
  int size = 2;
  while (size < found) size *= 2;
  for (int i = found + static_cast<int>(threadIdx.x); i < size; i += kThreads) keys[i] = 0;
  for (int run = 2; run <= size; run *= 2) {
    for (int stride = run / 2; stride > 0; stride /= 2) {
      __syncthreads();
      for (int i = threadIdx.x; i < size / 2; i += kThreads) {
        const int low = 2 * i - (i & (stride - 1)),
                  high = low + stride;  // i with a zero put in at the stride's bit
        const uint64_t a = keys[low], b = keys[high];
        if ((a < b) == ((low & run) == 0)) keys[low] = b, keys[high] = a;
      }
    }
  }
  __syncthreads();
}

// The first of the CTA's elements, kEach a thread in order, at which their sum reaches wanted(total); −1:
// none does. Leaves the sum before it in shared.before.
template <int kEach, typename Wanted>
__device__ __forceinline__ int first_reaching(const uint64_t (&own)[kEach], Wanted&& wanted, Shared& shared) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  uint64_t sum = 0;
#pragma unroll
  for (const uint64_t element : own) sum += element;
  uint64_t before = sum;
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const uint64_t lower = __shfl_up_sync(kFullWarp, before, offset);
    if (lane >= offset) before += lower;
  }
  if (lane == 31) shared.warp_sums[warp] = before;
  if (threadIdx.x == 0) shared.first = -1;
  __syncthreads();
  uint64_t total = 0;
  before -= sum;
  for (int i = 0; i < kWarps; ++i) {
    if (i < warp) before += shared.warp_sums[i];
    total += shared.warp_sums[i];
  }
  const uint64_t least = wanted(total);
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    if (before < least && before + own[i] >= least) {
      shared.first = static_cast<int>(threadIdx.x) * kEach + i;
      shared.before = before;
    }
    before += own[i];
  }
  __syncthreads();
  return shared.first;
}

// The same for the weights of the first `limit` sorted keys.
template <typename Wanted>
__device__ __forceinline__ int first_key_reaching(const uint64_t* keys, int limit, const Weights& weights,
                                                  Wanted&& wanted, Shared& shared) {
  constexpr int kEach = kListed / kThreads;
  uint64_t own[kEach];
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int at = static_cast<int>(threadIdx.x) * kEach + i;
    own[i] = at < limit ? weights.of(score_of(keys[at])) : 0;
  }
  return first_reaching(own, wanted, shared);
}

// Rank 0, after the candidates have come in: what top-k and top-p keep of them. total: the weight of all
// tokens.
__device__ __forceinline__ Verdict judge(const Row& row, uint64_t* keys, uint64_t total, Shared& shared) {
  const int found = shared.found;
  if (found > kListed) return {0, Verdict::kUnknown};
  sort_keys(keys, found);
  const bool limited = row.top_k() > 0;
  int listed = limited && row.top_k() < found ? static_cast<int>(row.top_k()) : found;
  if (row.top_p() < 1.0f) {
    const auto wanted = [&](uint64_t of_listed) {
      return share_of(limited ? of_listed : total, row.top_p());
    };
    const int reaching = first_key_reaching(keys, listed, row.weights, wanted, shared);
    if (reaching < 0 && !limited)
      return {0, Verdict::kUnknown};  // the nucleus is larger than what was collected
    if (reaching >= 0) listed = reaching + 1;
  }
  return {keys[listed - 1], listed};
}

// Puts the tokens that `wanted` likes into rank 0's list.
template <typename Wanted>
__device__ __forceinline__ void collect(const Row& row, Team& team, uint64_t* keys, Shared& shared,
                                        Wanted&& wanted) {
  int* found = team.cluster.map_shared_rank(&shared.found, 0);
  uint64_t* to = team.cluster.map_shared_rank(keys, 0);
  for_scores(row.slice, [&](float score, uint32_t token) {
    if (!wanted(score)) return;
    const int place = atomicAdd(found, 1);
    if (place < kListed) to[place] = key_of(score, token);
  });
}

__device__ __forceinline__ Verdict proclaim(Team& team, const Verdict& verdict, Shared& shared) {
  if (team.rank == 0 && threadIdx.x < kCluster) {
    *team.cluster.map_shared_rank(&shared.verdict, threadIdx.x) = verdict;
  }
  team.cluster.sync();
  return shared.verdict;
}

// Tries the likeliest few. most: the largest of this thread's scores, as all threads have published theirs in
// `keys`.
__device__ __forceinline__ Verdict find_border(const Row& row, Team& team, uint64_t* keys, Shared& shared) {
  const float most = reinterpret_cast<const float*>(keys)[threadIdx.x];
  if (team.rank == 0) {
    float all[kCluster];
#pragma unroll
    for (int i = 0; i < kCluster; ++i) {
      all[i] = team.cluster.map_shared_rank(reinterpret_cast<float*>(keys), i)[threadIdx.x];
    }
    const int wanted = row.top_k() > 0 ? static_cast<int>(row.top_k()) : kNucleusGuess;
    const float bound = bound_of(all, row.weights, wanted, shared);
    if (threadIdx.x < kCluster) *team.cluster.map_shared_rank(&shared.bound, threadIdx.x) = bound;
    if (threadIdx.x == 0) shared.found = 0;
  }
  team.cluster.sync();
  const float bound = shared.bound;
  if (most >= bound) collect(row, team, keys, shared, [&](float score) { return score >= bound; });
  uint64_t total = 0;
  if (row.top_k() == 0) {
    for_scores(row.slice, [&](float score, uint32_t) { total += row.weights.of(score); });
    total = team.sum(total);
  } else {
    team.cluster.sync();
  }
  Verdict verdict{};
  if (team.rank == 0) verdict = judge(row, keys, total, shared);
  return proclaim(team, verdict, shared);
}

}  // namespace tgi
