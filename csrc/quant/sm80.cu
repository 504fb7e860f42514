// The dense matrix of a quantised one, for GPUs and shapes that the fused product does not serve.
#include "common/pdl.cuh"
#include "quant/cuda.h"
#include "quant/layout.cuh"

namespace tgi {
namespace {

// ---- device ----

constexpr int kThreads = 128;
constexpr int kTileRow = kPiece + 8;  // elements; the rows of a store's lanes begin in banks of their own

// A block widens one piece of one strip, as the four warps of a product would, and stores whole rows of it.
template <typename T, typename S, int kBits>
__global__ void dequantise_kernel(QuantMatrix weight, int pieces, T* out /* [rows, columns] */) {
  using Lane = Widener<T, S, kBits>;
  constexpr int kSteps = 4 / Lane::kWords;  // that one load of 16 bytes feeds
  __shared__ __align__(16) T tile[kStrip * kTileRow];
  const int strip = blockIdx.y, piece = blockIdx.x, lane = threadIdx.x % 32;
  const int row = threadIdx.x / 32 * 16 + lane / 4;
  const auto* loads = static_cast<const uint4*>(weight.words) +
                      (static_cast<int64_t>(strip) * pieces + piece) * (kPieceBytes<kBits> / 16);
  const auto* pairs =
      static_cast<const uint32_t*>(weight.scales) + static_cast<int64_t>(strip) * weight.groups * kStrip;
  wait_for_previous();
#pragma unroll
  for (int step = 0; step < kPiece / 16; ++step) {
    const uint4 load = loads[step / kSteps * kThreads + threadIdx.x];
    const uint32_t words[4] = {load.x, load.y, load.z, load.w};
    // A group may end inside a step where columns are few; the lane's pairs are then those of its own
    // columns.
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int column = step * 16 + 8 * c + lane % 4 * 2;
      const int group = min((piece * kPiece + column) / weight.group_size, weight.groups - 1);
      Lane widener;
      for (int h = 0; h < 2; ++h) widener.load(h, pairs[group * kStrip + row + 8 * h]);
      uint32_t fragment[4];
      widener.widen(fragment, words + step % kSteps * Lane::kWords);
      for (int h = 0; h < 2; ++h) {
        *reinterpret_cast<uint32_t*>(tile + (row + 8 * h) * kTileRow + column) = fragment[2 * c + h];
      }
    }
  }
  __syncthreads();
  const int rows = min(kStrip, weight.rows - strip * kStrip);
  const int columns = min(kPiece, weight.columns - piece * kPiece);
  T* to = out + static_cast<int64_t>(strip) * kStrip * weight.columns + piece * kPiece;
  if (columns == kPiece && weight.columns % 8 == 0) {
    for (int i = threadIdx.x; i < rows * (kPiece / 8); i += kThreads) {
      const int line = i / (kPiece / 8), eight = i % (kPiece / 8) * 8;
      *reinterpret_cast<uint4*>(to + static_cast<int64_t>(line) * weight.columns + eight) =
          *reinterpret_cast<const uint4*>(tile + line * kTileRow + eight);
    }
    return;
  }
  for (int i = threadIdx.x; i < rows * columns; i += kThreads) {
    const int line = i / columns, column = i % columns;
    to[static_cast<int64_t>(line) * weight.columns + column] = tile[line * kTileRow + column];
  }
}

__global__ void nothing() {}

}  // namespace

// ---- host ----

cudaError_t quant_dequantise(const QuantMatrix& weight, void* out, DType dtype, cudaStream_t stream) {
  if (weight.rows == 0 || weight.columns == 0) return cudaSuccess;
  const int pieces = (weight.columns + kPiece - 1) / kPiece;
  const dim3 grid(pieces, (weight.rows + kStrip - 1) / kStrip);
  const cudaError_t error = by_operand_and_scale(dtype, weight.scale_dtype, [&]<typename T, typename S>() {
    const auto kernel = weight.bits == 4 ? dequantise_kernel<T, S, 4> : dequantise_kernel<T, S, 8>;
    return launch(kernel, grid, kThreads, 0, stream, weight, pieces, static_cast<T*>(out));
  });
  return error ? error : settle(stream);
}

cudaError_t settle(cudaStream_t stream) {
  nothing<<<1, 1, 0, stream>>>();
  return cudaGetLastError();
}

}  // namespace tgi
