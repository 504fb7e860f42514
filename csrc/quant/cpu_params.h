// What the CPU kernels of this family are given.
#pragma once

#include <cstdint>

#include "common/cpu_isa.h"
#include "matmul/cpu_params.h"

namespace tgi {

constexpr int64_t kQuantRun = 32;  // codes of one feature that lie together, in `bits` words
constexpr int64_t kOctet = 8;      // a group is whole octets of codes, or all of them

enum class CodeValues : int { integer = 0, table = 1, e4m3 = 2 };
enum class NumberType : int { f32, f16, bf16 };

struct Numbers {
  const void* data;
  NumberType type;
};

// A weight is value(code) · scale + offset, rounded once; all but the words are [panels, groups, 32]. Panels
// of 32 output features as in matmul. A run's codes follow each other from the lowest bits of its first word,
// and go on from one word to the next.
struct QuantWeight {
  const int32_t* words;        // [panels, ⌈in_features / 32⌉, bits, 32]
  Numbers scales;              //
  Numbers shifts;              // offsets, or zeros: offset = −zero · scale; nullptr: every zero is `zero`
  const float* table;          // [16] values of codes
  int64_t groups, group_size;  // of in_features
  float zero;
  int bits;  // 2 to 9; tables have 4, e4m3 has 8
  CodeValues values;
  bool has_zeros;  // shifts are zeros
};

struct QuantLinearParams {
  LinearParams product;  // but for the weight
  QuantWeight weight;
};

TGI_CPU_KERNEL(quant_linear, QuantLinearParams)

}  // namespace tgi
