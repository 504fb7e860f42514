#include "activation/cuda.h"
#include "common/torch_cuda.h"

namespace tgi {
namespace {

void run(const Tensor& x, const Tensor& out, Activation activation, const char* op) {
  check_dims(out, 2, "out");
  const int64_t tokens = out.size(0), inner = out.size(1);
  check_shape(x, {tokens, 2 * inner}, "x");
  check_rows(x, x, "x");
  check_rows(out, x, "out");
  const DType dtype = dtype_of(x, "x");
  const int bytes = bytes_of(dtype);
  check_launch(
      gated_activation(
          GatedParams{
              .out = out.mutable_data_ptr(),
              .x = x.const_data_ptr(),
              .tokens = tokens,
              .inner = static_cast<int>(inner),
              .out_stride = out.stride(0),
              .x_stride = x.stride(0),
              .activation = activation,
              .aligned = inner * bytes % 16 == 0 && is_aligned(out.const_data_ptr(), out.stride(0) * bytes) &&
                         is_aligned(x.const_data_ptr(), x.stride(0) * bytes),
          },
          dtype, stream_of(x)),
      op);
}

void silu_and_mul_cuda(const Tensor& x, const Tensor& out) { run(x, out, Activation::silu, "silu_and_mul"); }
void gelu_and_mul_cuda(const Tensor& x, const Tensor& out) { run(x, out, Activation::gelu, "gelu_and_mul"); }
void gelu_tanh_and_mul_cuda(const Tensor& x, const Tensor& out) {
  run(x, out, Activation::gelu_tanh, "gelu_tanh_and_mul");
}

}  // namespace
}  // namespace tgi

STABLE_TORCH_LIBRARY_IMPL(tgi, CUDA, m) {
  m.impl("silu_and_mul", TORCH_BOX(&tgi::silu_and_mul_cuda));
  m.impl("gelu_and_mul", TORCH_BOX(&tgi::gelu_and_mul_cuda));
  m.impl("gelu_tanh_and_mul", TORCH_BOX(&tgi::gelu_tanh_and_mul_cuda));
}
