#include "attention/decode.cuh"

namespace tgi::decode {
template cudaError_t launch_type<__nv_bfloat16>(const DecodeParams&, cudaStream_t);
template cudaError_t launch_type<__nv_bfloat16>(const PrefetchingDecodeParams&, cudaStream_t);
template cudaError_t launch_type<__nv_bfloat16>(const PlannedDecodeParams&, cudaStream_t);
template cudaError_t launch_plan<__nv_bfloat16, 128, 1>(const DecodeParams&, int*, cudaStream_t);
}  // namespace tgi::decode
