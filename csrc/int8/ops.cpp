#include <algorithm>
#include <memory>

#include "activation/gate.h"
#include "common/torch_cpu.h"
#include "int8/cpu_params.h"

namespace tgi {
namespace {

const uint8_t* read_codes(const Tensor& codes, int64_t panels, int64_t quads) {
  check_shape(codes, {panels, quads, kPanel, kQuad}, "codes");
  check(codes.is_cpu() && codes.scalar_type() == ScalarType::Byte, "codes are not uint8 on the CPU");
  check(codes.is_contiguous(), "codes is not contiguous");
  return static_cast<const uint8_t*>(codes.const_data_ptr());
}

void int8_linear_cpu(const Tensor& x, const Tensor& codes, const Tensor& scales, double input_scale,
                     const std::optional<Tensor>& bias, const std::optional<Tensor>& residual, int64_t gate,
                     const Tensor& out) {
  check_dims(x, 2, "x");
  check_dims(out, 2, "out");
  const int64_t tokens = x.size(0), in_features = x.size(1);
  const int64_t out_features = gate > 0 ? 2 * out.size(1) : out.size(1);
  const int64_t panels = (out_features + kPanel - 1) / kPanel, quads = (in_features + kQuad - 1) / kQuad;
  check_cpu<float>(x, "x");
  check(x.stride(1) == 1 || in_features == 1 || tokens == 0, "x: its rows are not contiguous");
  check(in_features <= kMostInt8Steps, "x has ", in_features, " columns; at most ", kMostInt8Steps,
        " can be");
  check(out.size(0) == tokens, "out has ", out.size(0), " rows and x ", tokens);
  check(gate <= 0 || !residual.has_value(), "a gate and a residual; a product takes one of the two");
  check_shape(scales, {panels, kPanel}, "scales");
  if (bias.has_value()) check_shape(*bias, {out_features}, "bias");
  if (residual.has_value()) check_shape(*residual, {tokens, out_features}, "residual");
  const int64_t rows = std::min(tokens, kRowBlock);
  const auto words = std::make_unique_for_overwrite<int32_t[]>(static_cast<size_t>(2 * rows * quads));
  float row_scales[kRowBlock];
  int32_t row_sums[kRowBlock];
  const auto both =
      std::make_unique_for_overwrite<float[]>(static_cast<size_t>(gate > 0 ? tokens * out_features : 0));
  float* to = write<float>(out, "out");
  int8_linear(Int8LinearParams{
      .product = {.x = static_cast<const float*>(x.const_data_ptr()),
                  .packed = nullptr,
                  .bias = read_optional<float>(bias, "bias"),
                  .residual = read_optional<float>(residual, "residual"),
                  .out = gate > 0 ? both.get() : to,
                  .tiles = nullptr,
                  .x_stride = x.stride(0),
                  .tokens = tokens,
                  .in_features = in_features,
                  .out_features = out_features,
                  .is_bfloat16 = false},
      .codes = read_codes(codes, panels, quads),
      .scales = read<float>(scales, "scales"),
      .input_scale = static_cast<float>(input_scale),
      .words = words.get(),
      .row_scales = row_scales,
      .row_sums = row_sums,
      .use_vnni = active_vnni().load(std::memory_order_relaxed),
  });
  if (gate > 0) apply_gate(gate, {.x = both.get(), .out = to, .tokens = tokens, .inner = out_features / 2});
}

}  // namespace
}  // namespace tgi

STABLE_TORCH_LIBRARY_FRAGMENT(tgi, m) {
  m.def(
      "int8_linear(Tensor x, Tensor codes, Tensor scales, float input_scale, Tensor? bias, Tensor? residual, "
      "int gate, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(tgi, CPU, m) { m.impl("int8_linear", TORCH_BOX(&tgi::int8_linear_cpu)); }
