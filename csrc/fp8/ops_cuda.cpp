#include "common/torch_cuda.h"
#include "fp8/cuda.h"

#if defined(TGI_HAVE_SM90)

namespace tgi {
namespace {

// What `epilogue` of the schema means: 0 adds the residual if there is one, 1 and up gate.
constexpr Activation kGates[] = {Activation::silu, Activation::gelu, Activation::gelu_tanh};

int64_t blocks_of(int64_t size) { return (size + kFp8Block - 1) / kFp8Block; }

void check_codes(const Tensor& codes, const Tensor& like, const char* name) {
  check_dims(codes, 2, name);
  check_cuda(codes, ScalarType::Byte, name);
  check(codes.get_device_index() == like.get_device_index(), name, " is on CUDA device ",
        codes.get_device_index(), "; the op runs on ", like.get_device_index());
  check(
      codes.size(1) % 16 == 0 && codes.stride(1) == 1 && is_aligned(codes.const_data_ptr(), codes.stride(0)),
      name, " needs rows of whole 16 bytes that start on 16 bytes");
}

const float* scales_of(const Tensor& scales, std::initializer_list<int64_t> shape, const Tensor& like,
                       const char* name) {
  check_cuda(scales, ScalarType::Float, name);
  check_shape(scales, shape, name);
  check(scales.is_contiguous() && scales.get_device_index() == like.get_device_index(), name,
        " is not contiguous, or on another device");
  return static_cast<const float*>(scales.const_data_ptr());
}

// Scales of blocks, in rows of whole vectors.
const float* block_scales_of(const Tensor& scales, int64_t rows, int64_t blocks, const Tensor& like,
                             const char* name) {
  check_dims(scales, 2, name);
  check(scales.size(1) == (blocks + 3) / 4 * 4, name, " has rows of ", scales.size(1), " scales; ", blocks,
        " blocks in whole vectors of 4 are needed");
  check(is_aligned(scales.const_data_ptr()), name, " does not start on 16 bytes");
  return scales_of(scales, {rows, scales.size(1)}, like, name);
}

// Where the rounded rows of x go.
QuantiseParams rounded(const Tensor& x, const std::optional<Tensor>& fixed, double bound, bool in_blocks,
                       const Tensor& codes, const Tensor& scales) {
  check_dims(x, 2, "x");
  check_rows(x, x, "x");
  check_codes(codes, x, "codes");
  const int64_t tokens = x.size(0), columns = x.size(1);
  check_shape(codes, {tokens, columns}, "codes");
  check(is_aligned(x.const_data_ptr(), x.stride(0) * 2), "x needs rows that start on 16 bytes");
  if (in_blocks) {
    block_scales_of(scales, tokens, blocks_of(columns), x, "scales");
  } else {
    scales_of(scales, {tokens}, x, "scales");
  }
  return {
      .codes = codes.mutable_data_ptr(),
      .scales = static_cast<float*>(scales.mutable_data_ptr()),
      .x = x.const_data_ptr(),
      .fixed = fixed.has_value() ? scales_of(*fixed, {1}, x, "fixed") : nullptr,
      .tokens = static_cast<int>(tokens),
      .columns = static_cast<int>(columns),
      .code_stride = codes.stride(0),
      .x_stride = x.stride(0),
      .scale_stride = in_blocks ? scales.size(1) : 0,
      .bound = static_cast<float>(bound),
      .in_blocks = in_blocks,
  };
}

void quantise_e4m3_cuda(const Tensor& x, const std::optional<Tensor>& fixed, double bound, bool in_blocks,
                        const Tensor& codes, const Tensor& scales) {
  const QuantiseParams params = rounded(x, fixed, bound, in_blocks, codes, scales);
  check_launch(quantise_e4m3(params, dtype_of(x, "x"), stream_of(x)), "quantise_e4m3");
}

void rms_norm_e4m3_cuda(const Tensor& x, const Tensor& weight, double eps, const std::optional<Tensor>& fixed,
                        double bound, bool in_blocks, const Tensor& codes, const Tensor& scales) {
  const QuantiseParams to = rounded(x, fixed, bound, in_blocks, codes, scales);
  check_rows(weight, x, "weight");
  check_shape(weight, {x.size(1)}, "weight");
  check(is_aligned(weight.const_data_ptr()), "weight does not start on 16 bytes");
  check(to.columns <= kMaxNormColumns, "x has ", to.columns, " columns; rows of up to ", kMaxNormColumns,
        " are normed and rounded at once");
  const NormQuantiseParams params{
      .rounding = to, .weight = weight.const_data_ptr(), .eps = static_cast<float>(eps)};
  check_launch(norm_quantise_e4m3(params, dtype_of(x, "x"), stream_of(x)), "rms_norm_e4m3");
}

void fp8_matmul_cuda(const Tensor& x, const Tensor& x_scales, const Tensor& weight,
                     const Tensor& weight_scales, bool in_blocks, const std::optional<Tensor>& bias,
                     const std::optional<Tensor>& residual, int64_t epilogue, const Tensor& out,
                     int64_t tile) {
  check_codes(x, x, "x");
  check_codes(weight, x, "weight");
  check_dims(out, 2, "out");
  const int64_t tokens = x.size(0), in_features = x.size(1), out_features = weight.size(0);
  const bool is_gated = epilogue > 0;
  check(epilogue >= 0 && epilogue <= 3, "epilogue is ", epilogue,
        "; it is 0 (none or residual), 1 (silu), 2 (gelu) or 3 (gelu tanh)");
  check(!is_gated || (out_features % 2 == 0 && !residual.has_value()),
        "a gated epilogue needs an even number of rows, here ", out_features, ", and takes no residual");
  check(!in_blocks || out_features % (is_gated ? 2 * kFp8Block : kFp8Block) == 0,
        "blocks of 128 rows do not cover ", out_features, " rows", is_gated ? " of gate and up" : "");
  check_rows(out, out, "out");
  check(out.get_device_index() == x.get_device_index(), "x and out are on different devices");
  check_shape(weight, {out_features, in_features}, "weight");
  check_shape(out, {tokens, is_gated ? out_features / 2 : out_features}, "out");
  if (bias.has_value()) {
    check_rows(*bias, out, "bias");
    check_shape(*bias, {out_features}, "bias");
  }
  if (residual.has_value()) {
    check_rows(*residual, out, "residual");
    check_shape(*residual, {tokens, out_features}, "residual");
  }
  const int64_t blocks = blocks_of(in_features);
  const Fp8Params params{
      .out = out.mutable_data_ptr(),
      .x = x.const_data_ptr(),
      .x_scales = in_blocks ? block_scales_of(x_scales, tokens, blocks, x, "x_scales")
                            : scales_of(x_scales, {tokens}, x, "x_scales"),
      .weight = weight.const_data_ptr(),
      .weight_scales =
          in_blocks ? block_scales_of(weight_scales, blocks_of(out_features), blocks, x, "weight_scales")
                    : scales_of(weight_scales, {out_features}, x, "weight_scales"),
      .bias = bias.has_value() ? bias->const_data_ptr() : nullptr,
      .residual = residual.has_value() ? residual->const_data_ptr() : nullptr,
      .tokens = static_cast<int>(tokens),
      .in_features = static_cast<int>(in_features),
      .out_features = static_cast<int>(out_features),
      .scale_stride = in_blocks ? static_cast<int>(x_scales.size(1)) : 0,
      .out_stride = out.stride(0),
      .x_stride = x.stride(0),
      .weight_stride = weight.stride(0),
      .residual_stride = residual.has_value() ? residual->stride(0) : 0,
      .in_blocks = in_blocks,
      .is_gated = is_gated,
      .activation = is_gated ? kGates[epilogue - 1] : Activation::silu,
      .tile = static_cast<int>(tile),
  };
  check_launch(fp8_matmul(params, dtype_of(out, "out"), stream_of(x)), "fp8_matmul");
}

}  // namespace
}  // namespace tgi

STABLE_TORCH_LIBRARY_IMPL(tgi, CUDA, m) {
  m.impl("quantise_e4m3", TORCH_BOX(&tgi::quantise_e4m3_cuda));
  m.impl("rms_norm_e4m3", TORCH_BOX(&tgi::rms_norm_e4m3_cuda));
  m.impl("fp8_matmul", TORCH_BOX(&tgi::fp8_matmul_cuda));
}

#endif
