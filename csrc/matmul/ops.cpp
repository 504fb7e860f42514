#include <algorithm>
#include <memory>

#include "common/torch_cpu.h"
#include "matmul/cpu_params.h"

namespace tgi {
namespace {

bool is_bfloat16(const Tensor& weight, const char* name) {
  const ScalarType type = weight.scalar_type();
  check(weight.is_cpu(), name, " is not on the CPU");
  check(type == ScalarType::BFloat16 || type == ScalarType::Float, name, " is neither bfloat16 nor float32");
  check(weight.is_contiguous(), name, " is not contiguous");
  return type == ScalarType::BFloat16;
}

void pack_linear_cpu(const Tensor& weight, const Tensor& packed) {
  check_dims(weight, 2, "weight");
  const int64_t out_features = weight.size(0), in_features = weight.size(1);
  check_shape(packed, {(out_features + kPanel - 1) / kPanel, in_features, kPanel}, "packed");
  const bool narrow = is_bfloat16(weight, "weight");
  check(is_bfloat16(packed, "packed") == narrow, "packed and weight differ in dtype");
  pack_linear(PackLinearParams{.weight = weight.const_data_ptr(),
                               .packed = packed.mutable_data_ptr(),
                               .out_features = out_features,
                               .in_features = in_features,
                               .is_bfloat16 = narrow});
}

void linear_cpu(const Tensor& x, const Tensor& packed, const std::optional<Tensor>& bias,
                const std::optional<Tensor>& residual, const Tensor& out) {
  check_dims(x, 2, "x");
  check_dims(out, 2, "out");
  const int64_t tokens = x.size(0), in_features = x.size(1), out_features = out.size(1);
  check_cpu<float>(x, "x");
  check(x.stride(1) == 1, "x: its rows are not contiguous");
  check_shape(out, {tokens, out_features}, "out");
  check_shape(packed, {(out_features + kPanel - 1) / kPanel, in_features, kPanel}, "packed");
  if (bias.has_value()) check_shape(*bias, {out_features}, "bias");
  if (residual.has_value()) check_shape(*residual, {tokens, out_features}, "residual");
  const int64_t scratch = tokens > 1 ? std::min(tokens, kRowBlock) * in_features : 0;
  const auto tiles = std::make_unique_for_overwrite<float[]>(static_cast<size_t>(scratch));
  linear(LinearParams{
      .x = static_cast<const float*>(x.const_data_ptr()),
      .packed = packed.const_data_ptr(),
      .bias = read_optional<float>(bias, "bias"),
      .residual = read_optional<float>(residual, "residual"),
      .out = write<float>(out, "out"),
      .tiles = tiles.get(),
      .x_stride = x.stride(0),
      .tokens = tokens,
      .in_features = in_features,
      .out_features = out_features,
      .is_bfloat16 = is_bfloat16(packed, "packed"),
  });
}

}  // namespace
}  // namespace tgi

STABLE_TORCH_LIBRARY_FRAGMENT(tgi, m) {
  m.def("pack_linear(Tensor weight, Tensor(a!) packed) -> ()");
  m.def("linear(Tensor x, Tensor packed, Tensor? bias, Tensor? residual, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(tgi, CPU, m) {
  m.impl("pack_linear", TORCH_BOX(&tgi::pack_linear_cpu));
  m.impl("linear", TORCH_BOX(&tgi::linear_cpu));
}
