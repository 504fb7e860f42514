// The gated activations, element by element: used by their own kernel and by matmul's epilogue, which must
// agree.
#pragma once

#include "activation/cuda.h"
#include "common/vec.cuh"

namespace tgi {

// x / (1 + e^−y). For 16-bit results the fast exponential and division (2 ulp of fp32) disappear in the
// rounding.
template <typename T>
__device__ __forceinline__ float over_one_plus_exp(float x, float y) {
  if constexpr (sizeof(T) == 4) return x / (1.0f + expf(-y));
  return __fdividef(x, 1.0f + __expf(-y));
}

template <typename T>
__device__ __forceinline__ float silu(float x) {
  return over_one_plus_exp<T>(x, x);
}

// x · Φ(x), through erfc because 1 + erf cancels below −2.
__device__ __forceinline__ float gelu(float x) { return 0.5f * x * erfcf(x * -0.70710678118654752f); }

// Hendrycks and Gimpel 2016, arXiv:1606.08415: x · ½(1 + tanh u) = x / (1 + e^−2u).
template <typename T>
__device__ __forceinline__ float gelu_tanh(float x) {
  constexpr float kTwoRootTwoOverPi = 1.59576912160573071f;
  return over_one_plus_exp<T>(x, kTwoRootTwoOverPi * fmaf(0.044715f * x * x, x, x));
}

// act(gate) · up, for the caller to round to T.
template <typename T>
__device__ __forceinline__ float gated(Activation activation, float gate, float up) {
  switch (activation) {
    case Activation::silu:
      return silu<T>(gate) * up;
    case Activation::gelu:
      return gelu(gate) * up;
    default:
      return gelu_tanh<T>(gate) * up;
  }
}

// The same of several, side by side: the choice is made once, so that none waits for another.
template <typename T, int kCount>
__device__ __forceinline__ void gated_all(Activation activation, const float (&gate)[kCount],
                                          const float (&up)[kCount], float (&y)[kCount]) {
  const auto each = [&]<Activation kActivation>() {
#pragma unroll
    for (int i = 0; i < kCount; ++i) y[i] = gated<T>(kActivation, gate[i], up[i]);
  };
  switch (activation) {
    case Activation::silu:
      return each.template operator()<Activation::silu>();
    case Activation::gelu:
      return each.template operator()<Activation::gelu>();
    default:
      return each.template operator()<Activation::gelu_tanh>();
  }
}

}  // namespace tgi
