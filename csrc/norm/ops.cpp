#include "common/torch_cpu.h"
#include "norm/cpu_params.h"

namespace tgi {
namespace {

void run(const Tensor& x, float* residual, const Tensor& weight, double eps, const Tensor& out) {
  check_dims(x, 2, "x");
  const int64_t tokens = x.size(0), hidden = x.size(1);
  check_cpu<float>(x, "x");
  check(x.stride(1) == 1, "x: its rows are not contiguous");
  check_shape(weight, {hidden}, "weight");
  check_shape(out, {tokens, hidden}, "out");
  rms_norm(RmsNormParams{
      .x = static_cast<const float*>(x.const_data_ptr()),
      .x_stride = x.stride(0),
      .residual = residual,
      .weight = read<float>(weight, "weight"),
      .out = write<float>(out, "out"),
      .tokens = tokens,
      .hidden = hidden,
      .eps = static_cast<float>(eps),
  });
}

void rms_norm_cpu(const Tensor& x, const Tensor& weight, double eps, const Tensor& out) {
  run(x, nullptr, weight, eps, out);
}

void add_rms_norm_cpu(const Tensor& x, const Tensor& residual, const Tensor& weight, double eps,
                      const Tensor& out) {
  check_dims(x, 2, "x");
  check_shape(residual, {x.size(0), x.size(1)}, "residual");
  run(x, write<float>(residual, "residual"), weight, eps, out);
}

}  // namespace
}  // namespace tgi

STABLE_TORCH_LIBRARY_FRAGMENT(tgi, m) {
  m.def("rms_norm(Tensor x, Tensor weight, float eps, Tensor(a!) out) -> ()");
  m.def("add_rms_norm(Tensor x, Tensor(a!) residual, Tensor weight, float eps, Tensor(b!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(tgi, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&tgi::rms_norm_cpu));
  m.impl("add_rms_norm", TORCH_BOX(&tgi::add_rms_norm_cpu));
}
