// How the sum of an output is cut, by the weight's shape alone: kernels for few and for many tokens keep to
// it, so that bits do not depend on the number of tokens.
//
// A chunk is up to 128 columns of one group: its products are summed in ascending order, k16 step by k16
// step, and total = fma(scale, chunk, total). Columns of more than one range have a total each, and these are
// added in ascending order. Ranges end with whole 128 columns.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>

#include "quant/cuda.h"

namespace tgi {

constexpr int kMaxRanges = 8;

// As many as give each SM of a large GPU 12 warps of 16 rows, but so many that 16 tokens' x of a range fits
// in shared memory (H200, one token, 4 · 6 · 8 ranges: 14336 x 4096 15.6 · 14.3 · 14.9 µs, 16 tokens 19.3
// · 18.4 · 26.6; 4096 x 4096 7.3 · – · 8.0).
inline int ranges_of(const QuantMatrix& weight) {
  const int units = std::max(1, (weight.rows + 15) / 16), pieces = (weight.columns + 63) / 64;
  return std::max({1, std::min({kMaxRanges, 1536 / units, pieces / 16}), (pieces + 95) / 96});
}

// The first of `all` 128 columns that is not of a range before.
__host__ __device__ inline int range_border(int all, int range, int ranges) { return all * range / ranges; }

// Calls f.template operator()<kBits, kSteps>() with the k16 steps of a chunk.
template <typename F>
cudaError_t by_chunk(const QuantMatrix& weight, F&& f) {
  const int columns = weight.groups == 1 ? 128 : weight.group_size;
  if (weight.bits == 4) {
    if (columns % 128 == 0) return f.template operator()<4, 8>();
    if (columns % 64 == 0) return f.template operator()<4, 4>();
    if (columns % 32 == 0) return f.template operator()<4, 2>();
    return f.template operator()<4, 1>();
  }
  if (columns % 64 == 0) return f.template operator()<8, 4>();
  if (columns % 32 == 0) return f.template operator()<8, 2>();
  return f.template operator()<8, 1>();
}

}  // namespace tgi
