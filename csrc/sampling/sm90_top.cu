// The likeliest tokens on Hopper, in order: the search of a draw's top-k, without the draw.
#include "common/dispatch.cuh"
#include "common/pdl.cuh"
#include "sampling/bits.cuh"
#include "sampling/candidates.cuh"
#include "sampling/load.cuh"

namespace tgi {
namespace {

// ---- device ----

// The first `listed` of rank 0's keys, sorted, are the likeliest; they go out with −1 for what is missing.
__device__ __forceinline__ void store_top(const TopLogprobsParams& p, int64_t at, const uint64_t* keys,
                                          int listed, const Best& best) {
  const float log_mass = logf(best.mass);
  for (int i = threadIdx.x; i < p.count; i += kThreads) {
    const bool there = i < listed;
    p.ids[at * p.count + i] = there ? int64_t{token_of(keys[i])} : -1;
    p.logprobs[at * p.count + i] = there ? (score_of(keys[i]) - best.logit) - log_mass : -INFINITY;
  }
}

// Among very many equal scores the border is found bit by bit, and the tokens from it on are listed again.
__device__ __forceinline__ int list_from_bits(const Row& row, Team& team, uint64_t* keys, Shared& shared) {
  const uint64_t border = search_bits(row, team);
  if (team.rank == 0 && threadIdx.x == 0) shared.found = 0;
  team.cluster.sync();
  int* found = team.cluster.map_shared_rank(&shared.found, 0);
  uint64_t* to = team.cluster.map_shared_rank(keys, 0);
  for_scores(row.slice, [&](float score, uint32_t token) {
    const uint64_t key = key_of(score, token);
    if (key >= border) to[atomicAdd(found, 1)] = key;
  });
  team.cluster.sync();
  if (team.rank == 0) sort_keys(keys, shared.found);
  return shared.found;
}

template <typename T>
__global__ void __cluster_dims__(kCluster) __launch_bounds__(kThreads, 2)
    top_kernel(const TopLogprobsParams p, int share) {
  extern __shared__ __align__(16) uint8_t dynamic[];  // [share] scores, [kListed] keys
  __shared__ Shared shared;
  __shared__ float numbers[kNumbers];
  __shared__ int64_t wholes[kWholes];
  Team team{cg::this_cluster(), shared.team, static_cast<int>(blockIdx.x % kCluster), 0};
  const int64_t at = blockIdx.x / kCluster;
  float* scores = reinterpret_cast<float*>(dynamic);
  uint64_t* keys = reinterpret_cast<uint64_t*>(scores + share);
  if (threadIdx.x == 0) numbers[kTopP] = 1.0f, wholes[kTopK] = p.count;

  let_next_start();
  auto started = team.cluster.barrier_arrive();  // a CTA's shared memory may be written to once it runs
  wait_for_previous();
  const T* logits = static_cast<const T*>(p.logits) + at * p.stride;
  const int begin = min(team.rank * share, p.vocab);
  Row row{.slice = {scores, reinterpret_cast<uint32_t*>(keys), begin, min(share, p.vocab - begin)},
          .weights = {},
          .numbers = numbers,
          .wholes = wholes,
          .position = 0,
          .vocab = INT_MAX};  // a count of all tokens is a limit, too
  const Best mine = load_slice(logits, row.slice, p.aligned);
  team.cluster.barrier_wait(static_cast<decltype(started)&&>(started));
  reinterpret_cast<float*>(keys)[threadIdx.x] = mine.logit;  // for find_border
  const Best best = team.reduce(mine, [](const Best& a, const Best& b) { return merge(a, b); });
  row.weights = {best.logit, 1.4426950408889634f};
  int listed = find_border(row, team, keys, shared).listed;
  if (listed == Verdict::kUnknown) listed = list_from_bits(row, team, keys, shared);
  if (team.rank == 0) store_top(p, at, keys, listed, best);
}

}  // namespace

// ---- host ----

cudaError_t top_logprobs_sm90(const TopLogprobsParams& p, DType dtype, cudaStream_t stream) {
  if (p.rows == 0) return cudaSuccess;
  if (p.vocab > kSampleMaxVocab || p.count > kTopMostTokens) return cudaErrorInvalidValue;
  static_assert(kTopMostTokens <= kMostWanted && kTopMostTokens <= kListed);
  const int share = share_of_cta(p.vocab);
  const int shared_bytes = static_cast<int>(share * sizeof(float) + kListed * sizeof(uint64_t));
  return by_dtype(dtype, [&]<typename T>() {
    const cudaError_t error =
        cudaFuncSetAttribute(top_kernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (error != cudaSuccess) return error;
    return launch(top_kernel<T>, dim3(static_cast<unsigned>(p.rows * kCluster)), kThreads, shared_bytes,
                  stream, p, share);
  });
}

}  // namespace tgi
