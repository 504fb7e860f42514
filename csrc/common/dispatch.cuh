// A run-time value turned into a compile-time one, once, with the list of what exists.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "common/dtype.h"

namespace tgi {

// Calls f.template operator()<T>() with the C++ type of a tensor's elements.
template <typename F>
cudaError_t by_dtype(DType dtype, F&& f) {
  switch (dtype) {
    case DType::f32:
      return f.template operator()<float>();
    case DType::f16:
      return f.template operator()<__half>();
    case DType::bf16:
      return f.template operator()<__nv_bfloat16>();
  }
  return cudaErrorInvalidValue;
}

// The same for the two types that the tensor cores multiply.
template <typename F>
cudaError_t by_half_dtype(DType dtype, F&& f) {
  switch (dtype) {
    case DType::f16:
      return f.template operator()<__half>();
    case DType::bf16:
      return f.template operator()<__nv_bfloat16>();
    default:
      return cudaErrorInvalidValue;
  }
}

// Calls f.template operator()<kValue>() with the first listed value that is at least `value`.
template <int kFirst, int... kRest, typename F>
cudaError_t by_at_least(int value, F&& f) {
  if (value <= kFirst) return f.template operator()<kFirst>();
  if constexpr (sizeof...(kRest) > 0) {
    return by_at_least<kRest...>(value, static_cast<F&&>(f));
  } else {
    return cudaErrorInvalidValue;
  }
}

}  // namespace tgi
