#include "common/torch_cuda.h"
#include "quant/cuda.h"

namespace tgi {
namespace {

constexpr int64_t kEdge = 64;  // rows of a strip, columns of a piece

QuantMatrix matrix_of(const Tensor& words, const Tensor& pairs, int64_t bits, int64_t group_size,
                      bool half_scales, int64_t rows, int64_t columns) {
  check(bits == 4 || bits == 8, "bits is ", bits, "; codes have 4 or 8");
  check_cuda(words, ScalarType::Int, "words");
  check_cuda(pairs, ScalarType::Int, "pairs");
  check(words.is_contiguous() && pairs.is_contiguous() && is_aligned(words.const_data_ptr()) &&
            is_aligned(pairs.const_data_ptr()),
        "words and pairs need to be contiguous and to start on 16 bytes");
  check_dims(pairs, 3, "pairs");
  const int64_t strips = (rows + kEdge - 1) / kEdge, pieces = (columns + kEdge - 1) / kEdge;
  const int64_t groups = pairs.size(1);
  check_shape(words, {strips, pieces, kEdge * kEdge * bits / 32}, "words");
  check_shape(pairs, {strips, groups, kEdge}, "pairs");
  check(group_size > 0 && group_size % 16 == 0 && groups == (pieces * kEdge + group_size - 1) / group_size,
        groups, " groups of ", group_size, " do not cover ", pieces,
        " pieces of 64 columns in multiples of 16");
  return {.words = words.const_data_ptr(),
          .scales = pairs.const_data_ptr(),
          .rows = static_cast<int>(rows),
          .columns = static_cast<int>(columns),
          .groups = static_cast<int>(groups),
          .group_size = static_cast<int>(group_size),
          .bits = static_cast<int>(bits),
          .scale_dtype = half_scales ? DType::f16 : DType::bf16};
}

// Whether groups of four elements can be accessed at once.
bool is_quads(const Tensor& tensor) {
  return reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 8 == 0 && tensor.stride(0) % 4 == 0;
}

void quant_matmul_cuda(const Tensor& x, const Tensor& words, const Tensor& pairs, int64_t bits,
                       int64_t group_size, bool half_scales, const std::optional<Tensor>& bias,
                       const std::optional<Tensor>& residual, const Tensor& out) {
#if defined(TGI_HAVE_SM90)
  check_dims(x, 2, "x");
  check_dims(out, 2, "out");
  const int64_t tokens = x.size(0), columns = x.size(1), rows = out.size(1);
  check_rows(x, x, "x");
  check_rows(out, x, "out");
  check_shape(out, {tokens, rows}, "out");
  check(is_aligned(x.const_data_ptr(), x.stride(0) * 2),
        "x needs to start on 16 bytes, with a stride of whole 16 bytes (8 elements)");
  if (bias.has_value()) {
    check_rows(*bias, x, "bias");
    check_shape(*bias, {rows}, "bias");
  }
  if (residual.has_value()) {
    check_rows(*residual, x, "residual");
    check_shape(*residual, {tokens, rows}, "residual");
  }
  check_launch(
      quant_matmul(
          QuantMatmulParams{
              .out = out.mutable_data_ptr(),
              .x = x.const_data_ptr(),
              .bias = bias.has_value() ? bias->const_data_ptr() : nullptr,
              .residual = residual.has_value() ? residual->const_data_ptr() : nullptr,
              .weight = matrix_of(words, pairs, bits, group_size, half_scales, rows, columns),
              .tokens = static_cast<int>(tokens),
              .out_stride = out.stride(0),
              .x_stride = x.stride(0),
              .residual_stride = residual.has_value() ? residual->stride(0) : 0,
              .is_wide = rows % 4 == 0 && is_quads(out) && (!residual.has_value() || is_quads(*residual)),
          },
          dtype_of(x, "x"), stream_of(x)),
      "quant_matmul");
#else
  check(false, "quant_matmul was not built: this build has no code for Hopper (TGI_CUDA_ARCHS=90a)");
#endif
}

void quant_dequantise_cuda(const Tensor& words, const Tensor& pairs, int64_t bits, int64_t group_size,
                           bool half_scales, const Tensor& out) {
  check_dims(out, 2, "out");
  check(out.is_cuda() && out.is_contiguous(), "out needs to be contiguous, on a CUDA device");
  check_launch(
      quant_dequantise(matrix_of(words, pairs, bits, group_size, half_scales, out.size(0), out.size(1)),
                       out.mutable_data_ptr(), dtype_of(out, "out"), stream_of(out)),
      "quant_dequantise");
}

}  // namespace
}  // namespace tgi

STABLE_TORCH_LIBRARY_IMPL(tgi, CUDA, m) {
  m.impl("quant_matmul", TORCH_BOX(&tgi::quant_matmul_cuda));
  m.impl("quant_dequantise", TORCH_BOX(&tgi::quant_dequantise_cuda));
}
