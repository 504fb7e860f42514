// What an op makes of its bias.
#pragma once

#include "attention/bias.h"
#include "common/torch_cpu.h"

namespace tgi {

// bias: [tokens or 1, heads or 1, columns] float32, the columns contiguous; checked but for its device.
inline AttentionBias read_bias(const std::optional<Tensor>& bias, bool by_distance, int64_t tokens,
                               int64_t heads) {
  check(bias.has_value() || !by_distance, "bias_by_distance without a bias");
  if (!bias.has_value()) return {};
  check_dims(*bias, 3, "bias");
  const int64_t rows = bias->size(0), of_heads = bias->size(1), columns = bias->size(2);
  check((rows == 1 || rows == tokens) && (of_heads == 1 || of_heads == heads) && columns > 0 &&
            columns <= INT32_MAX,
        "bias has shape [", rows, ", ", of_heads, ", ", columns, "]; it needs [", tokens, " or 1, ", heads,
        " or 1, at least 1]");
  check(bias->scalar_type() == ScalarType::Float, "bias has dtype ", static_cast<int>(bias->scalar_type()),
        "; it needs float32, ", static_cast<int>(ScalarType::Float));
  check(columns == 1 || bias->stride(2) == 1, "bias: its columns have stride ", bias->stride(2),
        "; they need to be contiguous");
  return {
      .at = static_cast<const float*>(bias->const_data_ptr()),
      .token_stride = rows == 1 ? 0 : bias->stride(0),
      .head_stride = of_heads == 1 ? 0 : bias->stride(1),
      .columns = static_cast<int>(columns),
      .by_distance = by_distance,
  };
}

}  // namespace tgi
