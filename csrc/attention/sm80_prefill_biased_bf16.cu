#include "attention/prefill.cuh"

namespace tgi::prefill {
template cudaError_t launch_type<__nv_bfloat16>(const BiasedPrefillParams&, cudaStream_t);
}
