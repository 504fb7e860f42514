// What a decode step does before its first layer and after its last. Each kernel is a few microseconds of
// latency and nothing else, so each does all that its place in the step allows.
#include "common/pdl.cuh"
#include "step/cuda.h"

namespace tgi {
namespace {

// ---- device ----

constexpr int kThreads = 256;
constexpr int kPageTokens = 16;

// One CTA a sequence.
__global__ void __launch_bounds__(kThreads) decode_inputs_kernel(const DecodeInputsParams p) {
  const int64_t at = blockIdx.x;
  let_next_start();
  wait_for_previous();
  const int row = p.rows[at], position = row < 0 ? 0 : p.kv_lens[at] - 1, added = p.added[at];
  if (row < 0) {
    if (threadIdx.x == 0) p.token_ids[at] = 0, p.positions[at] = 0, p.slots[at] = -1;
    return;
  }
  int32_t* own = p.page_table + static_cast<int64_t>(row) * p.max_pages;
  int32_t* copy = p.page_tables + at * p.max_pages;
  const int last = position / kPageTokens;
  for (int page = threadIdx.x; page < last; page += kThreads) copy[page] = own[page];
  if (threadIdx.x != 0) return;
  if (added >= 0) own[last] = added;
  const int32_t page = added >= 0 ? added : own[last];
  copy[last] = page;
  p.token_ids[at] = p.last_ids[row];
  p.positions[at] = position;
  p.slots[at] = int64_t{page} * kPageTokens + position % kPageTokens;
}

__global__ void __launch_bounds__(kThreads) keep_ids_kernel(const KeepIdsParams p) {
  const int64_t at = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  let_next_start();
  wait_for_previous();
  if (at >= p.count) return;
  const int row = p.rows[at];
  if (row >= 0) p.last_ids[row] = p.ids[at];
}

__device__ __forceinline__ void set_bits(uint4& word) { word = {~0u, ~0u, ~0u, ~0u}; }
__device__ __forceinline__ void set_bits(uint32_t& word) { word = ~0u; }
__device__ __forceinline__ void set_bits(uint16_t& word) { word = 0xffff; }

// `chunks` CTAs a token.
template <typename Word>
__global__ void __launch_bounds__(kThreads) embed_kernel(const EmbedParams p, int chunks) {
  const int64_t token = blockIdx.x / chunks;
  const int at = static_cast<int>(blockIdx.x % chunks) * kThreads + static_cast<int>(threadIdx.x);
  let_next_start();
  wait_for_previous();
  if (at >= p.row_words) return;
  const int64_t id = p.ids[token];
  Word word;
  set_bits(word);
  if (id >= 0 && id < p.vocab) word = static_cast<const Word*>(p.table)[id * p.row_words + at];
  static_cast<Word*>(p.out)[token * p.row_words + at] = word;
}

// ---- host ----

template <typename Word>
cudaError_t launch_embed(const EmbedParams& p, cudaStream_t stream) {
  const int chunks = (p.row_words + kThreads - 1) / kThreads;
  return launch(embed_kernel<Word>, dim3(static_cast<unsigned>(p.tokens * chunks)), kThreads, 0, stream, p,
                chunks);
}

}  // namespace

cudaError_t decode_inputs(const DecodeInputsParams& p, cudaStream_t stream) {
  if (p.seqs == 0) return cudaSuccess;
  return launch(decode_inputs_kernel, dim3(static_cast<unsigned>(p.seqs)), kThreads, 0, stream, p);
}

cudaError_t keep_ids(const KeepIdsParams& p, cudaStream_t stream) {
  if (p.count == 0) return cudaSuccess;
  const auto ctas = static_cast<unsigned>((p.count + kThreads - 1) / kThreads);
  return launch(keep_ids_kernel, dim3(ctas), kThreads, 0, stream, p);
}

cudaError_t embed(const EmbedParams& p, cudaStream_t stream) {
  if (p.tokens == 0) return cudaSuccess;
  switch (p.word_bytes) {
    case 16:
      return launch_embed<uint4>(p, stream);
    case 4:
      return launch_embed<uint32_t>(p, stream);
    case 2:
      return launch_embed<uint16_t>(p, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace tgi
