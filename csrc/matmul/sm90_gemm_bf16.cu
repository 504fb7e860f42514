#include "matmul/gemm.cuh"

namespace tgi::gemm {
template cudaError_t launch_choice<__nv_bfloat16>(const MatmulParams&, const Choice&, int, cudaStream_t);
}
