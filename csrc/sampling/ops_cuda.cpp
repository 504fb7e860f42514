#include "common/torch_cuda.h"
#include "sampling/cuda.h"

namespace tgi {
namespace {

// Whether the kernels built for Hopper can run on the current device.
bool has_clusters() {
#if defined(TGI_HAVE_SM90)
  int device = 0, major = 0;
  return cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess && major == 9;
#else
  return false;
#endif
}

void greedy_cuda(const Tensor& logits, const Tensor& ids, const Tensor& logprobs) {
  check_dims(logits, 2, "logits");
  const int64_t rows = logits.size(0), vocab = logits.size(1);
  check_rows(logits, logits, "logits");
  check(vocab > 0, "logits has no columns");
  check_cuda(ids, ScalarType::Long, "ids");
  check_cuda(logprobs, ScalarType::Float, "logprobs");
  check_shape(ids, {rows}, "ids");
  check_shape(logprobs, {rows}, "logprobs");
  check(ids.is_contiguous() && logprobs.is_contiguous(), "ids or logprobs is not contiguous");
  const DType dtype = dtype_of(logits, "logits");
  const int bytes = bytes_of(dtype);
  const GreedyParams params{
      .logits = logits.const_data_ptr(),
      .ids = static_cast<int64_t*>(ids.mutable_data_ptr()),
      .logprobs = static_cast<float*>(logprobs.mutable_data_ptr()),
      .rows = rows,
      .vocab = static_cast<int>(vocab),
      .stride = logits.stride(0),
      .aligned = vocab * bytes % 16 == 0 && is_aligned(logits.const_data_ptr(), logits.stride(0) * bytes),
  };
#if defined(TGI_HAVE_SM90)
  if (has_clusters()) return check_launch(greedy_sm90(params, dtype, stream_of(logits)), "greedy");
#endif
  check_launch(greedy_sm80(params, dtype, stream_of(logits)), "greedy");
}

}  // namespace
}  // namespace tgi

STABLE_TORCH_LIBRARY_IMPL(tgi, CUDA, m) { m.impl("greedy", TORCH_BOX(&tgi::greedy_cuda)); }
