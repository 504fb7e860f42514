#include "common/torch_cuda.h"
#include "matmul/cuda.h"

namespace tgi {
namespace {

// What `epilogue` of the schema means: 0 adds the residual if there is one, 1 and up gate.
constexpr Activation kGates[] = {Activation::silu, Activation::gelu, Activation::gelu_tanh};

MatmulParams params_of(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                       const std::optional<Tensor>& residual, int64_t epilogue, const Tensor& out) {
  check_dims(x, 2, "x");
  check_dims(weight, 2, "weight");
  const int64_t tokens = x.size(0), in_features = x.size(1), out_features = weight.size(0);
  const bool is_gated = epilogue > 0;
  check(epilogue >= 0 && epilogue <= 3, "epilogue is ", epilogue,
        "; it is 0 (none or residual), 1 (silu), 2 (gelu) or 3 (gelu tanh)");
  check(!is_gated || (out_features % 2 == 0 && !residual.has_value()),
        "a gated epilogue needs an even number of rows, here ", out_features, ", and takes no residual");
  check_rows(x, x, "x");
  check_rows(weight, x, "weight");
  check_rows(out, x, "out");
  check_shape(weight, {out_features, in_features}, "weight");
  check_shape(out, {tokens, is_gated ? out_features / 2 : out_features}, "out");
  check(is_aligned(x.const_data_ptr(), x.stride(0) * 2) &&
            is_aligned(weight.const_data_ptr(), weight.stride(0) * 2),
        "x and weight need to start on 16 bytes, with strides of whole 16 bytes (8 elements)");
  if (bias.has_value()) {
    check_rows(*bias, x, "bias");
    check_shape(*bias, {out_features}, "bias");
  }
  if (residual.has_value()) {
    check_rows(*residual, x, "residual");
    check_shape(*residual, {tokens, out_features}, "residual");
  }
  return MatmulParams{
      .out = out.mutable_data_ptr(),
      .x = x.const_data_ptr(),
      .weight = weight.const_data_ptr(),
      .bias = bias.has_value() ? bias->const_data_ptr() : nullptr,
      .residual = residual.has_value() ? residual->const_data_ptr() : nullptr,
      .tokens = static_cast<int>(tokens),
      .in_features = static_cast<int>(in_features),
      .out_features = static_cast<int>(out_features),
      .out_stride = out.stride(0),
      .x_stride = x.stride(0),
      .weight_stride = weight.stride(0),
      .residual_stride = residual.has_value() ? residual->stride(0) : 0,
      .is_gated = is_gated,
      .activation = is_gated ? kGates[epilogue - 1] : Activation::silu,
  };
}

void matmul_skinny_cuda(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                        const std::optional<Tensor>& residual, int64_t epilogue, const Tensor& out) {
  const MatmulParams params = params_of(x, weight, bias, residual, epilogue, out);
  check_launch(skinny_matmul(params, dtype_of(x, "x"), stream_of(x)), "matmul_skinny");
}

void matmul_gemm_cuda(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                      const std::optional<Tensor>& residual, int64_t epilogue, const Tensor& out) {
  const MatmulParams params = params_of(x, weight, bias, residual, epilogue, out);
  check_launch(gemm_matmul(params, dtype_of(x, "x"), stream_of(x)), "matmul_gemm");
}

}  // namespace
}  // namespace tgi

STABLE_TORCH_LIBRARY_IMPL(tgi, CUDA, m) {
  m.impl("matmul_gemm", TORCH_BOX(&tgi::matmul_gemm_cuda));
  m.impl("matmul_skinny", TORCH_BOX(&tgi::matmul_skinny_cuda));
}
