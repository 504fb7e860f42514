// Launchers of the sampling family's CUDA kernels.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/dtype.h"

namespace tgi {

// The likeliest token of each row (the lowest id of several), and its log-probability. NaN logits are never chosen; a
// row that holds one, or nothing above −∞, has logprob NaN (id 0 if nothing can be chosen).
struct GreedyParams {
  const void* logits;  // [rows, vocab]
  int64_t* ids;        // [rows]
  float* logprobs;     // [rows]
  int64_t rows;
  int vocab;
  int64_t stride;  // elements between rows
  bool aligned;    // every row starts on 16 bytes and vocab is a multiple of the vector
};

// One CTA a row.
cudaError_t greedy_sm80(const GreedyParams& params, DType dtype, cudaStream_t stream);
// A cluster of eight CTAs a row.
cudaError_t greedy_sm90(const GreedyParams& params, DType dtype, cudaStream_t stream);

}  // namespace tgi
