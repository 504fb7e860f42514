#include <algorithm>
#include <memory>

#include "activation/gate.h"
#include "common/torch_cpu.h"
#include "quant/cpu_params.h"

namespace tgi {
namespace {

// [panels, groups, 32] numbers in 16 or 32 bits.
Numbers read_numbers(const Tensor& tensor, int64_t panels, int64_t groups, const char* name) {
  check_shape(tensor, {panels, groups, kPanel}, name);
  check(tensor.is_cpu(), name, " is not on the CPU");
  check(tensor.is_contiguous(), name, " is not contiguous");
  const ScalarType type = tensor.scalar_type();
  check(type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16, name,
        " is neither float32 nor float16 nor bfloat16");
  return {tensor.const_data_ptr(), type == ScalarType::Float  ? NumberType::f32
                                   : type == ScalarType::Half ? NumberType::f16
                                                              : NumberType::bf16};
}

QuantWeight read_weight(int64_t in_features, int64_t out_features, const Tensor& words, const Tensor& scales,
                        const std::optional<Tensor>& shifts, bool has_zeros, double zero,
                        const std::optional<Tensor>& table, bool is_e4m3, int64_t group_size) {
  check_dims(words, 4, "words");
  check_dims(scales, 3, "scales");
  const int64_t panels = (out_features + kPanel - 1) / kPanel, groups = scales.size(1), bits = words.size(2);
  check(bits >= 2 && bits <= 9, "codes have ", bits, " bits; 2 to 9 are known");
  check(!is_e4m3 || bits == 8, "codes of e4m3 have ", bits, " bits; they need to have 8");
  check(
      groups == 1 || (group_size >= kOctet && group_size % kOctet == 0 && groups * group_size == in_features),
      groups, " groups of ", group_size, " do not cover the ", in_features, " columns in multiples of 8");
  check_shape(words, {panels, (in_features + kQuantRun - 1) / kQuantRun, bits, kPanel}, "words");
  if (table.has_value()) {
    check_shape(*table, {16}, "table");
    check(bits == 4 && !is_e4m3, "codes of a table have 4 bits");
  }
  return {.words = read<int32_t>(words, "words"),
          .scales = read_numbers(scales, panels, groups, "scales"),
          .shifts = shifts.has_value() ? read_numbers(*shifts, panels, groups, "shifts")
                                       : Numbers{nullptr, NumberType::f32},
          .table = read_optional<float>(table, "table"),
          .groups = groups,
          .group_size = group_size,
          .zero = static_cast<float>(zero),
          .bits = static_cast<int>(bits),
          .values = table.has_value() ? CodeValues::table
                    : is_e4m3         ? CodeValues::e4m3
                                      : CodeValues::integer,
          .has_zeros = has_zeros};
}

void quant_linear_cpu(const Tensor& x, const Tensor& words, const Tensor& scales,
                      const std::optional<Tensor>& shifts, bool has_zeros, double zero,
                      const std::optional<Tensor>& table, bool is_e4m3, int64_t group_size,
                      const std::optional<Tensor>& bias, const std::optional<Tensor>& residual, int64_t gate,
                      const Tensor& out) {
  check_dims(x, 2, "x");
  check_dims(out, 2, "out");
  const int64_t tokens = x.size(0), in_features = x.size(1);
  const int64_t out_features = gate > 0 ? 2 * out.size(1) : out.size(1);
  check_cpu<float>(x, "x");
  check(x.stride(1) == 1, "x: its rows are not contiguous");
  check(out.size(0) == tokens, "out has ", out.size(0), " rows and x ", tokens);
  check(gate <= 0 || !residual.has_value(), "a gate and a residual; a product takes one of the two");
  if (bias.has_value()) check_shape(*bias, {out_features}, "bias");
  if (residual.has_value()) check_shape(*residual, {tokens, out_features}, "residual");
  const int64_t scratch = tokens > 1 ? std::min(tokens, kRowBlock) * in_features : 0;
  const auto tiles = std::make_unique_for_overwrite<float[]>(static_cast<size_t>(scratch));
  const auto both =
      std::make_unique_for_overwrite<float[]>(static_cast<size_t>(gate > 0 ? tokens * out_features : 0));
  float* to = write<float>(out, "out");
  quant_linear(QuantLinearParams{
      .product = {.x = static_cast<const float*>(x.const_data_ptr()),
                  .packed = nullptr,
                  .bias = read_optional<float>(bias, "bias"),
                  .residual = read_optional<float>(residual, "residual"),
                  .out = gate > 0 ? both.get() : to,
                  .tiles = tiles.get(),
                  .x_stride = x.stride(0),
                  .tokens = tokens,
                  .in_features = in_features,
                  .out_features = out_features,
                  .is_bfloat16 = false},
      .weight = read_weight(in_features, out_features, words, scales, shifts, has_zeros, zero, table, is_e4m3,
                            group_size),
  });
  if (gate > 0) apply_gate(gate, {.x = both.get(), .out = to, .tokens = tokens, .inner = out_features / 2});
}

}  // namespace
}  // namespace tgi

STABLE_TORCH_LIBRARY_FRAGMENT(tgi, m) {
  m.def(
      "quant_linear(Tensor x, Tensor words, Tensor scales, Tensor? shifts, bool has_zeros, float zero, "
      "Tensor? table, bool is_e4m3, int group_size, Tensor? bias, Tensor? residual, int gate, Tensor(a!) "
      "out) "
      "-> ()");
}

STABLE_TORCH_LIBRARY_IMPL(tgi, CPU, m) { m.impl("quant_linear", TORCH_BOX(&tgi::quant_linear_cpu)); }
