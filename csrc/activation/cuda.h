// Launchers of the activation family's CUDA kernels.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/dtype.h"

namespace tgi {

enum class Activation : int { silu, gelu, gelu_tanh };

// out = act(gate) · up, where x holds gate and up side by side. Rows are contiguous, strides are in elements.
struct GatedParams {
  void* out;      // [tokens, inner]
  const void* x;  // [tokens, 2·inner], gate first
  int64_t tokens;
  int inner;
  int64_t out_stride, x_stride;
  Activation activation;
  bool aligned;  // every row of gate, up and out starts on 16 bytes
};

cudaError_t gated_activation(const GatedParams& params, DType dtype, cudaStream_t stream);

}  // namespace tgi
