// The border of top-k and top-p among more tokens than can be sorted: bins of scores, of which one is sorted.
#pragma once

#include "sampling/candidates.cuh"

namespace tgi {

__device__ __forceinline__ int bin_of(const Weights& weights, float score) {
  return min(static_cast<int>((weights.largest - score) * weights.scale * 32.0f), kBins - 1);
}

__device__ __forceinline__ void fill_bins(const Row& row, Bins& bins) {
  for (int i = threadIdx.x; i < kBins; i += kThreads) bins.count[i] = bins.low[i] = bins.high[i] = 0;
  __syncthreads();
  uint32_t last = 0;  // tokens of the last bin, which may be most and weigh nothing
  for_scores(row.slice, [&](float score, uint32_t) {
    const int bin = bin_of(row.weights, score);
    if (bin == kBins - 1) {
      ++last;
      return;
    }
    const uint32_t weight = row.weights.of(score);
    atomicAdd(&bins.count[bin], 1u);
    atomicAdd(&bins.low[bin], weight & 0x7fffu);
    atomicAdd(&bins.high[bin], weight >> 15);
  });
  last = __reduce_add_sync(kFullWarp, last);
  if (threadIdx.x % 32 == 0) atomicAdd(&bins.count[kBins - 1], last);
}

__device__ __forceinline__ uint64_t cta_sum(uint64_t value, Shared& shared) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(kFullWarp, value, offset);
  __syncthreads();
  if (threadIdx.x % 32 == 0) shared.warp_sums[threadIdx.x / 32] = value;
  __syncthreads();
  value = 0;
  for (int i = 0; i < kWarps; ++i) value += shared.warp_sums[i];
  __syncthreads();
  return value;
}

// Where a sum over the bins, of tokens or of weights, reaches what is wanted.
struct Crossing {
  int bin;
  uint64_t rest;           // wanted of the bin
  uint64_t weight_before;  // of the bins before it
};

// Rank 0, of the whole row. wanted: at least 1; 0 stands for top-p's share of all weight.
__device__ __forceinline__ Crossing cross_bins(const Row& row, Team& team, Bins& bins, bool by_count,
                                               uint64_t wanted, Shared& shared) {
  uint64_t weights[kBinsEach] = {}, values[kBinsEach] = {}, weight = 0;
  const int first = static_cast<int>(threadIdx.x) * kBinsEach;
#pragma unroll 1
  for (int rank = 0; rank < kCluster; ++rank) {
    const Bins& of = *team.cluster.map_shared_rank(&bins, rank);
#pragma unroll
    for (int i = 0; i < kBinsEach; ++i) {
      weights[i] += (uint64_t{of.high[first + i]} << 15) + of.low[first + i];
      values[i] = by_count ? values[i] + of.count[first + i] : weights[i];
    }
  }
#pragma unroll
  for (int i = 0; i < kBinsEach; ++i) weight += weights[i];
  if (wanted == 0) wanted = share_of(cta_sum(weight, shared), row.top_p());
  const auto reachable = [&](uint64_t total) { return wanted = wanted < total ? wanted : total; };
  Crossing crossing{};
  crossing.bin = first_reaching(values, reachable, shared);
  crossing.rest = wanted - shared.before;
  uint64_t before = 0;
#pragma unroll
  for (int i = 0; i < kBinsEach; ++i) before += first + i < crossing.bin ? weights[i] : 0;
  crossing.weight_before = cta_sum(before, shared);
  return crossing;
}

// Rank 0, once the bin's tokens are collected. Returns kAgain, and the weight that is wanted, if the nucleus
// of the top k ends in a bin before.
__device__ __forceinline__ Verdict judge_bin(const Row& row, uint64_t* keys, const Crossing& crossing,
                                             bool by_count, uint64_t& wanted, Shared& shared) {
  const int found = shared.found;
  if (found > kListed) return {0, Verdict::kUnknown};
  sort_keys(keys, found);
  int kept = by_count ? static_cast<int>(crossing.rest) : found;
  if (row.top_p() < 1.0f) {
    const auto rest = [&](uint64_t of_kept) {
      wanted = by_count ? share_of(crossing.weight_before + of_kept, row.top_p())
                        : crossing.weight_before + crossing.rest;
      return wanted > crossing.weight_before ? wanted - crossing.weight_before : ~uint64_t{0};
    };
    const int reaching = first_key_reaching(keys, kept, row.weights, rest, shared);
    if (wanted <= crossing.weight_before) return {0, Verdict::kAgain};
    if (reaching >= 0) kept = reaching + 1;
  }
  return {keys[kept - 1], Verdict::kUnlisted};
}

// The border of top-k and top-p: the bin in which the wanted sum is reached is collected and sorted.
__device__ __forceinline__ Verdict search_bins(const Row& row, Team& team, uint64_t* keys, Bins& bins,
                                               Shared& shared) {
  fill_bins(row, bins);
  team.cluster.sync();
  bool by_count = row.top_k() > 0;
  uint64_t wanted = by_count ? static_cast<uint64_t>(row.top_k()) : 0;
  for (;; by_count = false) {
    Crossing crossing{};
    if (team.rank == 0) {
      crossing = cross_bins(row, team, bins, by_count, wanted, shared);
      if (threadIdx.x < kCluster) *team.cluster.map_shared_rank(&shared.bin, threadIdx.x) = crossing.bin;
      if (threadIdx.x == 0) shared.found = 0;
    }
    team.cluster.sync();
    const int bin = shared.bin;
    collect(row, team, keys, shared, [&](float score) { return bin_of(row.weights, score) == bin; });
    team.cluster.sync();
    Verdict verdict{};
    if (team.rank == 0) verdict = judge_bin(row, keys, crossing, by_count, wanted, shared);
    verdict = proclaim(team, verdict, shared);
    if (verdict.listed != Verdict::kAgain) return verdict;
  }
}

}  // namespace tgi
