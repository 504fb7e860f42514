// Rotary position embedding, and the write of keys and values into their pages. Su et al. 2021,
// arXiv:2104.09864.
#pragma once

#include "common/parallel.h"
#include "common/vec.h"
#include "norm/cpu.h"
#include "rope/cpu_params.h"

namespace tgi::TGI_ISA {

// One head: pair (a, b) becomes (a·cos − b·sin, b·cos + a·sin). What lies past rot_dim stays. to may be from.
TGI_INLINE void rotate_head(const float* from, float* to, const float* cos_sin, const RotaryParams& p) {
  const int64_t half = p.rot_dim / 2;
  const float* sin = cos_sin + half;
  int64_t i = 0;
  if (!p.interleaved) {
    for (; i + kLanes <= half; i += kLanes) {
      const Vec a = load(from + i), b = load(from + half + i), c = load(cos_sin + i), s = load(sin + i);
      store(to + i, a * c - b * s);
      store(to + half + i, b * c + a * s);
    }
  }
  for (; i < half; ++i) {
    const int64_t at_a = p.interleaved ? 2 * i : i, at_b = p.interleaved ? 2 * i + 1 : i + half;
    const float a = from[at_a], b = from[at_b];
    to[at_a] = a * cos_sin[i] - b * sin[i];
    to[at_b] = b * cos_sin[i] + a * sin[i];
  }
  for (i = p.rot_dim; i < p.head_dim; ++i) to[i] = from[i];
}

TGI_INLINE void rotate_token(const RotaryParams& p, int64_t token) {
  constexpr int64_t kPageTokens = 16;
  const float* cos_sin = p.cos_sin + p.positions[token] * p.rot_dim;
  for (int64_t head = 0; head < p.heads; ++head) {
    float* q = p.q + token * p.q_stride + head * p.head_dim;
    if (p.q_norm != nullptr) rms_norm_row(q, p.q_norm, q, p.head_dim, p.eps);
    rotate_head(q, q, cos_sin, p);
  }
  const int64_t slot = p.slots[token];
  if (slot < 0) return;
  const int64_t head_elements = kPageTokens * p.head_dim;
  float* page =
      p.kv_pages + slot / kPageTokens * 2 * p.kv_heads * head_elements + slot % kPageTokens * p.head_dim;
  for (int64_t head = 0; head < p.kv_heads; ++head) {
    const float* k = p.k + token * p.k_stride + head * p.head_dim;
    float* to = page + head * head_elements;
    if (p.k_norm != nullptr) rms_norm_row(k, p.k_norm, to, p.head_dim, p.eps);
    rotate_head(p.k_norm != nullptr ? to : k, to, cos_sin, p);
    std::memcpy(page + (p.kv_heads + head) * head_elements, p.v + token * p.v_stride + head * p.head_dim,
                sizeof(float) * static_cast<size_t>(p.head_dim));
  }
}

void rotary_kv_write(const RotaryParams& p) {
  const int64_t rows = rows_per_task(p.tokens, (p.heads + 2 * p.kv_heads) * p.head_dim);
  parallel_for((p.tokens + rows - 1) / rows, [&](int64_t task) {
    for (int64_t token = task * rows; token < p.tokens && token < (task + 1) * rows; ++token)
      rotate_token(p, token);
  });
}

}  // namespace tgi::TGI_ISA
