#include "attention/decode.cuh"

namespace tgi::decode {
template cudaError_t launch_type<__half>(const BiasedDecodeParams&, cudaStream_t);
}
