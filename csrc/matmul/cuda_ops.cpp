// Schemas of this family's ops that only CUDA implements.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(tgi, m) {
  m.def(
      "matmul_gemm(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, int epilogue, Tensor(a!) out) "
      "-> ()");
  m.def(
      "matmul_skinny(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, int epilogue, Tensor(a!) out) "
      "-> ()");
}
