// Launchers of the sampling family's CUDA kernels.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/dtype.h"

namespace tgi {

// The likeliest token of each row (the lowest id of several), and its log-probability. NaN logits are never
// chosen; a row that holds one, or nothing above −∞, has logprob NaN (id 0 if nothing can be chosen).
struct GreedyParams {
  const void* logits;  // [rows, vocab]
  int64_t* ids;        // [rows]
  float* logprobs;     // [rows]
  int64_t rows;
  int vocab;
  int64_t stride;  // elements between rows
  bool aligned;    // every row starts on 16 bytes and vocab is a multiple of the vector
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

// Draws a token for each row of logits. The definition is in tgi_kernels/sampling.py.
struct SampleParams {
  const void* logits;  // [logit rows, vocab], rows stride apart
  int64_t stride;
  int64_t draws;
  const int64_t* places;  // [draws]: which row of logits, ids and logprobs; null: one after the other
  int vocab;
  bool aligned;              // as of GreedyParams
  const int64_t* rows;       // [draws]: which row of the tables below
  const int64_t* positions;  // [draws]: of the token to draw, as many come before it
  const float* numbers;      // [rows, kNumbers]
  const int64_t* wholes;     // [rows, kWholes]
  const int32_t* history;    // [rows, history_size]: the tokens before, up to the position
  int64_t history_size;
  const int32_t* edit_ids;   // [rows, edits]: tokens whose logits are changed …
  const float* edit_values;  // … by these; −∞ holds for the first min-new-tokens only
  int64_t edits;
  int64_t* ids;     // [logit rows]
  float* logprobs;  // [logit rows]
};

// The largest vocabulary that a cluster's shared memory holds.
inline constexpr int kSampleMaxVocab = 400 * 1024;

// A cluster of eight CTAs a row; Hopper only.
cudaError_t sample_sm90(const SampleParams& params, DType dtype, cudaStream_t stream);

// The likeliest tokens of each row, likeliest first, the lowest id first among equals.
struct TopLogprobsParams {
  const void* logits;  // [rows, vocab], rows stride apart
  int64_t stride;
  int64_t rows;
  int vocab;
  int count;
  bool aligned;     // as of GreedyParams
  int64_t* ids;     // [rows, count]; −1 where a row has fewer above −∞
  float* logprobs;  // [rows, count]; −∞ there
};

inline constexpr int kTopMostTokens = 1024;

// A cluster of eight CTAs a row; Hopper only.
cudaError_t top_logprobs_sm90(const TopLogprobsParams& params, DType dtype, cudaStream_t stream);

// One CTA a row.
cudaError_t greedy_sm80(const GreedyParams& params, DType dtype, cudaStream_t stream);
// A cluster of eight CTAs a row.
cudaError_t greedy_sm90(const GreedyParams& params, DType dtype, cudaStream_t stream);

}  // namespace tgi
