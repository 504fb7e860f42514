// RMSNorm, alone and with the residual add in front. Zhang and Sennrich 2019, arXiv:1910.07467.
#include "common/dispatch.cuh"
#include "common/pdl.cuh"
#include "common/reduce.cuh"
#include "common/vec.cuh"
#include "norm/cuda.h"

namespace tgi {
namespace {

// ---- device ----

constexpr int kMaxThreads = 1024;
constexpr int kVecs = 2;  // vectors a thread: 64 KB of a long batch in flight on each SM, one round trip for one token

template <typename T>
__device__ __forceinline__ T normed(T x, float scale, T weight) {
  return from_float<T>(to_float(x) * scale * to_float(weight));
}

// A row stays in registers between the two passes: thread t holds vectors t and t + threads, so the sum's order
// follows from the row's length alone. A CTA takes every gridDim-th row and loads the next before it finishes one.
template <typename T, bool kResidual>
__global__ void __launch_bounds__(kMaxThreads, 1) rms_norm_kernel(const RmsNormParams p) {
  __shared__ float partial[2][32];  // by turns, so that one barrier a row is enough
  const int first[kVecs] = {static_cast<int>(threadIdx.x) * kVec<T>,
                            static_cast<int>(threadIdx.x + blockDim.x) * kVec<T>};
  const T* xs = static_cast<const T*>(p.x);
  T* residuals = static_cast<T*>(p.residual);
  Vec<T> weight[kVecs] = {}, x[kVecs] = {}, residual[kVecs] = {};
  const auto load_rows = [&](int64_t token) {
#pragma unroll
    for (int i = 0; i < kVecs; ++i) {
      if (token >= p.tokens || first[i] >= p.hidden) continue;
      x[i] = load_streaming(xs + token * p.x_stride + first[i]);
      if constexpr (kResidual) residual[i] = load_streaming(residuals + token * p.residual_stride + first[i]);
    }
  };

  let_next_start();
#pragma unroll
  for (int i = 0; i < kVecs; ++i) {
    if (first[i] < p.hidden) weight[i] = load_constant(static_cast<const T*>(p.weight) + first[i]);
  }
  wait_for_previous();
  load_rows(blockIdx.x);
  int turn = 0;
  for (int64_t token = blockIdx.x; token < p.tokens; token += gridDim.x, turn ^= 1) {
    float squares = 0.0f;
    Vec<T> row[kVecs];
#pragma unroll
    for (int i = 0; i < kVecs; ++i) {
      row[i] = x[i];
#pragma unroll
      for (int j = 0; j < kVec<T>; ++j) {
        if constexpr (kResidual) row[i].at[j] = from_float<T>(to_float(x[i].at[j]) + to_float(residual[i].at[j]));
        squares = fmaf(to_float(row[i].at[j]), to_float(row[i].at[j]), squares);
      }
    }
    load_rows(token + gridDim.x);
    const float scale = rsqrtf(block_sum(squares, partial[turn]) / p.hidden + p.eps);
#pragma unroll
    for (int i = 0; i < kVecs; ++i) {
      if (first[i] >= p.hidden) continue;
      if constexpr (kResidual) store(residuals + token * p.residual_stride + first[i], row[i]);
#pragma unroll
      for (int j = 0; j < kVec<T>; ++j) row[i].at[j] = normed(row[i].at[j], scale, weight[i].at[j]);
      store(static_cast<T*>(p.out) + token * p.out_stride + first[i], row[i]);
    }
  }
}

// Rows of any length and alignment, element by element; the second pass reads the row from L1 or L2.
template <typename T>
__global__ void __launch_bounds__(kMaxThreads, 1) rms_norm_any_kernel(const RmsNormParams p) {
  __shared__ float partial[32];
  const int64_t token = blockIdx.x;
  const T* row = static_cast<const T*>(p.x) + token * p.x_stride;
  T* residual_row = p.residual ? static_cast<T*>(p.residual) + token * p.residual_stride : nullptr;

  let_next_start();
  wait_for_previous();
  float squares = 0.0f;
  for (int i = threadIdx.x; i < p.hidden; i += blockDim.x) {
    T x = row[i];
    if (residual_row) residual_row[i] = x = from_float<T>(to_float(x) + to_float(residual_row[i]));
    squares = fmaf(to_float(x), to_float(x), squares);
  }
  const float scale = rsqrtf(block_sum(squares, partial) / p.hidden + p.eps);
  for (int i = threadIdx.x; i < p.hidden; i += blockDim.x) {
    const T x = residual_row ? residual_row[i] : row[i];
    static_cast<T*>(p.out)[token * p.out_stride + i] = normed(x, scale, static_cast<const T*>(p.weight)[i]);
  }
}

}  // namespace

// ---- host ----

cudaError_t rms_norm(const RmsNormParams& p, DType dtype, cudaStream_t stream) {
  if (p.tokens == 0) return cudaSuccess;
  return by_dtype(dtype, [&]<typename T>() {
    const int threads = (p.hidden / kVec<T> + kVecs * 32 - 1) / (kVecs * 32) * 32;
    if (!p.aligned || threads > kMaxThreads) {
      return launch(rms_norm_any_kernel<T>, dim3(static_cast<unsigned>(p.tokens)), kMaxThreads, 0, stream, p);
    }
    const auto kernel = p.residual ? rms_norm_kernel<T, true> : rms_norm_kernel<T, false>;
    const int64_t resident = resident_ctas(kernel, threads);
    return launch(kernel, dim3(static_cast<unsigned>(min(p.tokens, resident))), threads, 0, stream, p);
  });
}

}  // namespace tgi
