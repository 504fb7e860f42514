// Gated activations: act(gate) · up. Shazeer 2020, arXiv:2002.05202.
#pragma once

#include "activation/cpu_params.h"
#include "common/parallel.h"
#include "common/vec.h"

namespace tgi::TGI_ISA {

TGI_INLINE Vec silu(Vec x) { return x / (splat(1.0f) + exp(-x)); }

// x · ½(1 + tanh u) = x / (1 + e^(−2u)), u = √(2/π)·(x + 0.044715 x³).
TGI_INLINE Vec gelu_tanh(Vec x) {
  const Vec u = x * fma(x * x, splat(0.044715f), splat(1.0f)) * 0.7978845608028654f;
  return x / (splat(1.0f) + exp(u * -2.0f));
}

// x · Φ(x), the C library's erf a lane at a time: exact near −4, where 1 + erf cancels, through erfc.
TGI_INLINE Vec gelu(Vec x) {
  float lanes[kLanes];
  store(lanes, x);
  for (float& lane : lanes) lane *= 0.5f * __builtin_erfcf(lane * -0.7071067811865476f);
  return load(lanes);
}

template <typename Activation>
TGI_INLINE void gated(const GatedParams& p, Activation activation) {
  const int64_t rows = rows_per_task(p.tokens, p.inner);
  parallel_for((p.tokens + rows - 1) / rows, [&](int64_t task) {
    for (int64_t token = task * rows; token < p.tokens && token < (task + 1) * rows; ++token) {
      const float* gate = p.x + token * 2 * p.inner;
      const float* up = gate + p.inner;
      float* out = p.out + token * p.inner;
      int64_t i = 0;
      for (; i + kLanes <= p.inner; i += kLanes) store(out + i, activation(load(gate + i)) * load(up + i));
      const int64_t rest = p.inner - i;
      if (rest > 0)
        store_first(out + i, activation(load_first(gate + i, rest)) * load_first(up + i, rest), rest);
    }
  });
}

void silu_and_mul(const GatedParams& p) {
  gated(p, [](Vec x) { return silu(x); });
}

void gelu_and_mul(const GatedParams& p) {
  gated(p, [](Vec x) { return gelu(x); });
}

void gelu_tanh_and_mul(const GatedParams& p) {
  gated(p, [](Vec x) { return gelu_tanh(x); });
}

}  // namespace tgi::TGI_ISA
