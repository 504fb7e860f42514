// Penalties, biases, masks and watermark, on the part of a row of scores that a CTA keeps in shared memory.
#pragma once

#include "common/vec.cuh"
#include "sampling/cuda.h"
#include "sampling/noise.cuh"

namespace tgi {

// One draw's settings and past.
struct Draw {
  const float* numbers;
  const int64_t* wholes;
  const int32_t* history;
  const int32_t* edit_ids;
  const float* edit_values;
  int64_t position;

  __device__ __forceinline__ Draw(const SampleParams& p, int64_t draw) {
    const int64_t row = p.rows[draw];
    numbers = p.numbers + row * kNumbers;
    wholes = p.wholes + row * kWholes;
    history = p.history + row * p.history_size;
    edit_ids = p.edit_ids + row * p.edits;
    edit_values = p.edit_values + row * p.edits;
    position = p.positions[draw];
  }

  __device__ __forceinline__ bool penalised() const {
    return numbers[kRepetition] != 1.0f || numbers[kFrequency] != 0.0f || numbers[kPresence] != 0.0f;
  }
  __device__ __forceinline__ bool adjusted() const {
    return penalised() || numbers[kWatermark] != 0.0f || wholes[kEdits] > 0;
  }
};

// Tokens [begin, begin + size) of a row.
struct Slice {
  float* scores;   // shared
  uint32_t* done;  // shared: a bit a token
  int begin, size;

  __device__ __forceinline__ bool has(int64_t token) const { return token >= begin && token < begin + size; }
};

// Calls function(place in the slice) for the tokens of the past from entry `first` on.
template <typename Function>
__device__ __forceinline__ void for_past(const Draw& draw, const Slice& slice, int64_t first,
                                         Function&& function) {
  for (int64_t i = first + threadIdx.x; i < draw.position; i += blockDim.x) {
    const int64_t token = draw.history[i];
    if (slice.has(token)) function(static_cast<int>(token - slice.begin));
  }
}

// Once for each token of the past. While they are counted, scores of such tokens hold the counts; whoever
// marks a token as done first puts its score back, from the logits.
template <typename T>
__device__ __forceinline__ void penalise(const Draw& draw, const Slice& slice, const T* logits) {
  for (int i = threadIdx.x; i < (slice.size + 31) / 32; i += blockDim.x) slice.done[i] = 0;
  uint32_t* counts = reinterpret_cast<uint32_t*>(slice.scores);
  for_past(draw, slice, 0, [&](int at) { counts[at] = 0; });
  __syncthreads();
  for_past(draw, slice, draw.wholes[kPromptTokens], [&](int at) { atomicAdd(counts + at, 1u); });
  __syncthreads();
  for_past(draw, slice, 0, [&](int at) {
    const uint32_t bit = 1u << at % 32;
    if (atomicOr(slice.done + at / 32, bit) & bit) return;
    const uint32_t count = counts[at];
    float score = to_float(logits[slice.begin + at]);
    const float repetition = draw.numbers[kRepetition];
    score = score > 0.0f ? score / repetition : score * repetition;
    score = __fsub_rn(score, __fmul_rn(static_cast<float>(count), draw.numbers[kFrequency]));
    if (count > 0) score -= draw.numbers[kPresence];
    slice.scores[at] = score == score ? score : -INFINITY;
  });
  __syncthreads();
}

__device__ __forceinline__ void edit(const Draw& draw, const Slice& slice) {
  const bool ending_allowed = draw.position >= draw.wholes[kPromptTokens] + draw.wholes[kMinNewTokens];
  for (int64_t i = threadIdx.x; i < draw.wholes[kEdits]; i += blockDim.x) {
    const int64_t token = draw.edit_ids[i];
    const float value = draw.edit_values[i];
    if (!slice.has(token) || (value == -INFINITY && ending_allowed)) continue;
    atomicAdd(slice.scores + (token - slice.begin), value);
  }
  __syncthreads();
}

// Favours the tokens that a hash of the token before calls green: 32 tokens a word, 128 a counter.
__device__ __forceinline__ void watermark(const Draw& draw, const Slice& slice) {
  if (draw.position == 0) return;
  constexpr uint64_t kPrime = 15485863;
  const uint64_t key = kPrime * static_cast<uint32_t>(draw.history[draw.position - 1]);
  for (int first = static_cast<int>(threadIdx.x) * 32; first < slice.size; first += blockDim.x * 32) {
    const int token = slice.begin + first;  // a multiple of 32, as slices begin at multiples of 128
    const uint4 words = philox({static_cast<uint32_t>(token / 128), 0, 0, 0}, key);
    const uint32_t green = pick(words, token / 32 % 4);
    for (int i = 0; i < 32 && first + i < slice.size; ++i) {
      if (green >> i & 1) slice.scores[first + i] += draw.numbers[kWatermark];
    }
  }
  __syncthreads();
}

// Turns the logits in the slice into what the tokens score. Begins and ends with all threads past a barrier.
template <typename T>
__device__ __forceinline__ void adjust(const Draw& draw, const Slice& slice, const T* logits) {
  if (draw.penalised()) penalise(draw, slice, logits);
  if (draw.wholes[kEdits] > 0) edit(draw, slice);
  if (draw.numbers[kWatermark] != 0.0f) watermark(draw, slice);
}

}  // namespace tgi
