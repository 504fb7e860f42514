#include "attention/decode.cuh"

namespace tgi::decode {
template cudaError_t launch_type<__half>(const DecodeParams&, cudaStream_t);
template cudaError_t launch_type<__half>(const PrefetchingDecodeParams&, cudaStream_t);
template cudaError_t launch_type<__half>(const PlannedDecodeParams&, cudaStream_t);
template cudaError_t launch_plan<__half, 128, 1>(const DecodeParams&, int*, cudaStream_t);
}  // namespace tgi::decode
