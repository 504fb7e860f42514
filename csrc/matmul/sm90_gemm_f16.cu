#include "matmul/gemm.cuh"

namespace tgi::gemm {
template cudaError_t launch_choice<__half>(const MatmulParams&, const Choice&, int, cudaStream_t);
}
