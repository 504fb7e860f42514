// Launchers for weights of every kind: runs of columns side by side, each with its own number of bits.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/dtype.h"

namespace tgi {

constexpr int kMaxRuns = 8;

// What codes are multiplied by and shifted by, for each row and group of columns. Rows g and g + 8 of a
// quarter of a strip lie together: as halves of a word, or a word each, and then what shifts them.
enum class Scaling : int {
  half,         // a scale in fp16, a zero point for all groups: (code − zero) · scale
  brain,        // the same in bf16
  half_zeros,   // a word: the scale in fp16, above it the zero point
  brain_zeros,  // the same in bf16
  single,       // the scale in fp32, a zero point for all groups
  offset,       // the scale in fp32, and an offset: code · scale + offset
  zero,         // the scale in fp32, and a zero point, in fp32, too: (code − zero) · scale
};

// Words of two rows and a group.
constexpr int scale_words(Scaling scaling) {
  return scaling <= Scaling::brain ? 1 : scaling <= Scaling::single ? 2 : 4;
}

// Columns are filled up to whole blocks of 128, and groups to those that cover the blocks; their scales are
// zero.
struct QuantRun {
  const uint8_t* words;    // [strips, blocks, 1024 · bits], see kinds.cuh
  const uint32_t* scales;  // [strips, groups, quarters of a strip, 8, scale_words]
  int codes;               // kinds.cuh's Codes
  int columns, groups, group_size;
  int zero;         // of integers whose groups have none of their own
  int first_block;  // of all runs' blocks
  int x_column;     // where its columns begin
};

struct QuantRuns {
  QuantRun run[kMaxRuns];
  int count;
  Scaling scaling;
  int rows, columns;
  int blocks;       // of all runs
  float table[16];  // the numbers of codes of a table
  float
      table_scale;  // that they are multiplied by before they are rounded to an operand, and sums divided by
};

// y = x · weightᵀ + bias, then residual + y, each step rounded to the tensors' dtype.
struct RunsMatmulParams {
  void* out;             // [tokens, rows]
  const void* x;         // [tokens, columns]
  const void* bias;      // [rows] or null
  const void* residual;  // like out, or null; may be out itself
  int tokens;
  int64_t out_stride, x_stride, residual_stride;
  int ranges;  // of columns, which are summed apart, 1 … 8 and at most a block each; 0: as suits the shape
  int least_ctas;  // of a cluster where there are ranges; 0: as few as have room
};

// Hopper only; a file each, to be compiled side by side. x starts on 16 bytes, its rows lie multiples of 16
// bytes apart. group_size is a multiple of 16. `sms` is the device's. tokens > 0.
cudaError_t runs_matmul_bf16(const RunsMatmulParams& params, const QuantRuns& weight, int sms,
                             cudaStream_t stream);
cudaError_t runs_matmul_f16(const RunsMatmulParams& params, const QuantRuns& weight, int sms,
                            cudaStream_t stream);

// out: [rows, columns], contiguous: the dense matrix, each weight rounded to fp32 and then to `dtype`.
cudaError_t runs_dequantise(const QuantRuns& weight, void* out, DType dtype, cudaStream_t stream);

}  // namespace tgi
