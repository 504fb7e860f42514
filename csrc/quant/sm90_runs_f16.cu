#include "quant/runs.cuh"

namespace tgi {

cudaError_t runs_matmul_f16(const RunsMatmulParams& params, const QuantRuns& weight, int sms,
                            cudaStream_t stream) {
  return runs::runs_matmul_of<__half>(params, weight, sms, stream);
}

}  // namespace tgi
