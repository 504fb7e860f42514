#include "common/torch_cuda.h"
#include "step/cuda.h"

namespace tgi {
namespace {

template <typename T>
const T* read_on_gpu(const Tensor& tensor, ScalarType dtype, const char* name) {
  check_cuda(tensor, dtype, name);
  check(tensor.is_contiguous(), name, " is not contiguous");
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <typename T>
T* write_on_gpu(const Tensor& tensor, ScalarType dtype, const char* name) {
  read_on_gpu<T>(tensor, dtype, name);
  return static_cast<T*>(tensor.mutable_data_ptr());
}

void decode_inputs_cuda(const Tensor& rows, const Tensor& kv_lens, const Tensor& added,
                        const Tensor& last_ids, const Tensor& page_table, const Tensor& token_ids,
                        const Tensor& positions, const Tensor& slots, const Tensor& page_tables) {
  const int64_t seqs = rows.numel();
  check_dims(page_table, 2, "page_table");
  const int64_t max_pages = page_table.size(1);
  check(page_table.size(0) >= last_ids.numel(), "page_table has ", page_table.size(0), " rows; last_ids has ",
        last_ids.numel());
  for (const Tensor* tensor : {&rows, &kv_lens, &added, &token_ids, &positions, &slots})
    check_shape(*tensor, {seqs}, "a sequence's");
  check_shape(page_tables, {seqs, max_pages}, "page_tables");
  const DecodeInputsParams params{
      .rows = read_on_gpu<int32_t>(rows, ScalarType::Int, "rows"),
      .kv_lens = read_on_gpu<int32_t>(kv_lens, ScalarType::Int, "kv_lens"),
      .added = read_on_gpu<int32_t>(added, ScalarType::Int, "added"),
      .last_ids = read_on_gpu<int64_t>(last_ids, ScalarType::Long, "last_ids"),
      .page_table = write_on_gpu<int32_t>(page_table, ScalarType::Int, "page_table"),
      .token_ids = write_on_gpu<int64_t>(token_ids, ScalarType::Long, "token_ids"),
      .positions = write_on_gpu<int32_t>(positions, ScalarType::Int, "positions"),
      .slots = write_on_gpu<int64_t>(slots, ScalarType::Long, "slots"),
      .page_tables = write_on_gpu<int32_t>(page_tables, ScalarType::Int, "page_tables"),
      .seqs = seqs,
      .max_pages = static_cast<int>(max_pages),
  };
  check_launch(decode_inputs(params, stream_of(rows)), "decode_inputs");
}

void keep_ids_cuda(const Tensor& ids, const Tensor& rows, const Tensor& last_ids) {
  check_shape(rows, {ids.numel()}, "rows");
  const KeepIdsParams params{
      .ids = read_on_gpu<int64_t>(ids, ScalarType::Long, "ids"),
      .rows = read_on_gpu<int32_t>(rows, ScalarType::Int, "rows"),
      .last_ids = write_on_gpu<int64_t>(last_ids, ScalarType::Long, "last_ids"),
      .count = ids.numel(),
  };
  check_launch(keep_ids(params, stream_of(ids)), "keep_ids");
}

void embed_cuda(const Tensor& ids, const Tensor& table, const Tensor& out) {
  check_dims(ids, 1, "ids");
  check_dims(table, 2, "table");
  const int64_t tokens = ids.numel(), row = table.size(1);
  check_shape(out, {tokens, row}, "out");
  check_rows(out, table, "out");
  check(table.is_contiguous() && out.is_contiguous(), "table and out need to be contiguous");
  const int64_t row_bytes = row * bytes_of(dtype_of(table, "table"));
  const bool wide = is_aligned(table.const_data_ptr(), row_bytes) && is_aligned(out.const_data_ptr());
  const int word_bytes = wide ? 16 : bytes_of(dtype_of(table, "table"));
  const EmbedParams params{
      .ids = read_on_gpu<int64_t>(ids, ScalarType::Long, "ids"),
      .table = table.const_data_ptr(),
      .out = out.mutable_data_ptr(),
      .tokens = tokens,
      .vocab = table.size(0),
      .row_words = static_cast<int>(row_bytes / word_bytes),
      .word_bytes = word_bytes,
  };
  check_launch(embed(params, stream_of(ids)), "embed");
}

}  // namespace
}  // namespace tgi

STABLE_TORCH_LIBRARY_IMPL(tgi, CUDA, m) {
  m.impl("decode_inputs", TORCH_BOX(&tgi::decode_inputs_cuda));
  m.impl("keep_ids", TORCH_BOX(&tgi::keep_ids_cuda));
  m.impl("embed", TORCH_BOX(&tgi::embed_cuda));
}
