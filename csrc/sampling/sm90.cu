// Sampling on Hopper: a cluster of CTAs reads a row once and talks through distributed shared memory.
#include <cooperative_groups.h>

#include "common/dispatch.cuh"
#include "common/pdl.cuh"
#include "sampling/greedy.cuh"

namespace tgi {
namespace {

// ---- device ----

constexpr int kThreads = 512;
constexpr int kCluster = 8;  // the most that every part of the chip can hold; one row then reads through eight SMs

// A CTA reads an eighth of the row, whatever the batch: the order of the sums follows from the vocabulary alone.
template <typename T>
__global__ void __cluster_dims__(kCluster) __launch_bounds__(kThreads, 2) greedy_cluster_kernel(const GreedyParams p) {
  __shared__ Best shared[32];
  __shared__ Best parts[kCluster];
  const auto cluster = cooperative_groups::this_cluster();
  const int rank = blockIdx.x % kCluster;
  const int64_t row = blockIdx.x / kCluster;
  let_next_start();
  auto started = cluster.barrier_arrive();  // a CTA's shared memory may be written to once it runs
  wait_for_previous();
  const T* logits = static_cast<const T*>(p.logits) + row * p.stride;
  const int share = (p.vocab + kCluster * kVec<T> - 1) / (kCluster * kVec<T>) * kVec<T>;
  const int begin = min(rank * share, p.vocab), end = min(begin + share, p.vocab);
  const Best best = block_best(scan<T, kThreads>(logits, begin, end, p.aligned), shared);
  cluster.barrier_wait(static_cast<decltype(started)&&>(started));
  if (threadIdx.x == 0) *cluster.map_shared_rank(&parts[rank], 0) = best;
  auto written = cluster.barrier_arrive();
  if (rank != 0) return;
  cluster.barrier_wait(static_cast<decltype(written)&&>(written));
  if (threadIdx.x != 0) return;
  Best all = parts[0];
  for (int i = 1; i < kCluster; ++i) all = merge(all, parts[i]);
  store_best(p, row, all);
}

}  // namespace

// ---- host ----

cudaError_t greedy_sm90(const GreedyParams& p, DType dtype, cudaStream_t stream) {
  if (p.rows == 0) return cudaSuccess;
  return by_dtype(dtype, [&]<typename T>() {
    return launch(greedy_cluster_kernel<T>, dim3(static_cast<unsigned>(p.rows * kCluster)), kThreads, 0, stream, p);
  });
}

}  // namespace tgi
