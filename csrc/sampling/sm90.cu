// Sampling on Hopper: a cluster of CTAs reads a row once and talks through distributed shared memory.
#include <cooperative_groups.h>

#include "common/dispatch.cuh"
#include "common/pdl.cuh"
#include "sampling/greedy.cuh"

namespace tgi {
namespace {

// ---- device ----

constexpr int kThreads = 512;

// kCluster CTAs a row, each with its share of the slices.
template <typename T, int kCluster>
__global__ void __cluster_dims__(kCluster) __launch_bounds__(kThreads, 2)
    greedy_cluster_kernel(const GreedyParams p) {
  constexpr int kOwn = kSlices / kCluster;
  __shared__ Best parts[kOwn * kThreads / 32];
  __shared__ Best all[kSlices];
  const auto cluster = cooperative_groups::this_cluster();
  const int rank = blockIdx.x % kCluster;
  const int64_t row = blockIdx.x / kCluster;
  let_next_start();
  auto started = cluster.barrier_arrive();  // a CTA's shared memory may be written to once it runs
  wait_for_previous();
  Best slices[kOwn];
  read_slices<T, kThreads>(static_cast<const T*>(p.logits) + row * p.stride, p, rank * kOwn, parts, slices);
  cluster.barrier_wait(static_cast<decltype(started)&&>(started));
  if (threadIdx.x == 0) {
    Best* to = cluster.map_shared_rank(all, 0) + rank * kOwn;
    for (int i = 0; i < kOwn; ++i) to[i] = slices[i];
  }
  auto written = cluster.barrier_arrive();
  if (rank != 0) return;
  cluster.barrier_wait(static_cast<decltype(written)&&>(written));
  if (threadIdx.x != 0) return;
  Best best = all[0];
  for (int i = 1; i < kSlices; ++i) best = merge(best, all[i]);
  store_best(p, row, best);
}

// ---- host ----

template <typename T, int kCluster>
cudaError_t launch_greedy(const GreedyParams& p, cudaStream_t stream) {
  return launch(greedy_cluster_kernel<T, kCluster>, dim3(static_cast<unsigned>(p.rows * kCluster)), kThreads,
                0, stream, p);
}

}  // namespace

// The widest clusters that still run at once, two CTAs an SM; beyond that, one CTA reads a row.
cudaError_t greedy_sm90(const GreedyParams& p, DType dtype, cudaStream_t stream) {
  if (p.rows == 0) return cudaSuccess;
  return by_dtype(dtype, [&]<typename T>() {
    if (p.rows <= 32) return launch_greedy<T, 8>(p, stream);
    if (p.rows <= 64) return launch_greedy<T, 4>(p, stream);
    if (p.rows <= 128) return launch_greedy<T, 2>(p, stream);
    return launch_greedy<T, 1>(p, stream);
  });
}

}  // namespace tgi
