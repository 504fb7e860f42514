// Schemas of this family's ops that only CUDA implements.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(tgi, m) {
  m.def(
      "quantise_e4m3(Tensor x, Tensor? fixed, float bound, bool in_blocks, Tensor(a!) codes, Tensor(b!) "
      "scales) "
      "-> ()");
  m.def(
      "rms_norm_e4m3(Tensor x, Tensor weight, float eps, Tensor? fixed, float bound, bool in_blocks, "
      "Tensor(a!) codes, Tensor(b!) scales) -> ()");
  m.def(
      "fp8_matmul(Tensor x, Tensor x_scales, Tensor weight, Tensor weight_scales, bool in_blocks, Tensor? "
      "bias, "
      "Tensor? residual, int epilogue, Tensor(a!) out, int tile=-1) -> ()");
}
