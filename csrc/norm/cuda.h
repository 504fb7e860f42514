// Launchers of the norm family's CUDA kernels.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/dtype.h"

namespace tgi {

// RMSNorm: out = x · rsqrt(mean(x²) + eps) · weight, row by row. Centred, LayerNorm: with x less its mean,
// plus bias. With a residual: residual += x first (stored rounded), and the norm is of what was stored. With
// an order, of RMSNorm alone: the row comes out as row[order[0]], row[order[1]], …, of the same bits, and out
// is none of the inputs. All of one dtype; rows are contiguous, strides are in elements.
struct NormParams {
  void* out;             // [tokens, hidden]
  const void* x;         // [tokens, hidden]
  void* residual;        // [tokens, hidden] or null
  const void* weight;    // [hidden]
  const void* bias;      // [hidden] or null; RMSNorm has none
  const int32_t* order;  // [hidden] or null; an index out of range gives NaN
  int64_t tokens;
  int hidden;
  int64_t out_stride, x_stride, residual_stride;
  float eps;
  bool centred;
  bool aligned;  // every row starts on 16 bytes and hidden is a multiple of the vector
};

cudaError_t norm(const NormParams& params, DType dtype, cudaStream_t stream);

}  // namespace tgi
