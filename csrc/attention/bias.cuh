// Attention's bias in its kernels: those that take one are instances of their own, by their parameters.
#pragma once

#include "attention/bias.h"
#include "common/softmax.cuh"

namespace tgi {

template <typename Params>
constexpr bool has_bias = requires(const Params& p) { p.bias; };

// The numbers of a query, by its row of q, and head.
template <typename Params>
__device__ __forceinline__ const float* bias_of(const Params& p, int64_t token, int head) {
  if constexpr (has_bias<Params>) {
    return p.bias.at + token * p.bias.token_stride + head * p.bias.head_stride;
  } else {
    return nullptr;
  }
}

// A score with its bias; a key that comes after the query gets some number, and is hidden afterwards.
template <typename Params>
__device__ __forceinline__ float with_bias_of(const Params& p, const float* numbers, float score, int key,
                                              int distance) {
  if constexpr (has_bias<Params>) {
    const int column = min(p.bias.by_distance ? max(-distance, 0) : key, p.bias.columns - 1);
    return __fmaf_rn(numbers[column], kLog2e, score);
  } else {
    return score;
  }
}

}  // namespace tgi
