// Launchers of the attention family's CUDA kernels.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "attention/bias.h"
#include "attention/tree.h"

namespace tgi {

enum class CacheType : int { bf16, f16, e4m3 };

// What prefill and decode share. Strides are in elements.
struct PagedAttention {
  void* out;                  // [tokens, heads, head_dim], tokens out_stride apart
  const void* q;              // [tokens, heads, head_dim], tokens q_stride apart
  const void* kv_pages;       // [pages, 2, kv_heads, 16, head_dim]
  const int* page_table;      // [seqs, max_pages]
  const int* kv_lens;         // [seqs], this step's tokens included
  const float* alibi_slopes;  // [heads] or nullptr
  const float* sinks;         // [heads] or nullptr
  int64_t out_stride, q_stride;
  int64_t pages;
  int max_pages;
  int seqs, heads, kv_heads, head_dim;
  int group;       // heads of a KV head
  int window;      // tokens a query sees, itself included; 0: all
  float gain;      // of products, see score_of
  float cap;       // softcap·log2(e), or 0
  float v_scale;   // of cached values
  bool q_is_bf16;  // type of q and out
};

struct DecodeParams : PagedAttention {
  int queries;    // per sequence
  int* counters;  // [kDecodeMergeLevels, slots], zero before and after
  float* sums;    // [kDecodeMergeLevels, slots, rows of an item, 2]: maximum and sum of what is to be merged
  float* values;  // [slots, rows of an item, padded head_dim]
  int slots;
};

struct PrefillParams : PagedAttention {
  const int* query_starts;  // [seqs + 1]
  int* counters;            // [2], zero before and after
  float* totals;            // prefill_total_floats an SM; for sequences of more keys than a chunk
  int64_t tokens;
  bool anchored;  // in the order of tree.h; else a faster one where there is one
};

struct BiasedDecodeParams : DecodeParams {
  AttentionBias bias;
};

struct BiasedPrefillParams : PrefillParams {
  AttentionBias bias;
};

// Where a bias has no numbers, the kernels without one run.
cudaError_t attention_decode(const BiasedDecodeParams& params, CacheType type, cudaStream_t stream);
cudaError_t attention_prefill(const BiasedPrefillParams& params, CacheType type, cudaStream_t stream);

// The same by Hopper's own instructions, in builds for 90a, for what it takes.
bool attention_prefill_sm90_takes(const PrefillParams& params, CacheType type);
cudaError_t attention_prefill_sm90(const PrefillParams& params, CacheType type, cudaStream_t stream);

// Rows (queries × heads of a group) that one work item of decode takes.
int decode_rows(int rows, int head_dim);
// Keys of the longest part that is stored: a chunk or, with 32 rows, a node.
constexpr int decode_longest_part(int rows, int head_dim) {
  return rows > 16 ? Tree<128>::kTile * Tree<128>::kNodeTiles : chunk_keys(head_dim);
}
// Parts there is room for, even where the longest alone would be fewer.
constexpr int decode_short_parts(int rows) { return 65536 / rows; }
// Parts of a chunk are merged to chunks, and these to results.
constexpr int kDecodeMergeLevels = 2;
// Rows that the CTAs of an SM have at once in prefill. Of each, its sums and its maximum and sum of weights
// are what it keeps of chunks.
constexpr int kPrefillRows = 128;
constexpr int padded_dim(int head_dim) { return head_dim <= 64 ? 64 : head_dim <= 128 ? 128 : 256; }
constexpr int prefill_total_floats(int head_dim) { return kPrefillRows * (padded_dim(head_dim) + 2); }

}  // namespace tgi
