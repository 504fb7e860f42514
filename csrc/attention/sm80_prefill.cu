// Prefill's entry: the kernels of each cache type are compiled in a file of their own.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "attention/cuda.h"
#include "common/mma.cuh"

namespace tgi {
namespace prefill {
template <typename KV>
cudaError_t launch_type(const PrefillParams& p, cudaStream_t stream);
}

cudaError_t attention_prefill(const PrefillParams& p, CacheType type, cudaStream_t stream) {
  if (p.seqs == 0 || p.tokens == 0) return cudaSuccess;
  switch (type) {
    case CacheType::bf16:
      return prefill::launch_type<__nv_bfloat16>(p, stream);
    case CacheType::f16:
      return prefill::launch_type<__half>(p, stream);
    case CacheType::e4m3:
      return prefill::launch_type<E4M3>(p, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace tgi
