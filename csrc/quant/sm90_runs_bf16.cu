#include "quant/runs.cuh"

namespace tgi {

cudaError_t runs_matmul_bf16(const RunsMatmulParams& params, const QuantRuns& weight, int sms,
                             cudaStream_t stream) {
  return runs::runs_matmul_of<__nv_bfloat16>(params, weight, sms, stream);
}

}  // namespace tgi
