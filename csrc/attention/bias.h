// Numbers added to the scores of attention, on every device.
#pragma once

#include <cstdint>

namespace tgi {

// at[token · token_stride + head · head_stride + column] is added to the score of a query and a key, after
// the cap. The column is the key's position or, by distance, how far it lies before the query; columns beyond
// the last are the last. A row of −∞ alone is one that sees no key.
struct AttentionBias {
  const float* at;  // nullptr: none
  int64_t token_stride, head_stride;
  int columns;
  bool by_distance;
};

}  // namespace tgi
