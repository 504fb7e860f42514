// Prefill's entry: the kernels of each cache type, without and with a bias, are compiled in a file of their
// own.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "attention/cuda.h"
#include "common/mma.cuh"

namespace tgi {
namespace prefill {
template <typename KV, typename Params>
cudaError_t launch_type(const Params& p, cudaStream_t stream);

template <typename Params>
cudaError_t launch_any(const Params& p, CacheType type, cudaStream_t stream) {
  if (p.seqs == 0 || p.tokens == 0) return cudaSuccess;
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
}  // namespace prefill

cudaError_t attention_prefill(const BiasedPrefillParams& p, CacheType type, cudaStream_t stream) {
  if (p.bias.at != nullptr) return prefill::launch_any(p, type, stream);
  return prefill::launch_any(static_cast<const PrefillParams&>(p), type, stream);
}

}  // namespace tgi
