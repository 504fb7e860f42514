// What the CPU kernels of this family are given.
#pragma once

#include <cstdint>

#include "attention/bias.h"
#include "common/cpu_isa.h"

namespace tgi {

constexpr int64_t kPageTokens = 16;
// Keys are summed in splits with borders at multiples of this position, whoever computes them: a sequence may
// be shared among threads without changing a bit of its result.
constexpr int64_t kSplitTokens = 512;
constexpr int64_t kMaxHeadDim = 576;
constexpr int64_t kMaxBlockRows = 32;  // query rows of a task: K is transposed once for all of them

// Queries [first, first + queries) of a sequence and query heads [head, head + heads), which share a kv_head;
// against all keys (split −1; the result goes to out) or one split of them (it goes to partials).
struct AttentionTask {
  int32_t seq, first, queries, head, heads;
  int32_t split;    // attention_merge: how many splits there are
  int64_t partial;  // row of `partials` where the results begin; attention_merge: those of the first split
};

struct AttentionParams {
  const float* q;               // [tokens, heads, head_dim], tokens q_stride apart
  const float* kv_pages;        // [pages, 2, kv_heads, 16, head_dim]
  const int32_t* page_table;    // [seqs, max_pages]
  const int32_t* query_starts;  // [seqs + 1]
  const int32_t* kv_lens;       // [seqs]
  const float* alibi_slopes;    // [heads] or nullptr
  const float* sinks;           // [heads] or nullptr
  AttentionBias bias;
  float* out;       // [tokens, heads, head_dim]
  float* partials;  // [rows, 2 + head_dim]: maximum, sum, weighted values of a split
  const AttentionTask* tasks;
  int64_t num_tasks;
  int64_t q_stride, max_pages, heads, kv_heads, head_dim;
  int64_t window;
  float scale, softcap;
};

TGI_CPU_KERNEL(attention, AttentionParams)
TGI_CPU_KERNEL(attention_merge, AttentionParams)

}  // namespace tgi
