#include "fp8/gemm.cuh"

namespace tgi::fp8 {
template cudaError_t launch_choice<__nv_bfloat16>(const Fp8Params&, int, int, cudaStream_t);
}
