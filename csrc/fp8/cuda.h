// Launchers of the fp8 family's CUDA kernels: Hopper only.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "activation/cuda.h"
#include "common/dtype.h"

namespace tgi {

// Columns that share a scale where a row has many, and that the tensor cores sum before fp32 takes over.
constexpr int kFp8Block = 128;

// codes = x / scale in e4m3, the nearest and at most ±448. Strides are in elements, rows are contiguous.
struct QuantiseParams {
  void* codes;         // [tokens, columns] e4m3
  float* scales;       // [tokens], or [tokens, scale_stride] in blocks: zeros past the last
  const void* x;       // [tokens, columns]
  const float* fixed;  // the one scale of all, or null: the largest number of a row, or block, becomes 448
  int tokens, columns;
  int64_t code_stride, x_stride, scale_stride;
  float bound;  // larger numbers count as this one
  bool in_blocks;
};

cudaError_t quantise_e4m3(const QuantiseParams& params, DType dtype, cudaStream_t stream);

// Rows of at most this many columns are normed and rounded by one kernel.
constexpr int kMaxNormColumns = 32768;

// The same of x · rsqrt(mean(x²) + eps) · weight, rounded to x's type first. Every row starts on 16 bytes.
struct NormQuantiseParams {
  QuantiseParams rounding;  // of its x
  const void* weight;       // [columns]
  float eps;
};

cudaError_t norm_quantise_e4m3(const NormQuantiseParams& params, DType dtype, cudaStream_t stream);

// y = (x · weightᵀ with its scales) + bias, then either residual + y or act(gate) · up over the halves of y,
// each step rounded to the dtype of out. Strides are in elements, inner dimensions are contiguous.
struct Fp8Params {
  void* out;                   // [tokens, out_features], or [tokens, out_features / 2] when gated
  const void* x;               // [tokens, in_features] e4m3
  const float* x_scales;       // as of QuantiseParams
  const void* weight;          // [out_features, in_features] e4m3; gated: gate rows, then up rows
  const float* weight_scales;  // [out_features], or [out_features / 128, scale_stride] in blocks
  const void* bias;            // [out_features] or null
  const void* residual;        // like out, or null; may be out itself
  int tokens, in_features, out_features;
  int scale_stride;  // in blocks, of both: from ⌈in_features / 128⌉ up, a multiple of 4, with zeros past the
                     // last
  int64_t out_stride, x_stride, weight_stride, residual_stride;
  bool in_blocks;
  bool is_gated;
  Activation activation;  // of the gate
  int tile;               // of those that fp8/gemm.cuh lists, or less than 0: the best one for the shape
};

// Needs x and weight at 16 bytes, with strides and in_features of whole 16 bytes; in blocks also whole blocks
// of features, of gate and up each.
cudaError_t fp8_matmul(const Fp8Params& params, DType dtype, cudaStream_t stream);

}  // namespace tgi
