// Root mean square normalisation. Zhang and Sennrich 2019, arXiv:1910.07467.
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

// out = x · weight / √(mean of x² + eps). out may be x.
TGI_INLINE void rms_norm_row(const float* x, const float* weight, float* out, int64_t size, float eps) {
  const float scale = 1.0f / __builtin_sqrtf(sum_of_squares(x, size) / static_cast<float>(size) + eps);
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) store(out + i, load(x + i) * scale * load(weight + i));
  for (; i < size; ++i) out[i] = x[i] * scale * weight[i];
}

TGI_INLINE void add_row(float* to, const float* x, int64_t size) {
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) store(to + i, load(to + i) + load(x + i));
  for (; i < size; ++i) to[i] += x[i];
}

void rms_norm(const RmsNormParams& p) {
  const int64_t rows = rows_per_task(p.tokens, p.hidden);
  parallel_for((p.tokens + rows - 1) / rows, [&](int64_t task) {
    for (int64_t token = task * rows; token < p.tokens && token < (task + 1) * rows; ++token) {
      const float* x = p.x + token * p.x_stride;
      float* residual = p.residual == nullptr ? nullptr : p.residual + token * p.hidden;
      if (residual != nullptr) add_row(residual, x, p.hidden);
      rms_norm_row(residual == nullptr ? x : residual, p.weight, p.out + token * p.hidden, p.hidden, p.eps);
    }
  });
}

}  // namespace tgi::TGI_ISA
