// The dense matrix of a quantised one, for GPUs and shapes that the fused product does not serve.
#include "common/pdl.cuh"
#include "quant/cuda.h"
#include "quant/layout.cuh"

namespace tgi {
namespace {

// ---- device ----

constexpr int kThreads = 128;
constexpr int kTilePieces = 2;  // rows of a tile are whole lines of memory
constexpr int kTileColumns = kTilePieces * kPiece, kTileRow = kTileColumns + 8;  // elements: see `widen_tile`

// Where a lane's columns are among groups. They come in ascending order, so nothing is divided but the first.
struct GroupCursor {
  int group, column, size;  // the column counts from the group's first

  __device__ __forceinline__ GroupCursor(int first, int group_size)
      : group(first / group_size), column(first % group_size), size(group_size) {}

  __device__ __forceinline__ void advance(int columns) {
    column += columns;
    while (column >= size) column -= size, ++group;
  }
};

// Widens a thread's part of a tile into shared memory. Eight elements between its rows and the next multiple
// of 64 have the rows of a store's lanes begin in banks of their own.
template <typename T, typename S, int kBits>
__device__ __forceinline__ void widen_tile(const QuantMatrix& weight, int strip, int first_piece, int pieces,
                                           T* tile) {
  using Lane = Widener<T, S, kBits>;
  constexpr int kSteps = 4 / Lane::kWords;      // that one load of 16 bytes feeds
  constexpr int kLoads = kPiece / 16 / kSteps;  // of a piece
  const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane / 4;
  const auto* from = static_cast<const uint4*>(weight.words) +
                     (static_cast<int64_t>(strip) * pieces + first_piece) * (kPieceBytes<kBits> / 16) +
                     threadIdx.x;
  const auto* pairs = static_cast<const uint32_t*>(weight.scales) +
                      static_cast<int64_t>(strip) * weight.groups * kStrip + row;
  uint4 loads[kTilePieces * kLoads] = {};
#pragma unroll
  for (int i = 0; i < kTilePieces * kLoads; ++i) {
    if (first_piece + i / kLoads < pieces) loads[i] = from[i * kThreads];
  }
  GroupCursor at(first_piece * kPiece + lane % 4 * 2, weight.group_size);
  Lane widener;
  int loaded = -1;
#pragma unroll
  for (int step = 0; step < kTileColumns / 16; ++step) {
    const uint4 load = loads[step / kSteps];
    const uint32_t words[4] = {load.x, load.y, load.z, load.w};
    // A group may end inside a step where columns are few; the lane's pairs are then those of its own
    // columns.
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int group = min(at.group, weight.groups - 1);
      if (group != loaded) {
#pragma unroll
        for (int h = 0; h < 2; ++h) widener.load(h, __ldg(pairs + group * kStrip + 8 * h));
        loaded = group;
      }
      uint32_t fragment[4];
      widener.widen(fragment, words + step % kSteps * Lane::kWords);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        *reinterpret_cast<uint32_t*>(tile + (row + 8 * h) * kTileRow + step * 16 + 8 * c + lane % 4 * 2) =
            fragment[2 * c + h];
      }
      at.advance(8);
    }
  }
}

// A block widens 128 columns of one strip, as the four warps of a product would, and stores whole rows of
// them.
template <typename T, typename S, int kBits>
__global__ void dequantise_kernel(QuantMatrix weight, int pieces, T* out /* [rows, columns] */) {
  __shared__ __align__(16) T tile[kStrip * kTileRow];
  const int strip = blockIdx.y, first_piece = blockIdx.x * kTilePieces;
  wait_for_previous();
  widen_tile<T, S, kBits>(weight, strip, first_piece, pieces, tile);
  __syncthreads();
  const int rows = min(kStrip, weight.rows - strip * kStrip);
  const int columns = min(kTileColumns, weight.columns - first_piece * kPiece);
  T* to = out + static_cast<int64_t>(strip) * kStrip * weight.columns + first_piece * kPiece;
  if (columns == kTileColumns && weight.columns % 8 == 0) {
    for (int i = threadIdx.x; i < rows * (kTileColumns / 8); i += kThreads) {
      const int line = i / (kTileColumns / 8), eight = i % (kTileColumns / 8) * 8;
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
  const dim3 grid((pieces + kTilePieces - 1) / kTilePieces, (weight.rows + kStrip - 1) / kStrip);
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
