#include "attention/prefill.cuh"

namespace tgi::prefill {
template cudaError_t launch_type<E4M3>(const PrefillParams&, cudaStream_t);
template cudaError_t launch_design<E4M3>(const PrefillParams&, Design, cudaStream_t);
}  // namespace tgi::prefill
