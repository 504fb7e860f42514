// Schemas of this family's ops that only CUDA implements.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(tgi, m) {
  m.def(
      "quant_matmul(Tensor x, Tensor words, Tensor pairs, int bits, int group_size, bool half_scales, "
      "Tensor? bias, Tensor? residual, Tensor(a!) out) -> ()");
  m.def(
      "quant_dequantise(Tensor words, Tensor pairs, int bits, int group_size, bool half_scales, "
      "Tensor(a!) out) -> ()");
}
