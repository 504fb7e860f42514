#include "common/torch_cpu.h"
#include "norm/cpu_params.h"

namespace tgi {
namespace {

const int32_t* read_order(const std::optional<Tensor>& order, int64_t hidden, const Tensor& x,
                          const Tensor& out) {
  if (!order.has_value()) return nullptr;
  check_shape(*order, {hidden}, "order");
  const auto* columns = read<int32_t>(*order, "order");
  for (int64_t i = 0; i < hidden; ++i) {
    check(columns[i] >= 0 && columns[i] < hidden, "order[", i, "] is ", columns[i], "; x has ", hidden,
          " columns");
  }
  check(out.const_data_ptr() != x.const_data_ptr() || out.numel() == 0,
        "out is x; in another order it needs to be apart");
  return columns;
}

void run(const Tensor& x, const Tensor* residual, const Tensor& weight, const std::optional<Tensor>& bias,
         bool centred, double eps, const Tensor& out, const std::optional<Tensor>& order = std::nullopt) {
  check_dims(x, 2, "x");
  const int64_t tokens = x.size(0), hidden = x.size(1);
  check_cpu<float>(x, "x");
  check(x.stride(1) == 1, "x: its rows are not contiguous");
  check_shape(weight, {hidden}, "weight");
  if (bias.has_value()) check_shape(*bias, {hidden}, "bias");
  if (residual != nullptr) check_shape(*residual, {tokens, hidden}, "residual");
  check_shape(out, {tokens, hidden}, "out");
  norm(NormParams{
      .x = static_cast<const float*>(x.const_data_ptr()),
      .x_stride = x.stride(0),
      .residual = residual == nullptr ? nullptr : write<float>(*residual, "residual"),
      .weight = read<float>(weight, "weight"),
      .bias = read_optional<float>(bias, "bias"),
      .order = read_order(order, hidden, x, out),
      .out = write<float>(out, "out"),
      .tokens = tokens,
      .hidden = hidden,
      .eps = static_cast<float>(eps),
      .centred = centred,
  });
}

void rms_norm_cpu(const Tensor& x, const Tensor& weight, double eps, const Tensor& out,
                  const std::optional<Tensor>& order) {
  run(x, nullptr, weight, std::nullopt, false, eps, out, order);
}

void add_rms_norm_cpu(const Tensor& x, const Tensor& residual, const Tensor& weight, double eps,
                      const Tensor& out, const std::optional<Tensor>& order) {
  run(x, &residual, weight, std::nullopt, false, eps, out, order);
}

void layer_norm_cpu(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, double eps,
                    const Tensor& out) {
  run(x, nullptr, weight, bias, true, eps, out);
}

void add_layer_norm_cpu(const Tensor& x, const Tensor& residual, const Tensor& weight,
                        const std::optional<Tensor>& bias, double eps, const Tensor& out) {
  run(x, &residual, weight, bias, true, eps, out);
}

}  // namespace
}  // namespace tgi

STABLE_TORCH_LIBRARY_FRAGMENT(tgi, m) {
  m.def("rms_norm(Tensor x, Tensor weight, float eps, Tensor(a!) out, Tensor? order=None) -> ()");
  m.def(
      "add_rms_norm(Tensor x, Tensor(a!) residual, Tensor weight, float eps, Tensor(b!) out, "
      "Tensor? order=None) -> ()");
  m.def("layer_norm(Tensor x, Tensor weight, Tensor? bias, float eps, Tensor(a!) out) -> ()");
  m.def(
      "add_layer_norm(Tensor x, Tensor(a!) residual, Tensor weight, Tensor? bias, float eps, Tensor(b!) out) "
      "-> ()");
}

STABLE_TORCH_LIBRARY_IMPL(tgi, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&tgi::rms_norm_cpu));
  m.impl("add_rms_norm", TORCH_BOX(&tgi::add_rms_norm_cpu));
  m.impl("layer_norm", TORCH_BOX(&tgi::layer_norm_cpu));
  m.impl("add_layer_norm", TORCH_BOX(&tgi::add_layer_norm_cpu));
}
