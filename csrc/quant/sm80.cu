// The dense matrix of a quantised one, for GPUs and shapes that the fused product does not serve.
#include "common/pdl.cuh"
#include "quant/cuda.h"
#include "quant/layout.cuh"

namespace tgi {
namespace {

// ---- device ----

constexpr int kThreads = 128;

// A block widens one piece of one strip, as the four warps of a product would.
template <typename T, typename S, int kBits>
__global__ void dequantise_kernel(QuantMatrix weight, int pieces, T* out /* [rows, columns] */) {
  using Lane = Widener<T, S, kBits>;
  const int strip = blockIdx.y, piece = blockIdx.x, lane = threadIdx.x % 32;
  const int row = strip * kStrip + threadIdx.x / 32 * 16 + lane / 4;
  const auto* words = static_cast<const uint32_t*>(weight.words) +
                      (static_cast<int64_t>(strip) * pieces + piece) * (kPieceBytes<kBits> / 4);
  const auto* pairs =
      static_cast<const uint32_t*>(weight.scales) + static_cast<int64_t>(strip) * weight.groups * kStrip;
  wait_for_previous();
  let_next_start();
  constexpr int kSteps = 4 / Lane::kWords;  // that one load of 16 bytes feeds
  for (int step = 0; step < kPiece / 16; ++step) {
    const int column = piece * kPiece + step * 16;
    if (column >= weight.columns) return;
    // A group may end inside a step where columns are few; the lane's pairs are then those of its own
    // columns.
    for (int c = 0; c < 2; ++c) {
      const int first = column + 8 * c + lane % 4 * 2;
      Lane widener;
      const int group = min(first / weight.group_size, weight.groups - 1);
      for (int h = 0; h < 2; ++h) {
        widener.load(h, pairs[group * kStrip + (row + 8 * h) % kStrip]);
      }
      uint32_t fragment[4];
      widener.widen(fragment,
                    words + (step / kSteps * kThreads + threadIdx.x) * 4 + step % kSteps * Lane::kWords);
      for (int h = 0; h < 2; ++h) {
        const auto both = as<typename TwoOf<T>::type>(fragment[2 * c + h]);
        T* to = out + static_cast<int64_t>(row + 8 * h) * weight.columns + first;
        if (row + 8 * h >= weight.rows) continue;
        if (first < weight.columns) to[0] = both.x;
        if (first + 1 < weight.columns) to[1] = both.y;
      }
    }
  }
}

}  // namespace

// ---- host ----

cudaError_t quant_dequantise(const QuantMatrix& weight, void* out, DType dtype, cudaStream_t stream) {
  if (weight.rows == 0 || weight.columns == 0) return cudaSuccess;
  const int pieces = (weight.columns + kPiece - 1) / kPiece;
  const dim3 grid(pieces, (weight.rows + kStrip - 1) / kStrip);
  return by_operand_and_scale(dtype, weight.scale_dtype, [&]<typename T, typename S>() {
    const auto kernel = weight.bits == 4 ? dequantise_kernel<T, S, 4> : dequantise_kernel<T, S, 8>;
    return launch(kernel, grid, kThreads, 0, stream, weight, pieces, static_cast<T*>(out));
  });
}

}  // namespace tgi
