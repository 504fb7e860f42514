#include "activation/cpu_params.h"
#include "common/torch_cpu.h"

namespace tgi {
namespace {

GatedParams params_of(const Tensor& x, const Tensor& out) {
  check_dims(out, 2, "out");
  check_shape(x, {out.size(0), 2 * out.size(1)}, "x");
  return {
      .x = read<float>(x, "x"), .out = write<float>(out, "out"), .tokens = out.size(0), .inner = out.size(1)};
}

void silu_and_mul_cpu(const Tensor& x, const Tensor& out) { silu_and_mul(params_of(x, out)); }
void gelu_and_mul_cpu(const Tensor& x, const Tensor& out) { gelu_and_mul(params_of(x, out)); }
void gelu_tanh_and_mul_cpu(const Tensor& x, const Tensor& out) { gelu_tanh_and_mul(params_of(x, out)); }

}  // namespace
}  // namespace tgi

STABLE_TORCH_LIBRARY_FRAGMENT(tgi, m) {
  m.def("silu_and_mul(Tensor x, Tensor(a!) out) -> ()");
  m.def("gelu_and_mul(Tensor x, Tensor(a!) out) -> ()");
  m.def("gelu_tanh_and_mul(Tensor x, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(tgi, CPU, m) {
  m.impl("silu_and_mul", TORCH_BOX(&tgi::silu_and_mul_cpu));
  m.impl("gelu_and_mul", TORCH_BOX(&tgi::gelu_and_mul_cpu));
  m.impl("gelu_tanh_and_mul", TORCH_BOX(&tgi::gelu_tanh_and_mul_cpu));
}
