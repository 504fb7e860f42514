// Launchers of the matmul family's CUDA kernels.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "activation/cuda.h"
#include "common/dtype.h"

namespace tgi {

// y = x · weightᵀ + bias, then either residual + y or act(gate) · up over the halves of y, each step rounded
// to the tensors' dtype as the separate ops would. f16 and bf16; strides are in elements, inner dimensions
// are contiguous.
struct MatmulParams {
  void* out;             // [tokens, out_features], or [tokens, out_features / 2] when gated
  const void* x;         // [tokens, in_features]
  const void* weight;    // [out_features, in_features]; gated: gate rows, then up rows
  const void* bias;      // [out_features] or null
  const void* residual;  // like out, or null; may be out itself
  int tokens, in_features, out_features;
  int64_t out_stride, x_stride, weight_stride, residual_stride;
  bool is_gated;
  Activation activation;  // of the gate
};

// Hopper only, and of one result, bit for bit: the first for few tokens, the second for many. Both need
// 16-byte aligned x and weight whose strides are multiples of 16 bytes; in_features may be any number.
cudaError_t skinny_matmul(const MatmulParams& params, DType dtype, cudaStream_t stream);
cudaError_t gemm_matmul(const MatmulParams& params, DType dtype, cudaStream_t stream);

}  // namespace tgi
