#include "common/torch_cpu.h"
#include "sampling/cpu_params.h"

namespace tgi {
namespace {

void greedy_cpu(const Tensor& logits, const Tensor& ids, const Tensor& logprobs) {
  check_dims(logits, 2, "logits");
  const int64_t rows = logits.size(0), vocab = logits.size(1);
  check_cpu<float>(logits, "logits");
  check(vocab > 0, "logits has no columns");
  check(logits.stride(1) == 1, "logits: its rows are not contiguous");
  check_shape(ids, {rows}, "ids");
  check_shape(logprobs, {rows}, "logprobs");
  greedy(GreedyParams{
      .logits = static_cast<const float*>(logits.const_data_ptr()),
      .stride = logits.stride(0),
      .ids = write<int64_t>(ids, "ids"),
      .logprobs = write<float>(logprobs, "logprobs"),
      .rows = rows,
      .vocab = vocab,
  });
}

}  // namespace
}  // namespace tgi

STABLE_TORCH_LIBRARY_FRAGMENT(tgi, m) {
  m.def("greedy(Tensor logits, Tensor(a!) ids, Tensor(b!) logprobs) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(tgi, CPU, m) { m.impl("greedy", TORCH_BOX(&tgi::greedy_cpu)); }
