// Greedy choice: the likeliest token and its log-probability.
#pragma once

#include "common/parallel.h"
#include "common/vec.h"
#include "sampling/cpu_params.h"

namespace tgi::TGI_ISA {

// The largest of x that is a number; −∞ if none is.
TGI_INLINE float largest_of(const float* x, int64_t size) {
  Vec most = splat(-__builtin_inff());
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) most = max(load(x + i), most);  // a NaN loses every comparison
  float all = largest(most);
  for (; i < size; ++i) all = x[i] > all ? x[i] : all;
  return all;
}

// Σ exp(x − most).
TGI_INLINE float mass_below(const float* x, int64_t size, float most) {
  Vec mass{};
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) mass += exp(load(x + i) - most);
  const Vec rest = exp(load_first(x + i, size - i) - most);
  float lanes[kLanes];
  store(lanes, rest);
  float tail = 0.0f;
  for (int64_t lane = 0; lane < size - i; ++lane) tail += lanes[lane];
  return sum(mass) + tail;
}

void greedy(const GreedyParams& p) {
  parallel_for(p.rows, [&](int64_t row) {
    const float* x = p.logits + row * p.stride;
    const float most = largest_of(x, p.vocab);
    if (most == -__builtin_inff()) {
      p.ids[row] = 0;
      p.logprobs[row] = __builtin_nanf("");
      return;
    }
    int64_t id = 0;
    while (x[id] != most) ++id;
    p.ids[row] = id;
    p.logprobs[row] = -__builtin_logf(mass_below(x, p.vocab, most));
  });
}

}  // namespace tgi::TGI_ISA
