// RMSNorm (Zhang and Sennrich 2019, arXiv:1910.07467) and LayerNorm (Ba et al. 2016, arXiv:1607.06450), alone
// and with the residual add in front.
#include "common/dispatch.cuh"
#include "common/gather.cuh"
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
// so the sum's order follows from the row's length alone. Ordered, the result passes through shared memory,
// and a thread keeps there, too, where its elements come from: registers would be too few.
template <typename T, bool kResidual, bool kCentred, bool kOrdered = false>
__global__ void __launch_bounds__(kMaxThreads, 1) norm_kernel(const NormParams p) {
  __shared__ float partial[kCentred ? 64 : 32];
  extern __shared__ __align__(16) unsigned char memory[];
  T* staged = reinterpret_cast<T*>(memory);
  Places<T>* places = reinterpret_cast<Places<T>*>(staged + p.hidden + kBehind<T>);
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
  if constexpr (kOrdered) {
#pragma unroll
    for (int i = 0; i < kVecs; ++i) {
      if (first(i) < p.hidden) places[first(i) / kVec<T>] = places_of<T>(p.order + first(i), p.hidden);
    }
    if (threadIdx.x == 0) end_row(staged, p.hidden);
  }
  wait_for_previous();
#pragma unroll
  for (int i = 0; i < kVecs; ++i) {
    if (first(i) >= p.hidden) continue;
    x[i] = load_streaming(x_row + first(i));
    if constexpr (kResidual) residual[i] = load_streaming(residual_row + first(i));
  }

  float squares = 0.0f, total = 0.0f;
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
    for (int j = 0; j < kVec<T>; ++j) {
      if constexpr (kCentred) {
        total += element(x[i], j);
      } else {
        squares = fmaf(element(x[i], j), element(x[i], j), squares);
      }
    }
  }
  float mean = 0.0f;
  if constexpr (kCentred) {
    mean = block_sum(total, partial + 32) * share;
#pragma unroll
    for (int i = 0; i < kVecs; ++i) {
      if (first(i) >= p.hidden) continue;
#pragma unroll
      for (int j = 0; j < kVec<T>; ++j) {
        squares = fmaf(element(x[i], j) - mean, element(x[i], j) - mean, squares);
      }
    }
  }
  const float scale = rsqrtf(fmaf(block_sum(squares, partial), share, p.eps));

#pragma unroll
  for (int i = 0; i < kVecs; ++i) {
    if (first(i) >= p.hidden) continue;
    float y[kVec<T>];
    if constexpr (kCentred) {
      Vec<T> bias = {};
      if (p.bias) bias = load_constant(static_cast<const T*>(p.bias) + first(i));
#pragma unroll
      for (int j = 0; j < kVec<T>; ++j) {
        y[j] = fmaf((element(x[i], j) - mean) * scale, element(weight[i], j), element(bias, j));
      }
    } else {
#pragma unroll
      for (int j = 0; j < kVec<T>; ++j) y[j] = element(x[i], j) * scale * element(weight[i], j);
    }
    store((kOrdered ? staged : out_row) + first(i), pack<T>(y));
  }
  if constexpr (kOrdered) {
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kVecs; ++i) {
      if (first(i) < p.hidden) store(out_row + first(i), gathered(staged, places[first(i) / kVec<T>]));
    }
  }
}

// Rows of any length and alignment, element by element; later passes read the row from L1 or L2, in an order
// that other threads' elements of it: they were stored before block_sum's barrier.
template <typename T>
__global__ void __launch_bounds__(kMaxThreads) norm_any_kernel(const NormParams p) {
  __shared__ float partial[64];
  const int64_t token = blockIdx.x;
  const T* row = static_cast<const T*>(p.x) + token * p.x_stride;
  T* residual_row = p.residual ? static_cast<T*>(p.residual) + token * p.residual_stride : nullptr;

  let_next_start();
  wait_for_previous();
  float squares = 0.0f, total = 0.0f;
  for (int i = threadIdx.x; i < p.hidden; i += blockDim.x) {
    T x = row[i];
    if (residual_row) residual_row[i] = x = from_float<T>(to_float(x) + to_float(residual_row[i]));
    total += to_float(x);
    squares = fmaf(to_float(x), to_float(x), squares);
  }
  const T* stored = residual_row ? residual_row : row;
  float mean = 0.0f;
  if (p.centred) {
    mean = block_sum(total, partial + 32) / p.hidden;
    squares = 0.0f;
    for (int i = threadIdx.x; i < p.hidden; i += blockDim.x) {
      squares = fmaf(to_float(stored[i]) - mean, to_float(stored[i]) - mean, squares);
    }
  }
  const float scale = rsqrtf(block_sum(squares, partial) / p.hidden + p.eps);
  for (int i = threadIdx.x; i < p.hidden; i += blockDim.x) {
    const int at = p.order ? p.order[i] : i;
    float y = __int_as_float(-1);  // NaN
    if (static_cast<unsigned>(at) < static_cast<unsigned>(p.hidden)) {
      const float bias = p.bias ? to_float(static_cast<const T*>(p.bias)[at]) : 0.0f;
      y = fmaf((to_float(stored[at]) - mean) * scale, to_float(static_cast<const T*>(p.weight)[at]), bias);
    }
    static_cast<T*>(p.out)[token * p.out_stride + i] = from_float<T>(y);
  }
}

// ---- host ----

template <typename T>
cudaError_t launch_ordered(const NormParams& p, int threads, cudaStream_t stream) {
  const auto kernel = p.residual ? norm_kernel<T, true, false, true> : norm_kernel<T, false, false, true>;
  const int shared_bytes = (p.hidden + kBehind<T>)*static_cast<int>(sizeof(T)) + p.hidden * 2;
  constexpr int kDefault = 48 * 1024 - 128;  // less the partial sums
  if (shared_bytes > kDefault) {
    const auto attribute = cudaFuncAttributeMaxDynamicSharedMemorySize;
    if (const cudaError_t error = cudaFuncSetAttribute(kernel, attribute, shared_bytes)) return error;
  }
  return launch(kernel, dim3(static_cast<unsigned>(p.tokens)), threads, shared_bytes, stream, p);
}

}  // namespace

cudaError_t norm(const NormParams& p, DType dtype, cudaStream_t stream) {
  if (p.tokens == 0) return cudaSuccess;
  return by_dtype(dtype, [&]<typename T>() {
    const dim3 grid(static_cast<unsigned>(p.tokens));
    const int threads = (p.hidden / kVec<T> + kVecs * 32 - 1) / (kVecs * 32) * 32;
    if (p.aligned && threads <= kMaxThreads) {
      if (p.order) return launch_ordered<T>(p, threads, stream);
      const auto kernel = p.centred
                              ? (p.residual ? norm_kernel<T, true, true> : norm_kernel<T, false, true>)
                              : (p.residual ? norm_kernel<T, true, false> : norm_kernel<T, false, false>);
      return launch(kernel, grid, threads, 0, stream, p);
    }
    return launch(norm_any_kernel<T>, grid, kMaxThreads, 0, stream, p);
  });
}

}  // namespace tgi
