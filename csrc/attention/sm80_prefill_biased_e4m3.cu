#include "attention/prefill.cuh"

namespace tgi::prefill {
template cudaError_t launch_type<E4M3>(const BiasedPrefillParams&, cudaStream_t);
}
