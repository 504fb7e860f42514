#include "common/torch_cuda.h"
#include "norm/cuda.h"

namespace tgi {
namespace {

void run(const Tensor& x, const Tensor* residual, const Tensor& weight, const std::optional<Tensor>& bias,
         bool centred, double eps, const Tensor& out, const char* op,
         const std::optional<Tensor>& order = std::nullopt) {
  check_dims(x, 2, "x");
  const int64_t tokens = x.size(0), hidden = x.size(1);
  check_rows(x, x, "x");
  check_rows(weight, x, "weight");
  check_rows(out, x, "out");
  check_shape(weight, {hidden}, "weight");
  check_shape(out, {tokens, hidden}, "out");
  if (bias.has_value()) {
    check_rows(*bias, x, "bias");
    check_shape(*bias, {hidden}, "bias");
  }
  if (order.has_value()) {
    check_order(*order, x, hidden);
    check(out.const_data_ptr() != x.const_data_ptr() || out.numel() == 0,
          "out is x; in another order it needs to be apart");
  }
  const DType dtype = dtype_of(x, "x");
  NormParams params{
      .out = out.mutable_data_ptr(),
      .x = x.const_data_ptr(),
      .residual = nullptr,
      .weight = weight.const_data_ptr(),
      .bias = bias.has_value() ? bias->const_data_ptr() : nullptr,
      .order = order.has_value() ? static_cast<const int32_t*>(order->const_data_ptr()) : nullptr,
      .tokens = tokens,
      .hidden = static_cast<int>(hidden),
      .out_stride = out.stride(0),
      .x_stride = x.stride(0),
      .residual_stride = 0,
      .eps = static_cast<float>(eps),
      .centred = centred,
      .aligned = false,
  };
  if (residual != nullptr) {
    check_rows(*residual, x, "residual");
    check_shape(*residual, {tokens, hidden}, "residual");
    params.residual = residual->mutable_data_ptr();
    params.residual_stride = residual->stride(0);
  }
  const int bytes = bytes_of(dtype);
  params.aligned = hidden * bytes % 16 == 0 && is_aligned(params.out, params.out_stride * bytes) &&
                   is_aligned(params.x, params.x_stride * bytes) && is_aligned(params.weight) &&
                   is_aligned(params.bias) && is_aligned(params.order) &&
                   is_aligned(params.residual, params.residual_stride * bytes);
  check_launch(norm(params, dtype, stream_of(x)), op);
}

void rms_norm_cuda(const Tensor& x, const Tensor& weight, double eps, const Tensor& out,
                   const std::optional<Tensor>& order) {
  run(x, nullptr, weight, std::nullopt, false, eps, out, "rms_norm", order);
}

void add_rms_norm_cuda(const Tensor& x, const Tensor& residual, const Tensor& weight, double eps,
                       const Tensor& out, const std::optional<Tensor>& order) {
  run(x, &residual, weight, std::nullopt, false, eps, out, "add_rms_norm", order);
}

void layer_norm_cuda(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, double eps,
                     const Tensor& out) {
  run(x, nullptr, weight, bias, true, eps, out, "layer_norm");
}

void add_layer_norm_cuda(const Tensor& x, const Tensor& residual, const Tensor& weight,
                         const std::optional<Tensor>& bias, double eps, const Tensor& out) {
  run(x, &residual, weight, bias, true, eps, out, "add_layer_norm");
}

}  // namespace
}  // namespace tgi

STABLE_TORCH_LIBRARY_IMPL(tgi, CUDA, m) {
  m.impl("rms_norm", TORCH_BOX(&tgi::rms_norm_cuda));
  m.impl("add_rms_norm", TORCH_BOX(&tgi::add_rms_norm_cuda));
  m.impl("layer_norm", TORCH_BOX(&tgi::layer_norm_cuda));
  m.impl("add_layer_norm", TORCH_BOX(&tgi::add_layer_norm_cuda));
}
