// Launchers of the attention family's CUDA kernels.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

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
  int max_pages;
  int seqs, heads, kv_heads, head_dim;
  int window;      // tokens a query sees, itself included; 0: all
  float gain;      // of products, see score_of
  float cap;       // softcap·log2(e), or 0
  float v_scale;   // of cached values
  bool q_is_bf16;  // type of q and out
};

struct DecodeParams : PagedAttention {
  int queries;    // per sequence
  int* counters;  // [kDecodeMergeLevels, slots], zero before and after
  float* sums;    // [slots, rows of an item, 2]: what items hand to a merge, maximum and sum
  float* values;  // [slots, rows of an item, padded head_dim]
  int slots;
};

struct PrefillParams : PagedAttention {
  const int* query_starts;  // [seqs + 1]
  int64_t tokens;
};

cudaError_t attention_decode(const DecodeParams& params, CacheType type, cudaStream_t stream);
cudaError_t attention_prefill(const PrefillParams& params, CacheType type, cudaStream_t stream);

// Rows (queries × heads of a group) that one work item of decode takes.
int decode_rows(int rows, int head_dim);
// Keys of the longest item, and the items there is room for even where that would make fewer.
constexpr int decode_longest_item(int rows) { return rows > 16 ? 1024 : 4096; }
constexpr int kDecodeShortItems = 2048;
// Merges take 16 parts of a sequence at a time.
constexpr int kDecodeMergeLevels = 3;
constexpr int decode_padded_dim(int head_dim) { return head_dim <= 64 ? 64 : head_dim <= 128 ? 128 : 256; }

}  // namespace tgi
