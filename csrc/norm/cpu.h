// RMSNorm (Zhang and Sennrich 2019, arXiv:1910.07467) and LayerNorm (Ba et al. 2016, arXiv:1607.06450).
#pragma once

#include <cmath>

#include "common/parallel.h"
#include "common/vec.h"
#include "norm/cpu_params.h"

namespace tgi::TGI_ISA {

// Σ x² of one row, in kLanes partial sums added at the end.
TGI_INLINE float sum_of_squares(const float* x, int64_t size) {
  Vec squares{};
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) squares = fma(load(x + i), load(x + i), squares);
  const Vec rest = load_first(x + i, size - i);
  return sum(fma(rest, rest, squares));
}

TGI_INLINE float rms_scale(const float* x, int64_t size, float eps) {
  return 1.0f / __builtin_sqrtf(sum_of_squares(x, size) / static_cast<float>(size) + eps);
}

// out = x · weight / √(mean of x² + eps). out may be x.
TGI_INLINE void rms_norm_row(const float* x, const float* weight, float* out, int64_t size, float eps) {
  const float scale = rms_scale(x, size, eps);
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) store(out + i, load(x + i) * scale * load(weight + i));
  for (; i < size; ++i) out[i] = x[i] * scale * weight[i];
}

// The same numbers, out[i] that of column order[i].
TGI_INLINE void rms_norm_row_in_order(const float* x, const NormParams& p, float* out) {
  const float scale = rms_scale(x, p.hidden, p.eps);
  for (int64_t i = 0; i < p.hidden; ++i) out[i] = x[p.order[i]] * scale * p.weight[p.order[i]];
}

// Σ x, and with it Σ (x − mean)², of one row, in kLanes partial sums added at the end.
TGI_INLINE float mean_of(const float* x, int64_t size) {
  Vec total{};
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) total += load(x + i);
  return sum(total + load_first(x + i, size - i)) / static_cast<float>(size);
}

TGI_INLINE float sum_of_squared_distances(const float* x, int64_t size, float mean) {
  Vec squares{};
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    const Vec distance = load(x + i) - mean;
    squares = fma(distance, distance, squares);
  }
  float total = sum(squares);
  for (; i < size; ++i) total += (x[i] - mean) * (x[i] - mean);
  return total;
}

// out = (x − mean of x) · weight / √(variance of x + eps) + bias. out may be x.
TGI_INLINE void layer_norm_row(const float* x, const NormParams& p, float* out) {
  const float mean = mean_of(x, p.hidden), count = static_cast<float>(p.hidden);
  const float scale = 1.0f / __builtin_sqrtf(sum_of_squared_distances(x, p.hidden, mean) / count + p.eps);
  int64_t i = 0;
  for (; i + kLanes <= p.hidden; i += kLanes) {
    const Vec bias = p.bias == nullptr ? Vec{} : load(p.bias + i);
    store(out + i, fma((load(x + i) - mean) * scale, load(p.weight + i), bias));
  }
  for (; i < p.hidden; ++i) {
    out[i] = (x[i] - mean) * scale * p.weight[i] + (p.bias == nullptr ? 0.0f : p.bias[i]);
  }
}

TGI_INLINE void add_row(float* to, const float* x, int64_t size) {
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) store(to + i, load(to + i) + load(x + i));
  for (; i < size; ++i) to[i] += x[i];
}

void norm(const NormParams& p) {
  const int64_t rows = rows_per_task(p.tokens, p.hidden);
  parallel_for((p.tokens + rows - 1) / rows, [&](int64_t task) {
    for (int64_t token = task * rows; token < p.tokens && token < (task + 1) * rows; ++token) {
      const float* x = p.x + token * p.x_stride;
      float* out = p.out + token * p.hidden;
      float* residual = p.residual == nullptr ? nullptr : p.residual + token * p.hidden;
      if (residual != nullptr) {
        add_row(residual, x, p.hidden);
        x = residual;
      }
      if (p.centred) {
        layer_norm_row(x, p, out);
      } else if (p.order != nullptr) {
        rms_norm_row_in_order(x, p, out);
      } else {
        rms_norm_row(x, p.weight, out, p.hidden, p.eps);
      }
    }
  });
}

}  // namespace tgi::TGI_ISA
