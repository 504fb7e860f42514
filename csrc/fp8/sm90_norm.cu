// RMSNorm that writes e4m3 and its scales: what a norm and then the rounding of its result would give.
// docs/kernels/fp8_gemm.md.
#include "common/dispatch.cuh"
#include "common/pdl.cuh"
#include "fp8/quantise.cuh"

namespace tgi {

using namespace fp8;

namespace {

// ---- device ----

constexpr int kMaxThreads = 1024;
constexpr int kVecs = 4;  // of a row that a thread holds, as in norm/sm80.cu: sums have its order

// One CTA a row, which stays in registers between sum, norm and rounding.
template <typename T>
__global__ void __launch_bounds__(kMaxThreads, 1) norm_quantise_kernel(const NormQuantiseParams p) {
  __shared__ float partial[64];
  const int64_t token = blockIdx.x;
  const QuantiseParams& to = p.rounding;
  const T* x_row = static_cast<const T*>(to.x) + token * to.x_stride;
  const auto first = [](int i) { return static_cast<int>(i * blockDim.x + threadIdx.x) * kVec<T>; };
  Vec<T> weight[kVecs] = {}, x[kVecs] = {};

  let_next_start();
#pragma unroll
  for (int i = 0; i < kVecs; ++i) {
    if (first(i) < to.columns) weight[i] = load_constant(static_cast<const T*>(p.weight) + first(i));
  }
  wait_for_previous();
#pragma unroll
  for (int i = 0; i < kVecs; ++i) {
    if (first(i) < to.columns) x[i] = load_streaming(x_row + first(i));
  }
  float squares = 0.0f;
#pragma unroll
  for (int i = 0; i < kVecs; ++i) {
#pragma unroll
    for (int j = 0; j < kVec<T>; ++j) squares = fmaf(element(x[i], j), element(x[i], j), squares);
  }
  const float share = 1.0f / to.columns;
  const float by = rsqrtf(fmaf(block_sum(squares, partial), share, p.eps));

  float most[kVecs], row_most = 0.0f;
#pragma unroll
  for (int i = 0; i < kVecs; ++i) {
    float y[kVec<T>];
#pragma unroll
    for (int j = 0; j < kVec<T>; ++j) y[j] = element(x[i], j) * by * element(weight[i], j);
    if (first(i) < to.columns) x[i] = pack<T>(y);
    most[i] = largest_of(x[i]);
    row_most = fmaxf(row_most, most[i]);
  }
  if (!to.in_blocks) row_most = block_max(row_most, partial + 32);

  uint8_t* codes = static_cast<uint8_t*>(to.codes) + token * to.code_stride;
  float* scales = to.scales + token * (to.in_blocks ? to.scale_stride : 1);
#pragma unroll
  for (int i = 0; i < kVecs; ++i) {
    float largest = row_most;
    if (to.in_blocks) {
      largest = most[i];
#pragma unroll
      for (int offset = 8; offset > 0; offset /= 2) {
        largest = fmaxf(largest, __shfl_xor_sync(kFullWarp, largest, offset));
      }
    }
    if (first(i) >= to.columns) continue;
    const float scale = to.fixed != nullptr ? *to.fixed : scale_for(largest, to.bound);
    if (to.in_blocks ? first(i) % kFp8Block == 0 : first(i) == 0) scales[first(i) / kFp8Block] = scale;
    *reinterpret_cast<uint2*>(codes + first(i)) = codes_of(x[i], 1.0f / scale);
  }
  const int filled = (to.columns + kFp8Block - 1) / kFp8Block + static_cast<int>(threadIdx.x);
  if (to.in_blocks && filled < to.scale_stride) scales[filled] = 0.0f;
}

}  // namespace

// ---- host ----

cudaError_t norm_quantise_e4m3(const NormQuantiseParams& p, DType dtype, cudaStream_t stream) {
  if (p.rounding.tokens == 0 || p.rounding.columns == 0) return cudaSuccess;
  return by_half_dtype(dtype, [&]<typename T>() {
    const int threads = (p.rounding.columns / kVec<T> + kVecs * 32 - 1) / (kVecs * 32) * 32;
    if (threads > kMaxThreads) return cudaErrorInvalidValue;
    return launch(norm_quantise_kernel<T>, dim3(static_cast<unsigned>(p.rounding.tokens)), threads, 0, stream,
                  p);
  });
}

}  // namespace tgi
