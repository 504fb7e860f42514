#include "fp8/gemm.cuh"

namespace tgi::fp8 {
template cudaError_t launch_choice<__half>(const Fp8Params&, int, int, cudaStream_t);
}
