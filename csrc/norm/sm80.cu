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
constexpr int kVecs =
    4;  // vectors of a row that a thread holds: much in flight for few registers, few warps to join

// One CTA a row; the row stays in registers between the two passes. Thread t holds vectors t and t + threads,
// so the sum's order follows from the row's length alone.
template <typename T, bool kResidual>
__global__ void __launch_bounds__(kMaxThreads, 1) rms_norm_kernel(const RmsNormParams p) {
  __shared__ float partial[32];
  const int64_t token = blockIdx.x;
  const T* x_row = static_cast<const T*>(p.x) + token * p.x_stride;
  T* residual_row = static_cast<T*>(p.residual) + token * p.residual_stride;
  T* out_row = static_cast<T*>(p.out) + token * p.out_stride;
  const float share = 1.0f / p.hidden;
  const auto first = [](int i) { return static_cast<int>(i * blockDim.x + threadIdx.x) * kVec<T>; };
  Vec<T> weight[kVecs] = {}, x[kVecs] = {}, residual[kVecs] = {};

  let_next_start();
#pragma unroll
  for (int i = 0; i < kVecs; ++i) {
    if (first(i) < p.hidden) weight[i] = load_constant(static_cast<const T*>(p.weight) + first(i));
  }
  wait_for_previous();
#pragma unroll
  for (int i = 0; i < kVecs; ++i) {
    if (first(i) >= p.hidden) continue;
    x[i] = load_streaming(x_row + first(i));
    if constexpr (kResidual) residual[i] = load_streaming(residual_row + first(i));
  }

  float squares = 0.0f;
#pragma unroll
  for (int i = 0; i < kVecs; ++i) {
    if constexpr (kResidual) {
      float sum[kVec<T>];
#pragma unroll
      for (int j = 0; j < kVec<T>; ++j) sum[j] = element(x[i], j) + element(residual[i], j);
      x[i] = pack<T>(sum);
      if (first(i) < p.hidden) store(residual_row + first(i), x[i]);
    }
#pragma unroll
    for (int j = 0; j < kVec<T>; ++j) squares = fmaf(element(x[i], j), element(x[i], j), squares);
  }
  const float scale = rsqrtf(fmaf(block_sum(squares, partial), share, p.eps));

#pragma unroll
  for (int i = 0; i < kVecs; ++i) {
    if (first(i) >= p.hidden) continue;
    float y[kVec<T>];
#pragma unroll
    for (int j = 0; j < kVec<T>; ++j) y[j] = element(x[i], j) * scale * element(weight[i], j);
    store(out_row + first(i), pack<T>(y));
  }
}

// Rows of any length and alignment, element by element; the second pass reads the row from L1 or L2.
template <typename T>
__global__ void __launch_bounds__(kMaxThreads) rms_norm_any_kernel(const RmsNormParams p) {
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
    const float x = to_float(residual_row ? residual_row[i] : row[i]);
    const float y = x * scale * to_float(static_cast<const T*>(p.weight)[i]);
    static_cast<T*>(p.out)[token * p.out_stride + i] = from_float<T>(y);
  }
}

}  // namespace

// ---- host ----

cudaError_t rms_norm(const RmsNormParams& p, DType dtype, cudaStream_t stream) {
  if (p.tokens == 0) return cudaSuccess;
  return by_dtype(dtype, [&]<typename T>() {
    const dim3 grid(static_cast<unsigned>(p.tokens));
    const int threads = (p.hidden / kVec<T> + kVecs * 32 - 1) / (kVecs * 32) * 32;
    if (p.aligned && threads <= kMaxThreads) {
      const auto kernel = p.residual ? rms_norm_kernel<T, true> : rms_norm_kernel<T, false>;
      return launch(kernel, grid, threads, 0, stream, p);
    }
    return launch(rms_norm_any_kernel<T>, grid, kMaxThreads, 0, stream, p);
  });
}

}  // namespace tgi
