// Gated activations: SwiGLU and its kin. Shazeer 2020, arXiv:2002.05202.
#include "activation/cuda.h"
#include "activation/gated.cuh"
#include "common/dispatch.cuh"
#include "common/pdl.cuh"
#include "common/vec.cuh"

namespace tgi {
namespace {

// ---- device ----

constexpr int kThreads = 256;

// One vector of outputs a thread; `chunks` CTAs cover a row.
template <typename T>
__global__ void __launch_bounds__(kThreads) gated_kernel(const GatedParams p, int chunks) {
  const int64_t token = blockIdx.x / chunks;
  const int first = ((blockIdx.x % chunks) * kThreads + threadIdx.x) * kVec<T>;
  const T* gate_row = static_cast<const T*>(p.x) + token * p.x_stride;

  let_next_start();
  wait_for_previous();
  const Vec<T> gate = load_row(gate_row, first, p.inner, p.aligned);
  const Vec<T> up = load_row(gate_row + p.inner, first, p.inner, p.aligned);
  float out[kVec<T>];
#pragma unroll
  for (int i = 0; i < kVec<T>; ++i) out[i] = gated<T>(p.activation, element(gate, i), element(up, i));
  store_row(static_cast<T*>(p.out) + token * p.out_stride, first, p.inner, p.aligned, out);
}

}  // namespace

// ---- host ----

cudaError_t gated_activation(const GatedParams& p, DType dtype, cudaStream_t stream) {
  if (p.tokens == 0 || p.inner == 0) return cudaSuccess;
  return by_dtype(dtype, [&]<typename T>() {
    const int elements = kThreads * kVec<T>;
    const int chunks = (p.inner + elements - 1) / elements;
    return launch(gated_kernel<T>, dim3(static_cast<unsigned>(p.tokens * chunks)), kThreads, 0, stream, p,
                  chunks);
  });
}

}  // namespace tgi
