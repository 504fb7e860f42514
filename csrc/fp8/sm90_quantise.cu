// Rows of 16-bit numbers to e4m3, with the scales that fill its range. docs/kernels/fp8_gemm.md.
#include "common/dispatch.cuh"
#include "common/pdl.cuh"
#include "fp8/quantise.cuh"

namespace tgi {

using namespace fp8;

namespace {

// ---- device ----

constexpr int kMaxThreads = 512;
constexpr int kVecs = 4;  // of a row that a thread keeps; longer rows are read again
// One CTA a row, which stays in registers between the two passes.
template <typename T>
__global__ void __launch_bounds__(kMaxThreads) quantise_rows_kernel(const QuantiseParams p) {
  __shared__ float partial[32];
  const int64_t token = blockIdx.x;
  const T* row = static_cast<const T*>(p.x) + token * p.x_stride;
  uint8_t* codes = static_cast<uint8_t*>(p.codes) + token * p.code_stride;
  const int vecs = p.columns / kVec<T>;
  let_next_start();
  wait_for_previous();
  Vec<T> x[kVecs] = {};
  float most = 0.0f;
#pragma unroll
  for (int i = 0; i < kVecs; ++i) {
    const int vec = static_cast<int>(i * blockDim.x + threadIdx.x);
    if (vec < vecs) x[i] = load_streaming(row + vec * kVec<T>);
  }
#pragma unroll
  for (int i = 0; i < kVecs; ++i) most = fmaxf(most, largest_of(x[i]));
  for (int vec = kVecs * blockDim.x + threadIdx.x; vec < vecs; vec += blockDim.x) {
    most = fmaxf(most, largest_of(*reinterpret_cast<const Vec<T>*>(row + vec * kVec<T>)));
  }
  const float scale = p.fixed != nullptr ? *p.fixed : scale_for(block_max(most, partial), p.bound);
  const float inverse = 1.0f / scale;
  if (threadIdx.x == 0) p.scales[token] = scale;
#pragma unroll
  for (int i = 0; i < kVecs; ++i) {
    const int vec = static_cast<int>(i * blockDim.x + threadIdx.x);
    if (vec < vecs) *reinterpret_cast<uint2*>(codes + vec * kVec<T>) = codes_of(x[i], inverse);
  }
  for (int vec = kVecs * blockDim.x + threadIdx.x; vec < vecs; vec += blockDim.x) {
    const auto again = *reinterpret_cast<const Vec<T>*>(row + vec * kVec<T>);
    *reinterpret_cast<uint2*>(codes + vec * kVec<T>) = codes_of(again, inverse);
  }
}

// Half a warp a block of 128 columns; a CTA takes a stretch of one row.
template <typename T>
__global__ void __launch_bounds__(kMaxThreads) quantise_blocks_kernel(const QuantiseParams p, int chunks) {
  const int64_t token = blockIdx.x / chunks;
  const int vec = (blockIdx.x % chunks) * kMaxThreads + threadIdx.x, first = vec * kVec<T>;
  let_next_start();
  wait_for_previous();
  Vec<T> x = {};
  if (first < p.columns) {
    x = load_streaming(static_cast<const T*>(p.x) + token * p.x_stride + first);
  }
  float most = largest_of(x);
#pragma unroll
  for (int offset = 8; offset > 0; offset /= 2) {
    most = fmaxf(most, __shfl_xor_sync(kFullWarp, most, offset));
  }
  if (first >= p.columns) {
    if (vec % 16 == 0 && vec / 16 < p.scale_stride) p.scales[token * p.scale_stride + vec / 16] = 0.0f;
    return;
  }
  const float scale = p.fixed != nullptr ? *p.fixed : scale_for(most, p.bound);
  if (vec % 16 == 0) p.scales[token * p.scale_stride + vec / 16] = scale;
  uint8_t* codes = static_cast<uint8_t*>(p.codes) + token * p.code_stride;
  *reinterpret_cast<uint2*>(codes + first) = codes_of(x, 1.0f / scale);
}

}  // namespace

// ---- host ----

cudaError_t quantise_e4m3(const QuantiseParams& p, DType dtype, cudaStream_t stream) {
  if (p.tokens == 0 || p.columns == 0) return cudaSuccess;
  return by_half_dtype(dtype, [&]<typename T>() {
    const int vecs = p.columns / kVec<T>;
    if (p.in_blocks) {
      const int chunks = (static_cast<int>(p.scale_stride) * 16 + kMaxThreads - 1) / kMaxThreads;
      return launch(quantise_blocks_kernel<T>, dim3(static_cast<unsigned>(p.tokens) * chunks), kMaxThreads, 0,
                    stream, p, chunks);
    }
    // Few rows leave the machine idle: more threads, each with less to read. Many are all resident at once.
    const int each = p.tokens <= 132 ? 1 : kVecs;
    const int threads = min(kMaxThreads, (vecs + 32 * each - 1) / (32 * each) * 32);
    return launch(quantise_rows_kernel<T>, dim3(static_cast<unsigned>(p.tokens)), threads, 0, stream, p);
  });
}

}  // namespace tgi
