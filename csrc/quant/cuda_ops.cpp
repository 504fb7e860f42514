// Schemas of this family's ops that only CUDA implements.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(tgi, m) {
  m.def(
      "quant_matmul(Tensor x, Tensor words, Tensor pairs, int bits, int group_size, bool half_scales, "
      "Tensor? bias, Tensor? residual, Tensor(a!) out) -> ()");
  m.def(
      "quant_dequantise(Tensor words, Tensor pairs, int bits, int group_size, bool half_scales, "
      "Tensor(a!) out) -> ()");
  m.def(
      "quant_matmul_runs(Tensor x, Tensor words, Tensor scales, Tensor runs, int scaling, Tensor? table, "
      "float table_scale, Tensor? bias, Tensor? residual, Tensor(a!) out, int ranges=0, int least_ctas=0) "
      "-> ()");
  m.def(
      "quant_dequantise_runs(Tensor words, Tensor scales, Tensor runs, int scaling, Tensor? table, "
      "Tensor(a!) out) -> ()");
}
