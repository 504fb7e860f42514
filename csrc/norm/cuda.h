// Launchers of the norm family's CUDA kernels.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/dtype.h"

namespace tgi {

// out = x · rsqrt(mean(x²) + eps) · weight, row by row. With a residual: residual += x first (stored
// rounded), and the norm is of what was stored. All of one dtype; rows are contiguous, strides are in
// elements.
struct RmsNormParams {
  void* out;           // [tokens, hidden]
  const void* x;       // [tokens, hidden]
  void* residual;      // [tokens, hidden] or null
  const void* weight;  // [hidden]
  int64_t tokens;
  int hidden;
  int64_t out_stride, x_stride, residual_stride;
  float eps;
  bool aligned;  // every row starts on 16 bytes and hidden is a multiple of the vector
};

cudaError_t rms_norm(const RmsNormParams& params, DType dtype, cudaStream_t stream);

}  // namespace tgi
