// Finding the first tokens of an order without sorting all.
#pragma once

#include "common/vec.h"

namespace tgi::TGI_ISA {

// Tokens whose largest score is known: a search looks into few of them.
constexpr int64_t kBlock = 64;

TGI_INLINE int64_t blocks_of(int64_t vocab) { return (vocab + kBlock - 1) / kBlock; }

// The largest of x that is a number; −∞ if none is.
TGI_INLINE float largest_of(const float* x, int64_t size) {
  Vec most = splat(-__builtin_inff());
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) most = max(load(x + i), most);  // a NaN loses every comparison
  float all = largest(most);
  for (; i < size; ++i) all = x[i] > all ? x[i] : all;
  return all;
}

// maxima: [blocks]. Returns the largest of all.
TGI_INLINE float block_maxima(const float* scores, int64_t vocab, float* maxima) {
  float most = -__builtin_inff();
  for (int64_t block = 0; block < blocks_of(vocab); ++block) {
    const int64_t first = block * kBlock, left = vocab - first;
    maxima[block] = largest_of(scores + first, left < kBlock ? left : kBlock);
    most = maxima[block] > most ? maxima[block] : most;
  }
  return most;
}

// Score and token in one number: larger for larger scores, and for lower ids among equal ones.
TGI_INLINE uint64_t key_of(float score, int64_t token) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, score + 0.0f);  // −0 + 0 is +0
  const uint32_t ordered = bits >> 31 ? ~bits : bits | 0x80000000u;
  return uint64_t{ordered} << 32 | static_cast<uint32_t>(~token);
}

TGI_INLINE int64_t token_of(uint64_t key) { return static_cast<uint32_t>(~key); }

// Moves the largest keys to the front, just as many as together weigh at least `wanted` (all, if they weigh
// less), and returns their number; the last of them is the smallest. Keys differ.
template <typename Weight>
TGI_INLINE int64_t select(uint64_t* keys, int64_t size, uint64_t wanted, Weight&& weight_of) {
  int64_t low = 0, high = size;  // the border lies in keys[low, high]
  const auto swap = [keys](int64_t a, int64_t b) {
    const uint64_t kept = keys[a];
    keys[a] = keys[b];
    keys[b] = kept;
  };
  while (low < high) {
    const uint64_t a = keys[low], b = keys[low + (high - low) / 2], c = keys[high - 1];
    const bool middle_is_b = (a < b) == (b < c);
    const bool middle_is_a = !middle_is_b && (b < a) == (a < c);
    swap(middle_is_b ? low + (high - low) / 2 : middle_is_a ? low : high - 1, high - 1);
    const uint64_t pivot = keys[high - 1];
    int64_t at = low;
    uint64_t weight = 0;
    for (int64_t i = low; i < high - 1; ++i) {
      if (keys[i] <= pivot) continue;
      weight += weight_of(keys[i]);
      swap(i, at++);
    }
    swap(at, high - 1);
    if (weight >= wanted) {
      high = at;
      continue;
    }
    weight += weight_of(pivot);
    low = at + 1;
    if (weight >= wanted) return low;
    wanted -= weight;
  }
  return low;
}

// The n-th largest of x, n ≥ 1; −∞ if there are fewer. keys: workspace for `size` keys.
TGI_INLINE float nth_largest(const float* x, int64_t size, int64_t n, uint64_t* keys) {
  if (n > size) return -__builtin_inff();
  for (int64_t i = 0; i < size; ++i) keys[i] = key_of(x[i], i);
  const int64_t count = select(keys, size, static_cast<uint64_t>(n), [](uint64_t) { return 1; });
  return x[token_of(keys[count - 1])];
}

// A row of scores to choose from.
struct Scores {
  const float* of;      // [vocab]
  const float* maxima;  // [blocks]
  int64_t vocab;
  float largest;  // finite
};

// Writes the keys of the scores that are at least `least`, −∞ left out, and returns their number.
TGI_INLINE int64_t collect(const Scores& scores, float least, uint64_t* keys) {
  int64_t count = 0;
  for (int64_t block = 0; block < blocks_of(scores.vocab); ++block) {
    if (!(scores.maxima[block] >= least)) continue;
    const int64_t end = (block + 1) * kBlock < scores.vocab ? (block + 1) * kBlock : scores.vocab;
    for (int64_t token = block * kBlock; token < end; ++token) {
      const float score = scores.of[token];
      keys[count] = key_of(score, token);
      count += score >= least && score > -__builtin_inff();
    }
  }
  return count;
}

// The `count` first tokens, fewer if fewer are above −∞, to the front of `keys` in no order; returns how
// many. The n-th largest block maximum is a lower bound of the n-th largest score. keys: [vocab].
TGI_INLINE int64_t select_first(const Scores& scores, int64_t count, uint64_t* keys) {
  const float least = nth_largest(scores.maxima, blocks_of(scores.vocab), count, keys);
  const int64_t found = collect(scores, least, keys);
  return select(keys, found, static_cast<uint64_t>(count), [](uint64_t) { return 1; });
}

}  // namespace tgi::TGI_ISA
