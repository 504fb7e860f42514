#include "attention/prefill.cuh"

namespace tgi::prefill {
template cudaError_t launch_type<__half>(const BiasedPrefillParams&, cudaStream_t);
}
