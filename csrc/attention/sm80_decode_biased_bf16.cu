#include "attention/decode.cuh"

namespace tgi::decode {
template cudaError_t launch_type<__nv_bfloat16>(const BiasedDecodeParams&, cudaStream_t);
}
