// Launchers of the quant family's CUDA kernels.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/dtype.h"

namespace tgi {

// A weight is (code − zero) · scale, in the layout of quant/layout.cuh; columns are filled up to whole pieces
// of 64, rows to whole strips.
struct QuantMatrix {
  const void* words;   // [strips, pieces, 64 · 64 · bits / 32] words
  const void* scales;  // [strips, groups, 64] pairs
  int rows, columns;   // out_features, in_features
  int groups, group_size;
  int bits;           // 4 or 8
  DType scale_dtype;  // f16 or bf16
};

// y = x · weightᵀ + bias, then residual + y, each step rounded to the tensors' dtype.
struct QuantMatmulParams {
  void* out;             // [tokens, rows]
  const void* x;         // [tokens, columns]
  const void* bias;      // [rows] or null
  const void* residual;  // like out, or null; may be out itself
  QuantMatrix weight;
  int tokens;
  int64_t out_stride, x_stride, residual_stride;
  bool is_wide;  // rows, out and residual start on 4 elements, and their strides are whole 4 elements
};

// Hopper only. x starts on 16 bytes, its rows lie multiples of 16 bytes apart. group_size is a multiple of
// 16, or there is one group.
cudaError_t quant_matmul(const QuantMatmulParams& params, DType dtype, cudaStream_t stream);

// The same for up to 16 tokens; see sm90_few.cu for how sums are cut. `sms` is the device's.
cudaError_t quant_matmul_few(const QuantMatmulParams& params, DType dtype, int sms, cudaStream_t stream);

// out: [rows, columns], contiguous: the dense matrix, each weight rounded once to `dtype`.
cudaError_t quant_dequantise(const QuantMatrix& weight, void* out, DType dtype, cudaStream_t stream);

// Has all that was launched before be complete for all that is launched after. Products read weights before
// they wait for the kernel before them; a matrix that was just widened has to be there by then.
cudaError_t settle(cudaStream_t stream);

}  // namespace tgi
