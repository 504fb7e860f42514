// Schemas of the ops that CUDA alone has: kernels specialised for a step's shape, which `attention` of CPUs
// needs not.
#include "common/torch_cpu.h"

STABLE_TORCH_LIBRARY_FRAGMENT(tgi, m) {
  m.def(
      "attention_decode(Tensor(a!) out, Tensor q, Tensor kv_pages, Tensor page_table, Tensor kv_lens, "
      "int queries_per_seq, float scale, int window, float softcap, Tensor? alibi_slopes, Tensor? sinks, "
      "Tensor(b!) workspace, float k_scale=1.0, float v_scale=1.0, Tensor? bias=None, "
      "bool bias_by_distance=False) -> ()");
  m.def(
      "attention_decode_workspace(int seqs, int heads, int kv_heads, int head_dim, int queries_per_seq, "
      "int max_pages) -> int");
  m.def(
      "attention_prefill(Tensor(a!) out, Tensor q, Tensor kv_pages, Tensor page_table, Tensor query_starts, "
      "Tensor kv_lens, float scale, int window, float softcap, Tensor? alibi_slopes, Tensor? sinks, "
      "Tensor(b!) workspace, float k_scale=1.0, float v_scale=1.0, bool anchored=True, Tensor? bias=None, "
      "bool bias_by_distance=False) -> ()");
  m.def("attention_prefill_workspace(int head_dim, int max_pages) -> int");
}
