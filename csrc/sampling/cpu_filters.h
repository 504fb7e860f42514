// Which tokens may be drawn, and the draw. The definition is in tgi_kernels/sampling.py.
#pragma once

#include "sampling/cpu_noise.h"
#include "sampling/cpu_params.h"
#include "sampling/cpu_select.h"

namespace tgi::TGI_ISA {

// Probabilities as whole numbers, 2^30 for the likeliest token: their sums are exact, so that what a filter
// keeps does not depend on the order of additions. Products and sums are rounded one by one, which every
// machine can do.
struct Weights {
  float largest;
  float scale;  // log2(e) / temperature
};

template <typename F>
TGI_INLINE F power_of_two(F y, F& fraction) {  // 2^y = 2^whole · p(fraction); y in [−40, 0]; returns `whole`
  const F whole = (y + 12582912.0f) - 12582912.0f;  // 1.5·2^23: adding it rounds to an integer
  const F f = y - whole;
  F p = f * 1.5403530e-4f + 1.3333558e-3f;  // Taylor's terms ln(2)^n / n!
  p = p * f + 9.6181291e-3f;
  p = p * f + 5.5504109e-2f;
  p = p * f + 2.4022651e-1f;
  p = p * f + 6.9314718e-1f;
  fraction = p * f + 1.0f;
  return whole;
}

// Weights of a vector of scores, and of one; NaN and −∞ weigh nothing.
TGI_INLINE VecInt weigh(const Weights& weights, Vec scores) {
  const Vec y = max((scores - weights.largest) * weights.scale, splat(-40.0f));
  Vec fraction;
  const Vec whole = power_of_two(y, fraction);
  const VecInt exponent = (__builtin_convertvector(whole, VecInt) + (127 + 30)) << 23;
  return __builtin_convertvector(fraction * reinterpret_cast<Vec>(exponent) + 0.5f, VecInt);
}

TGI_INLINE uint64_t weigh(const Weights& weights, float score) {
  const float scaled = (score - weights.largest) * weights.scale;
  const float y = scaled > -40.0f ? scaled : -40.0f;
  float fraction;
  const float whole = power_of_two(y, fraction);
  const uint32_t exponent = static_cast<uint32_t>(static_cast<int32_t>(whole) + 127 + 30) << 23;
  return static_cast<uint64_t>(fraction * __builtin_bit_cast(float, exponent) + 0.5f);
}

TGI_INLINE uint64_t total_weight(const Weights& weights, const Scores& scores) {
  VecLong sums{};
  int64_t token = 0;
  for (; token + kLanes <= scores.vocab; token += kLanes) {
    const VecLong pairs = reinterpret_cast<VecLong>(weigh(weights, load(scores.of + token)));
    sums += (pairs & 0xffffffffu) + (pairs >> 32);
  }
  uint64_t total = 0;
  for (int lane = 0; lane < kLongs; ++lane) total += sums[lane];
  for (; token < scores.vocab; ++token) total += weigh(weights, scores.of[token]);
  return total;
}

// The least weight a set needs to hold this share of `total`; at least one unit.
TGI_INLINE uint64_t share_of(uint64_t total, float share) {
  const double wanted = __builtin_ceil(static_cast<double>(total) * static_cast<double>(share));
  return wanted < 1.0 ? 1 : static_cast<uint64_t>(wanted);
}

// What a row asks for.
struct Filters {
  double temperature;
  int64_t top_k;  // 0: all
  float top_p;
  float typical_p;
  float min_p;
};

// The tokens that may be drawn: those whose key is at least `last`; if `listed` ≥ 0, only keys[0, listed).
struct Kept {
  uint64_t last = 0;
  int64_t listed = -1;
};

// Sixteen ranges of scores to a factor of 2 in weight, the likeliest first; weights end at 2^-31 of the
// largest.
constexpr int kRanges = 512;

template <typename F>
TGI_INLINE F range_of(const Weights& weights, F score) {  // score: above −∞
  const F range = (weights.largest - score) * (weights.scale * 16.0f);
  const F last = score - score + 511.0f;
  return range < 511.0f ? range : last;
}

// The last of the first tokens that together weigh `wanted`, where these may be many: a histogram of weights
// over scores finds the narrow range that it lies in.
TGI_INLINE uint64_t last_of_many(const Scores& scores, const Weights& weights, uint64_t wanted,
                                 uint64_t* keys) {
  uint64_t held[kRanges] = {};
  int64_t token = 0;
  for (; token + kLanes <= scores.vocab; token += kLanes) {
    const Vec score = max(load(scores.of + token), splat(-3.0e38f));
    const VecInt weight = weigh(weights, score),
                 range = __builtin_convertvector(range_of(weights, score), VecInt);
    for (int lane = 0; lane < kLanes; ++lane) held[range[lane]] += static_cast<uint32_t>(weight[lane]);
  }
  for (; token < scores.vocab; ++token) {
    const float score = scores.of[token];
    if (score > -3.0e38f) held[static_cast<int>(range_of(weights, score))] += weigh(weights, score);
  }
  int border = 0;
  for (; border < kRanges - 1 && held[border] < wanted; ++border) wanted -= held[border];
  int64_t found = 0;
  for (token = 0; token < scores.vocab; token += kLanes) {
    const int64_t left = scores.vocab - token < kLanes ? scores.vocab - token : kLanes;
    const Vec score =
        max(left < kLanes ? load_first(scores.of + token, left) : load(scores.of + token), splat(-3.0e38f));
    const VecInt within = __builtin_convertvector(range_of(weights, score), VecInt) == border;
    if (!any(within)) continue;
    for (int64_t lane = 0; lane < left; ++lane) {
      keys[found] = key_of(score[lane], token + lane);
      found += within[lane] != 0 && score[lane] > -3.0e38f;
    }
  }
  const auto weight_of = [&](uint64_t key) { return weigh(weights, scores.of[token_of(key)]); };
  return keys[select(keys, found, wanted, weight_of) - 1];
}

// The last token that top-p over all tokens keeps. Looks at the tokens above ever lower block maxima until
// they weigh enough.
TGI_INLINE uint64_t last_of_nucleus(const Scores& scores, const Weights& weights, float top_p,
                                    uint64_t* keys) {
  const auto weight_of = [&](uint64_t key) { return weigh(weights, scores.of[token_of(key)]); };
  const uint64_t wanted = share_of(total_weight(weights, scores), top_p);
  const int64_t blocks = blocks_of(scores.vocab);
  for (int64_t seen = 16; seen < 512 && seen < blocks; seen *= 8) {
    const int64_t found = collect(scores, nth_largest(scores.maxima, blocks, seen, keys), keys);
    uint64_t weight = 0;
    for (int64_t i = 0; i < found; ++i) weight += weight_of(keys[i]);
    if (weight >= wanted) return keys[select(keys, found, wanted, weight_of) - 1];
  }
  return last_of_many(scores, weights, wanted, keys);
}

// Of the `count` tokens in keys, those whose information is nearest to the mean, until they hold `typical_p`.
// With p = e^−a / Z the information −log p is a + log Z, its mean (the entropy) M + log Z, where M is the
// mean of a: what counts is |a − M|. Returns how many are left.
TGI_INLINE int64_t select_typical(const Scores& scores, const Weights& weights, const Filters& filters,
                                  uint64_t* keys, int64_t count) {
  const auto gap_of = [&](int64_t token) {
    return (static_cast<double>(weights.largest) - static_cast<double>(scores.of[token])) /
           filters.temperature;
  };
  uint64_t total = 0;
  double mean = 0.0;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t token = token_of(keys[i]);
    const uint64_t weight = weigh(weights, scores.of[token]);
    total += weight;
    mean += static_cast<double>(weight) * gap_of(token);
  }
  mean /= static_cast<double>(total);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t token = token_of(keys[i]);
    keys[i] = key_of(-static_cast<float>(__builtin_fabs(gap_of(token) - mean)), token);
  }
  return select(keys, count, share_of(total, filters.typical_p),
                [&](uint64_t key) { return weigh(weights, scores.of[token_of(key)]); });
}

// The tokens that pass top-k, then top-p, then min-p, then typical-p. keys: [vocab].
TGI_INLINE Kept filter(const Scores& scores, const Filters& filters, uint64_t* keys) {
  const Weights weights{scores.largest, static_cast<float>(1.4426950408889634 / filters.temperature)};
  const auto weight_of = [&](uint64_t key) { return weigh(weights, scores.of[token_of(key)]); };
  const bool nucleus = filters.top_p < 1.0f;
  Kept kept;
  if (filters.top_k > 0 && filters.top_k < scores.vocab) {
    int64_t count = select_first(scores, filters.top_k, keys);
    if (nucleus) {
      uint64_t total = 0;
      for (int64_t i = 0; i < count; ++i) total += weight_of(keys[i]);
      count = select(keys, count, share_of(total, filters.top_p), weight_of);
    }
    kept.last = keys[count - 1];
  } else if (nucleus) {
    kept.last = last_of_nucleus(scores, weights, filters.top_p, keys);
  }
  if (filters.min_p > 0.0f) {
    const double least = static_cast<double>(scores.largest) +
                         filters.temperature * __builtin_log(static_cast<double>(filters.min_p));
    float floor = static_cast<float>(least);
    if (static_cast<double>(floor) < least) floor = __builtin_nextafterf(floor, __builtin_inff());
    const uint64_t last = key_of(floor, 0xffffffff);  // after every token of this score
    kept.last = kept.last < last ? last : kept.last;
  }
  if (filters.typical_p < 1.0f) {
    int64_t found = collect(scores, -__builtin_inff(), keys), stays = 0;
    for (int64_t i = 0; i < found; ++i) {
      if (keys[i] >= kept.last) keys[stays++] = keys[i];
    }
    kept.listed = select_typical(scores, weights, filters, keys, stays);
  }
  return kept;
}

// The token drawn so far: the first of those whose score + temperature · Gumbel noise is the largest.
struct Drawn {
  const Scores& scores;
  double temperature;
  int64_t token = -1;
  double value = -__builtin_inf();

  TGI_INLINE void offer(Drawn& drawn, int64_t token, uint32_t word) {
    const double value = static_cast<double>(drawn.scores.of[token]) + drawn.temperature * gumbel(word);
    if (value > drawn.value || (value == drawn.value && token < drawn.token)) {
      drawn.value = value;
      drawn.token = token;
    }
  }
};

// Draws among all tokens of a block that are kept. Most blocks are left after a look at their words: none is
// small enough to win.
TGI_INLINE void draw_block(Drawn& drawn, const Kept& kept, const Noise& noise, int64_t block) {
  const Scores& scores = drawn.scores;
  const int64_t bound =
      largest_word_above((drawn.value - static_cast<double>(scores.maxima[block])) / drawn.temperature);
  if (bound < 0) return;
  for (int64_t first = block * kBlock; first < (block + 1) * kBlock; first += 4 * kLongs) {
    VecLong counters;
    for (int lane = 0; lane < kLongs; ++lane) counters[lane] = static_cast<uint64_t>(first / 4 + lane);
    VecLong words[4];
    noise_words(noise, counters, words);
    if (!any_at_most(words, static_cast<uint32_t>(bound))) continue;
    for (int64_t i = 0; i < 4 * kLongs && first + i < scores.vocab; ++i) {
      const uint32_t word = static_cast<uint32_t>(words[i % 4][i / 4]);
      const float score = scores.of[first + i];
      if (word > bound || !(score > -__builtin_inff()) || key_of(score, first + i) < kept.last) continue;
      Drawn::offer(drawn, first + i, word);
    }
  }
}

TGI_INLINE int64_t draw(const Scores& scores, double temperature, const Kept& kept, const uint64_t* keys,
                        const Noise& noise) {
  Drawn drawn{scores, temperature};
  for (int64_t i = 0; i < kept.listed; ++i) {
    const int64_t token = token_of(keys[i]);
    Drawn::offer(drawn, token, noise_word(noise, token));
  }
  if (kept.listed >= 0) return drawn.token;
  int64_t block = 0;
  while (scores.maxima[block] != scores.largest) ++block;
  draw_block(drawn, kept, noise, block);  // the likeliest first: others then seldom need a closer look
  const uint32_t ordered = static_cast<uint32_t>(kept.last >> 32);
  for (int64_t other = 0; other < blocks_of(scores.vocab); ++other) {
    const float most = scores.maxima[other];
    if (other == block || !(most > -__builtin_inff()) || key_of(most, 0) >> 32 < ordered) continue;
    draw_block(drawn, kept, noise, other);
  }
  return drawn.token;
}

}  // namespace tgi::TGI_ISA
