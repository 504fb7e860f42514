// The tile of an fp8 product for each shape. docs/kernels/fp8_gemm.md.
#include "common/dispatch.cuh"
#include "fp8/gemm.cuh"

namespace tgi {
namespace fp8 {

extern template cudaError_t launch_choice<__half>(const Fp8Params&, int, int, cudaStream_t);
extern template cudaError_t launch_choice<__nv_bfloat16>(const Fp8Params&, int, int, cudaStream_t);

int choose(const Fp8Params& p, int sms) {
  (void)sms;
  return p.tile >= 0 ? p.tile : p.tokens <= 16 ? 0 : p.tokens <= 64 ? 1 : p.tokens <= 128 ? 2 : 4;
}

}  // namespace fp8

cudaError_t fp8_matmul(const Fp8Params& p, DType dtype, cudaStream_t stream) {
  if (p.tokens == 0 || p.out_features == 0) return cudaSuccess;
  int device = 0, sms = 0;
  if (const cudaError_t error = cudaGetDevice(&device)) return error;
  if (const cudaError_t error = cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device))
    return error;
  const int tile = fp8::choose(p, sms);
  return by_half_dtype(dtype, [&]<typename T>() { return fp8::launch_choice<T>(p, tile, sms, stream); });
}

}  // namespace tgi
