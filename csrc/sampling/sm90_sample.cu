// Drawing tokens on Hopper: a cluster of eight CTAs reads a row once, keeps it in shared memory, and finds
// there what the filters leave. The definition is in tgi_kernels/sampling.py, the schedule in
// docs/kernels/sampling.md.
#include "common/dispatch.cuh"
#include "common/pdl.cuh"
#include "sampling/bins.cuh"
#include "sampling/bits.cuh"
#include "sampling/candidates.cuh"
#include "sampling/load.cuh"

namespace tgi {
namespace {

// ---- device ----

__device__ __forceinline__ Best best_of_scores(const Slice& slice) {
  Best best;
  for_scores(slice, [&](float score, uint32_t token) {
    if (score > best.logit) best.logit = score, best.id = static_cast<int>(token);
  });
  return best;
}

// ---- the draw ----

__device__ __forceinline__ Best64 offer(const Row& row, const Best64& best, float score, uint32_t token,
                                        uint32_t word) {
  const double value = static_cast<double>(score) + row.temperature() * gumbel(word);
  return better(best, {value, static_cast<int>(token), 0});
}

// Draws among the sorted candidates, `listed` of them. Rank 0 alone; the result is in thread 0.
__device__ __forceinline__ int draw_listed(const Row& row, const uint64_t* keys, int listed, uint64_t border,
                                           Shared& shared) {
  Best64 best{-INFINITY, INT_MAX, 0};
  const Noise noise = row.noise();
  for (int i = threadIdx.x; i < listed; i += kThreads) {
    if (keys[i] < border) continue;
    const uint32_t token = token_of(keys[i]);
    best = offer(row, best, score_of(keys[i]), token, noise.word(token));
  }
  for (int offset = 16; offset > 0; offset /= 2) best = better(best, Team::shuffle(best, offset));
  Best64* parts = reinterpret_cast<Best64*>(shared.team.parts);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = best;
  __syncthreads();
  for (int i = 0; i < kWarps; ++i) best = better(best, parts[i]);
  return best.id;
}

// Draws among all tokens that are kept. A token whose score lies far below the best so far wins only with a
// small word: few need the logarithms. The likeliest token, which every filter keeps but typical-p, sets the
// pace.
__device__ __forceinline__ int draw_all(const Row& row, Team& team, const Kept& kept, int likeliest) {
  Best64 best{-INFINITY, INT_MAX, 0};
  const Noise noise = row.noise();
  if (kept.has(row, row.weights.largest, likeliest)) {
    best = offer(row, best, row.weights.largest, likeliest, noise.word(likeliest));
  }
  for (int at = static_cast<int>(threadIdx.x) * 4; at < row.slice.size; at += kThreads * 4) {
    const float4 four = *reinterpret_cast<const float4*>(row.slice.scores + at);
    const uint32_t first = static_cast<uint32_t>(row.slice.begin + at);
    const uint4 words = noise.words(first / 4);
    // score + T·g > best needs u < e^−(best − score)/T; the margins cover fp32's rounding.
    const float value = static_cast<float>(best.value), scale = row.weights.scale;
    const float reach = 32.001f - value * scale + fabsf(value) * scale * 5e-7f;
    const auto may_win = [&](float score, uint32_t word) {
      return score > -INFINITY && static_cast<float>(word) <= exp2f(score * scale + reach) + 2.0f;
    };
    int able = may_win(four.x, words.x) | may_win(four.y, words.y) << 1 | may_win(four.z, words.z) << 2 |
               may_win(four.w, words.w) << 3;
    for (; able != 0; able &= able - 1) {
      const int i = __ffs(able) - 1;
      if (!kept.has(row, pick(four, i), first + i)) continue;
      best = offer(row, best, pick(four, i), first + i, pick(words, i));
    }
  }
  return team.reduce(best, [](const Best64& a, const Best64& b) { return better(a, b); }).id;
}

// ---- a row ----

__device__ __forceinline__ int choose(const Row& row, Team& team, uint64_t* keys, Bins& bins, int likeliest,
                                      Shared& shared) {
  Kept kept;
  Verdict verdict{0, Verdict::kUnlisted};
  if (row.top_k() > 0 || row.top_p() < 1.0f) {
    verdict.listed = Verdict::kUnknown;
    if (row.top_k() <= kMostWanted) verdict = find_border(row, team, keys, shared);
    if (verdict.listed == Verdict::kUnknown) verdict = search_bins(row, team, keys, bins, shared);
    kept.border = verdict.listed == Verdict::kUnknown ? search_bits(row, team) : verdict.border;
  }
  if (row.numbers[kMinP] > 0.0f) {
    const uint64_t border = min_p_border(row.weights.largest, row.temperature(), row.numbers[kMinP]);
    kept.border = kept.border < border ? border : kept.border;
  }
  if (row.numbers[kTypicalP] < 1.0f) {
    keep_typical(row, team, kept);
  } else if (verdict.listed >= 0) {
    return team.rank == 0 ? draw_listed(row, keys, verdict.listed, kept.border, shared) : 0;
  }
  return draw_all(row, team, kept, likeliest);
}

// Nothing is done in another CTA's shared memory after the last barrier of the cluster: CTAs may leave as
// they end.
template <typename T>
__global__ void __cluster_dims__(kCluster) __launch_bounds__(kThreads, 2)
    sample_kernel(const SampleParams p, int share) {
  extern __shared__ __align__(16) uint8_t dynamic[];  // [share] scores, [kListed] keys, bins
  __shared__ Shared shared;
  Team team{cg::this_cluster(), shared.team, static_cast<int>(blockIdx.x % kCluster), 0};
  const int64_t at = blockIdx.x / kCluster;
  float* scores = reinterpret_cast<float*>(dynamic);
  uint64_t* keys = reinterpret_cast<uint64_t*>(scores + share);
  Bins& bins = *reinterpret_cast<Bins*>(keys + kListed);

  let_next_start();
  auto started = team.cluster.barrier_arrive();  // a CTA's shared memory may be written to once it runs
  wait_for_previous();
  const Draw draw(p, at);
  const int64_t place = p.places ? p.places[at] : at;
  const T* logits = static_cast<const T*>(p.logits) + place * p.stride;
  const int begin = min(team.rank * share, p.vocab);
  Row row{.slice = {scores, reinterpret_cast<uint32_t*>(keys), begin, min(share, p.vocab - begin)},
          .weights = {},
          .numbers = draw.numbers,
          .wholes = draw.wholes,
          .position = static_cast<uint32_t>(draw.position),
          .vocab = p.vocab};
  const auto merge_all = [&](const Best& mine) {
    reinterpret_cast<float*>(keys)[threadIdx.x] = mine.logit;  // for find_border
    return team.reduce(mine, [](const Best& a, const Best& b) { return merge(a, b); });
  };
  Best mine = load_slice(logits, row.slice, p.aligned);
  team.cluster.barrier_wait(static_cast<decltype(started)&&>(started));
  Best best = merge_all(mine);
  if (threadIdx.x == 0) shared.raw_logit = best.logit, shared.raw_mass = best.mass;
  if (draw.adjusted()) {
    adjust(draw, row.slice, logits);
    mine = best_of_scores(row.slice);
    best = merge_all(mine);
  }

  int id = best.id;
  if (best.logit > -INFINITY && best.logit < INFINITY && row.temperature() > 0.0) {
    row.weights = {best.logit, static_cast<float>(1.4426950408889634 / row.temperature())};
    id = choose(row, team, keys, bins, best.id, shared);
  }
  if (team.rank == 0 && threadIdx.x == 0) {
    const bool chosen = best.logit > -INFINITY;
    p.ids[place] = chosen ? id : 0;
    p.logprobs[place] = chosen ? (to_float(logits[id]) - shared.raw_logit) - logf(shared.raw_mass) : NAN;
  }
}

}  // namespace

// ---- host ----

cudaError_t sample_sm90(const SampleParams& p, DType dtype, cudaStream_t stream) {
  if (p.draws == 0) return cudaSuccess;
  if (p.vocab > kSampleMaxVocab) return cudaErrorInvalidValue;
  const int share = share_of_cta(p.vocab);
  const int shared_bytes =
      static_cast<int>(share * sizeof(float) + kListed * sizeof(uint64_t) + sizeof(Bins));
  return by_dtype(dtype, [&]<typename T>() {
    const cudaError_t error =
        cudaFuncSetAttribute(sample_kernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (error != cudaSuccess) return error;
    return launch(sample_kernel<T>, dim3(static_cast<unsigned>(p.draws * kCluster)), kThreads, shared_bytes,
                  stream, p, share);
  });
}

}  // namespace tgi
