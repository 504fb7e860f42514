#include "columns/cuda.h"
#include "common/torch_cuda.h"

namespace tgi {
namespace {

void gather_columns_cuda(const Tensor& x, const Tensor& order, const Tensor& out) {
  check_dims(x, 2, "x");
  check_dims(order, 1, "order");
  const int64_t tokens = x.size(0), columns = x.size(1), outs = order.size(0);
  check_rows(x, x, "x");
  check_rows(out, x, "out");
  check_shape(out, {tokens, outs}, "out");
  check_order(order, x, outs);
  check(out.const_data_ptr() != x.const_data_ptr() || tokens == 0, "out is x; it needs to be apart");
  check(columns <= INT32_MAX && outs <= INT32_MAX, "x has ", columns, " columns and order ", outs);
  const int bytes = bytes_of(dtype_of(x, "x"));
  const GatherParams params{
      .out = out.mutable_data_ptr(),
      .x = x.const_data_ptr(),
      .order = static_cast<const int32_t*>(order.const_data_ptr()),
      .tokens = tokens,
      .columns = static_cast<int>(columns),
      .outs = static_cast<int>(outs),
      .x_stride = x.stride(0),
      .out_stride = out.stride(0),
      .element_bytes = bytes,
      .aligned = columns * bytes % 16 == 0 && outs * bytes % 16 == 0 && is_aligned(order.const_data_ptr()) &&
                 is_aligned(x.const_data_ptr(), x.stride(0) * bytes) &&
                 is_aligned(out.const_data_ptr(), out.stride(0) * bytes),
  };
  check_launch(gather_columns(params, stream_of(x)), "gather_columns");
}

}  // namespace
}  // namespace tgi

STABLE_TORCH_LIBRARY_IMPL(tgi, CUDA, m) { m.impl("gather_columns", TORCH_BOX(&tgi::gather_columns_cuda)); }
