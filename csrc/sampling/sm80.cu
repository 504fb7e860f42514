// Sampling on GPUs without clusters: one CTA reads a row.
#include "common/dispatch.cuh"
#include "common/pdl.cuh"
#include "sampling/greedy.cuh"

namespace tgi {
namespace {

// ---- device ----

constexpr int kThreads = 1024;

template <typename T>
__global__ void __launch_bounds__(kThreads, 1) greedy_row_kernel(const GreedyParams p) {
  __shared__ Best shared[32];
  const int64_t row = blockIdx.x;
  let_next_start();
  wait_for_previous();
  const T* logits = static_cast<const T*>(p.logits) + row * p.stride;
  const Best best = block_best(scan<T, kThreads>(logits, 0, p.vocab, p.aligned), shared);
  if (threadIdx.x == 0) store_best(p, row, best);
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
