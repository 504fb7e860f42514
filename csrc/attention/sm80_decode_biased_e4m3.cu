#include "attention/decode.cuh"

namespace tgi::decode {
template cudaError_t launch_type<E4M3>(const BiasedDecodeParams&, cudaStream_t);
}
