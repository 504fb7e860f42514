// Decode's entry: the kernels of each cache type, without and with a bias, are compiled in a file of their
// own.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "attention/cuda.h"
#include "common/mma.cuh"

namespace tgi {
namespace decode {
template <typename KV, typename Params>
cudaError_t launch_type(const Params& p, cudaStream_t stream);

template <typename Params>
cudaError_t launch_any(const Params& p, CacheType type, cudaStream_t stream) {
  if (p.seqs == 0) return cudaSuccess;
  switch (type) {
    case CacheType::bf16:
      return launch_type<__nv_bfloat16>(p, stream);
    case CacheType::f16:
      return launch_type<__half>(p, stream);
    case CacheType::e4m3:
      return launch_type<E4M3>(p, stream);
  }
  return cudaErrorInvalidValue;
}
}  // namespace decode

int decode_rows(int rows, int head_dim) {
  if (rows <= 8) return 8;
  return rows <= 16 || head_dim > 128 ? 16 : 32;
}

cudaError_t attention_decode(const BiasedDecodeParams& p, CacheType type, cudaStream_t stream) {
  if (p.bias.at != nullptr) return decode::launch_any(p, type, stream);
  return decode::launch_any(static_cast<const DecodeParams&>(p), type, stream);
}

}  // namespace tgi
