#include "common/torch_cpu.h"

// On CPUs tgi_kernels/columns.py leaves it to torch.
STABLE_TORCH_LIBRARY_FRAGMENT(tgi, m) {
  m.def("gather_columns(Tensor x, Tensor order, Tensor(a!) out) -> ()");
}
