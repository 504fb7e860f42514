// Sampling on GPUs without clusters: one CTA reads a row.
#include "common/dispatch.cuh"
#include "common/pdl.cuh"
#include "sampling/greedy.cuh"

namespace tgi {
namespace {

// ---- device ----

constexpr int kThreads = 512;

template <typename T>
__global__ void __launch_bounds__(kThreads, 2) greedy_row_kernel(const GreedyParams p) {
  __shared__ Best parts[kSlices * kThreads / 32];
  const int64_t row = blockIdx.x;
  let_next_start();
  wait_for_previous();
  Best slices[kSlices];
  read_slices<T, kThreads>(static_cast<const T*>(p.logits) + row * p.stride, p, 0, parts, slices);
  if (threadIdx.x != 0) return;
  for (int i = 1; i < kSlices; ++i) slices[0] = merge(slices[0], slices[i]);
  store_best(p, row, slices[0]);
}

}  // namespace

// ---- host ----

cudaError_t greedy_sm80(const GreedyParams& p, DType dtype, cudaStream_t stream) {
  if (p.rows == 0) return cudaSuccess;
  return by_dtype(dtype, [&]<typename T>() {
    return launch(greedy_row_kernel<T>, dim3(static_cast<unsigned>(p.rows)), kThreads, 0, stream, p);
  });
}

}  // namespace tgi
