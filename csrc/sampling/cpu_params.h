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

TGI_CPU_KERNEL(greedy, GreedyParams)

}  // namespace tgi
