// Decode's entry: the kernels of each cache type are compiled in a file of their own.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "attention/cuda.h"
#include "common/mma.cuh"

namespace tgi {
namespace decode {
template <typename KV>
cudaError_t launch_type(const DecodeParams& p, cudaStream_t stream);
}

int decode_rows(int rows, int head_dim) {
  if (rows <= 8) return 8;
  return rows <= 16 || head_dim > 128 ? 16 : 32;
}

cudaError_t attention_decode(const DecodeParams& p, CacheType type, cudaStream_t stream) {
  if (p.seqs == 0) return cudaSuccess;
  switch (type) {
    case CacheType::bf16:
      return decode::launch_type<__nv_bfloat16>(p, stream);
    case CacheType::f16:
      return decode::launch_type<__half>(p, stream);
    case CacheType::e4m3:
      return decode::launch_type<E4M3>(p, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace tgi
