#include "common/torch_cpu.h"

// On CPUs the engine makes a step's inputs with numpy; tgi_kernels/step.py has what it needs of the
// embedding.
STABLE_TORCH_LIBRARY_FRAGMENT(tgi, m) {
  m.def(
      "decode_inputs(Tensor rows, Tensor kv_lens, Tensor added, Tensor last_ids, Tensor(a!) page_table, "
      "Tensor(b!) token_ids, Tensor(c!) positions, Tensor(d!) slots, Tensor(e!) page_tables) -> ()");
  m.def("keep_ids(Tensor ids, Tensor rows, Tensor(a!) last_ids) -> ()");
  m.def("embed(Tensor ids, Tensor table, Tensor(a!) out) -> ()");
}
