// Columns of activations in another order, for products whose matrix has its columns so.
#include "columns/cuda.h"
#include "common/gather.cuh"
#include "common/pdl.cuh"

namespace tgi {
namespace {

// ---- device ----

constexpr int kThreads = 256;
constexpr int kMostStaged = 48 * 1024;  // bytes of a row
constexpr int kPart = 128;              // vectors that a CTA makes of a row where there are few

// `parts` CTAs a row, each with the whole row in shared memory, for scattered reads, and vectors
// [part · per, part · per + per) of the result to make. The first places are known before the row is.
template <typename T>
__global__ void __launch_bounds__(kThreads) gather_kernel(const GatherParams p, int parts, int per) {
  extern __shared__ __align__(16) unsigned char memory[];
  T* row = reinterpret_cast<T*>(memory);
  const int64_t token = blockIdx.x / parts;
  const int begin = static_cast<int>(blockIdx.x % parts) * per, end = min(begin + per, p.outs / kVec<T>);
  const T* x_row = static_cast<const T*>(p.x) + token * p.x_stride;
  T* out_row = static_cast<T*>(p.out) + token * p.out_stride;
  int at = begin + static_cast<int>(threadIdx.x);

  let_next_start();
  Places<T> places = {};
  if (at < end) places = places_of<T>(p.order + at * kVec<T>, p.columns);
  if (threadIdx.x == 0) end_row(row, p.columns);
  wait_for_previous();
#pragma unroll 4
  for (int i = threadIdx.x; i < p.columns / kVec<T>; i += kThreads) {
    store(row + i * kVec<T>, load_streaming(x_row + i * kVec<T>));
  }
  __syncthreads();
  while (at < end) {
    store(out_row + at * kVec<T>, gathered(row, places));
    at += kThreads;
    if (at < end) places = places_of<T>(p.order + at * kVec<T>, p.columns);
  }
}

// Rows of any length and alignment, element by element. `chunks` CTAs a row.
template <typename T>
__global__ void __launch_bounds__(kThreads) gather_any_kernel(const GatherParams p, int chunks) {
  const int64_t token = blockIdx.x / chunks;
  const int i = static_cast<int>(blockIdx.x % chunks) * kThreads + static_cast<int>(threadIdx.x);
  let_next_start();
  const int from = i < p.outs ? __ldg(p.order + i) : 0;
  wait_for_previous();
  if (i >= p.outs) return;
  T element = static_cast<T>(~0u);
  if (from >= 0 && from < p.columns) element = static_cast<const T*>(p.x)[token * p.x_stride + from];
  static_cast<T*>(p.out)[token * p.out_stride + i] = element;
}

// ---- host ----

template <typename T>
cudaError_t launch_gather(const GatherParams& p, cudaStream_t stream) {
  const int shared_bytes = (p.columns + kBehind<T>)*static_cast<int>(sizeof(T));
  if (!p.aligned || shared_bytes > kMostStaged) {
    const int chunks = (p.outs + kThreads - 1) / kThreads;
    return launch(gather_any_kernel<T>, dim3(static_cast<unsigned>(p.tokens * chunks)), kThreads, 0, stream,
                  p, chunks);
  }
  const int vectors = p.outs / kVec<T>;
  const int parts = p.tokens > 32 ? 1 : (vectors + kPart - 1) / kPart;
  return launch(gather_kernel<T>, dim3(static_cast<unsigned>(p.tokens * parts)), kThreads, shared_bytes,
                stream, p, parts, (vectors + parts - 1) / parts);
}

}  // namespace

cudaError_t gather_columns(const GatherParams& p, cudaStream_t stream) {
  if (p.tokens == 0 || p.outs == 0) return cudaSuccess;
  return p.element_bytes == 2 ? launch_gather<uint16_t>(p, stream) : launch_gather<uint32_t>(p, stream);
}

}  // namespace tgi
