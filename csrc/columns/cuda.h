// Launcher of the columns family's CUDA kernel.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace tgi {

// out[t, i] = x[t, order[i]]; all bits set, a NaN, for an index out of range. Rows of elements of 2 or 4
// bytes are contiguous, strides are in elements.
struct GatherParams {
  void* out;             // [tokens, outs]
  const void* x;         // [tokens, columns]
  const int32_t* order;  // [outs], constant while kernels run
  int64_t tokens;
  int columns, outs;
  int64_t x_stride, out_stride;
  int element_bytes;
  bool aligned;  // every row, and order, starts on 16 bytes, and columns and outs are whole vectors
};

cudaError_t gather_columns(const GatherParams& params, cudaStream_t stream);

}  // namespace tgi
