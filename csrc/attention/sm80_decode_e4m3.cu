#include "attention/decode.cuh"

namespace tgi::decode {
template cudaError_t launch_type<E4M3>(const DecodeParams&, cudaStream_t);
template cudaError_t launch_type<E4M3>(const PrefetchingDecodeParams&, cudaStream_t);
template cudaError_t launch_type<E4M3>(const PlannedDecodeParams&, cudaStream_t);
template cudaError_t launch_plan<E4M3, 128, 1>(const DecodeParams&, int*, cudaStream_t);
}  // namespace tgi::decode
