// What the CPU kernels of this family are given.
#pragma once

#include <cstdint>

#include "common/cpu_isa.h"

namespace tgi {

struct GreedyParams {
  const float* logits;  // [rows, vocab], rows stride apart
  int64_t stride;
  int64_t* ids;     // [rows]
  float* logprobs;  // [rows]
  int64_t rows;
  int64_t vocab;
};

// Columns of the tables of settings, in the order of tgi_kernels.sampling.Settings.
enum Number {
  kTemperature,
  kTopP,
  kTypicalP,
  kMinP,
  kRepetition,
  kFrequency,
  kPresence,
  kWatermark,
  kNumbers
};
enum Whole { kTopK, kSeed, kChoice, kPromptTokens, kMinNewTokens, kEdits, kWholes };

struct SampleParams {
  const float* logits;  // [logit rows, vocab], rows stride apart
  int64_t stride;
  int64_t draws;
  const int64_t* places;  // [draws]: which row of logits, ids and logprobs; null: one after the other
  int64_t vocab;
  const int64_t* rows;       // [draws]: which row of the tables below
  const int64_t* positions;  // [draws]: of the token to draw, as many come before it
  const float* numbers;      // [rows, kNumbers]
  const int64_t* wholes;     // [rows, kWholes]
  const int32_t* history;    // [rows, tokens]: the tokens before, up to the position
  int64_t history_size;
  const int32_t* edit_ids;   // [rows, edits]: tokens whose logits are changed …
  const float* edit_values;  // … by these; −∞ holds for the first min-new-tokens only
  int64_t edits;
  unsigned char* workspace;  // [workers, workspace_bytes(vocab)]
  int64_t workers;
  int64_t* ids;     // [logit rows]
  float* logprobs;  // [logit rows]
};

struct TopLogprobsParams {
  const float* logits;  // [rows, vocab], rows stride apart
  int64_t stride;
  int64_t rows;
  int64_t vocab;
  int64_t count;             // tokens to report, at most vocab
  unsigned char* workspace;  // as of SampleParams
  int64_t workers;
  int64_t* ids;     // [rows, count], −1 where there are fewer
  float* logprobs;  // [rows, count]
};

struct TokenLogprobsParams {
  const float* logits;  // [rows, vocab], rows stride apart
  int64_t stride;
  int64_t rows;
  int64_t vocab;
  const int64_t* ids;  // [rows]
  float* logprobs;     // [rows]
};

// A worker's memory: keys (8 bytes a token), scores and counts (4 each), block maxima; in multiples of 64
// tokens.
inline int64_t workspace_bytes(int64_t vocab) {
  const int64_t blocks = (vocab + 63) / 64;
  return blocks * 64 * 16 + (blocks + 15) / 16 * 64;
}

TGI_CPU_KERNEL(greedy, GreedyParams)
TGI_CPU_KERNEL(sample, SampleParams)
TGI_CPU_KERNEL(top_logprobs, TopLogprobsParams)
TGI_CPU_KERNEL(token_logprobs, TokenLogprobsParams)

}  // namespace tgi
