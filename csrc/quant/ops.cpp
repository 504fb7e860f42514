#include <algorithm>
#include <memory>

#include "common/torch_cpu.h"
#include "quant/cpu_params.h"

namespace tgi {
namespace {

void quant_linear_cpu(const Tensor& x, const Tensor& words, const Tensor& scales, const Tensor& offsets,
                      int64_t bits, int64_t group_size, const std::optional<Tensor>& bias,
                      const std::optional<Tensor>& residual, const Tensor& out) {
  check_dims(x, 2, "x");
  check_dims(out, 2, "out");
  check_dims(scales, 3, "scales");
  check(bits == 4 || bits == 8, "bits is ", bits, "; codes have 4 or 8");
  const int64_t tokens = x.size(0), in_features = x.size(1), out_features = out.size(1);
  const int64_t codes = 32 / bits, panels = (out_features + kPanel - 1) / kPanel, groups = scales.size(1);
  check_cpu<float>(x, "x");
  check(x.stride(1) == 1, "x: its rows are not contiguous");
  check(groups == 1 || (group_size % 8 == 0 && groups * group_size == in_features), groups, " groups of ",
        group_size, " do not cover the ", in_features, " columns in multiples of 8");
  check_shape(out, {tokens, out_features}, "out");
  check_shape(words, {panels, (in_features + codes - 1) / codes, kPanel}, "words");
  check_shape(scales, {panels, groups, kPanel}, "scales");
  check_shape(offsets, {panels, groups, kPanel}, "offsets");
  if (bias.has_value()) check_shape(*bias, {out_features}, "bias");
  if (residual.has_value()) check_shape(*residual, {tokens, out_features}, "residual");
  const int64_t scratch = tokens > 1 ? std::min(tokens, kRowBlock) * in_features : 0;
  const auto tiles = std::make_unique_for_overwrite<float[]>(static_cast<size_t>(scratch));
  quant_linear(QuantLinearParams{
      .product = {.x = static_cast<const float*>(x.const_data_ptr()),
                  .packed = nullptr,
                  .bias = read_optional<float>(bias, "bias"),
                  .residual = read_optional<float>(residual, "residual"),
                  .out = write<float>(out, "out"),
                  .tiles = tiles.get(),
                  .x_stride = x.stride(0),
                  .tokens = tokens,
                  .in_features = in_features,
                  .out_features = out_features,
                  .is_bfloat16 = false},
      .weight = {.words = read<int32_t>(words, "words"),
                 .scales = read<float>(scales, "scales"),
                 .offsets = read<float>(offsets, "offsets"),
                 .groups = groups,
                 .group_size = group_size,
                 .bits = static_cast<int>(bits)},
  });
}

}  // namespace
}  // namespace tgi

STABLE_TORCH_LIBRARY_FRAGMENT(tgi, m) {
  m.def(
      "quant_linear(Tensor x, Tensor words, Tensor scales, Tensor offsets, int bits, int group_size, "
      "Tensor? bias, Tensor? residual, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(tgi, CPU, m) { m.impl("quant_linear", TORCH_BOX(&tgi::quant_linear_cpu)); }
