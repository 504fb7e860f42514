// Borders found bit by bit: of any number of equal scores, and of typical-p's order.
#pragma once

#include "sampling/team.cuh"

namespace tgi {

// The largest key from which on the tokens together weigh at least `wanted`; all, if they weigh less.
// weigh(score, token, border): what a token adds if its key is at least `border`.
template <typename Weigh>
__device__ __forceinline__ uint64_t search_border(const Slice& slice, Team& team, uint64_t wanted,
                                                  Weigh&& weigh) {
  constexpr int kTokenBits = 19;
  static_assert(kSampleMaxVocab <= 1 << kTokenBits);
  uint64_t border = 0;
  for (int bit = 63; bit >= 0; --bit) {
    if (bit == 31) {  // the inverted token: its upper bits are ones
      border |= 0xffffffffu ^ ((1u << kTokenBits) - 1);
      bit = kTokenBits - 1;
    }
    const uint64_t trial = border | uint64_t{1} << bit;
    uint64_t sum = 0;
    for_single_scores(slice, [&](float score, uint32_t token) { sum += weigh(score, token, trial); });
    if (team.sum(sum) >= wanted) border = trial;
  }
  return border;
}

__device__ __forceinline__ uint64_t search_bits(const Row& row, Team& team) {
  uint64_t border = 0;
  if (row.top_k() > 0) {
    border = search_border(
        row.slice, team, static_cast<uint64_t>(row.top_k()),
        [](float score, uint32_t token, uint64_t least) { return uint64_t{key_of(score, token) >= least}; });
  }
  if (row.top_p() >= 1.0f) return border;
  const auto weigh = [&](float score, uint32_t token, uint64_t least) {
    return key_of(score, token) >= least ? uint64_t{row.weights.of(score)} : 0;
  };
  uint64_t total = 0;
  for_single_scores(row.slice, [&](float score, uint32_t token) { total += weigh(score, token, border); });
  const uint64_t nucleus = search_border(row.slice, team, share_of(team.sum(total), row.top_p()), weigh);
  return nucleus > border ? nucleus : border;
}

// Which tokens pass all filters.
struct Kept {
  uint64_t border = 0;
  bool typical = false;
  double mean = 0.0;            // of the gap to the likeliest, in nats
  uint64_t typical_border = 0;  // of keys by nearness to the mean

  __device__ __forceinline__ double gap(const Row& row, float score) const {
    return (static_cast<double>(row.weights.largest) - static_cast<double>(score)) / row.temperature();
  }
  __device__ __forceinline__ uint64_t nearness(const Row& row, float score, uint32_t token) const {
    return key_of(-static_cast<float>(fabs(gap(row, score) - mean)), token);
  }
  __device__ __forceinline__ bool has(const Row& row, float score, uint32_t token) const {
    return key_of(score, token) >= border && (!typical || nearness(row, score, token) >= typical_border);
  }
};

// With p = e^−a / Z the information −log p is a + log Z, its mean (the entropy) M + log Z, where M is the
// mean of a: what counts is |a − M|.
__device__ __forceinline__ void keep_typical(const Row& row, Team& team, Kept& kept) {
  uint64_t total = 0;
  double mean = 0.0;
  for_single_scores(row.slice, [&](float score, uint32_t token) {
    if (key_of(score, token) < kept.border) return;
    const uint32_t weight = row.weights.of(score);
    total += weight;
    mean += static_cast<double>(weight) * kept.gap(row, score);
  });
  total = team.sum(total);
  kept.mean = team.sum(mean) / static_cast<double>(total);
  kept.typical_border =
      search_border(row.slice, team, share_of(total, row.numbers[kTypicalP]),
                    [&](float score, uint32_t token, uint64_t least) {
                      return key_of(score, token) >= kept.border && kept.nearness(row, score, token) >= least
                                 ? uint64_t{row.weights.of(score)}
                                 : 0;
                    });
  kept.typical = true;
}

}  // namespace tgi
