#include "common/torch_cuda.h"
#include "rope/cuda.h"

namespace tgi {
namespace {

// A view whose tokens may lie apart, as q, k and v of one qkv buffer do; heads and their elements may not.
void check_heads(const Tensor& x, const Tensor& like, int64_t tokens, int64_t heads, int64_t head_dim,
                 const char* name) {
  check_shape(x, {tokens, heads, head_dim}, name);
  check_rows(x, like, name);
  check(heads == 1 || x.stride(1) == head_dim, name, ": a token's heads are not contiguous");
}

const void* head_norm(const std::optional<Tensor>& norm, const Tensor& q, const char* name) {
  if (!norm.has_value()) return nullptr;
  check_rows(*norm, q, name);
  check_shape(*norm, {q.size(2)}, name);
  return norm->const_data_ptr();
}

void rotary_kv_write_cuda(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& kv_pages,
                          const Tensor& cos_sin, const Tensor& positions, const Tensor& slots,
                          bool interleaved, const std::optional<Tensor>& q_norm,
                          const std::optional<Tensor>& k_norm, double eps) {
  check_dims(q, 3, "q");
  check_dims(k, 3, "k");
  check_dims(cos_sin, 2, "cos_sin");
  check_dims(kv_pages, 5, "kv_pages");
  const int64_t tokens = q.size(0), heads = q.size(1), head_dim = q.size(2), kv_heads = k.size(1);
  const int64_t rot_dim = cos_sin.size(1);
  check_heads(q, q, tokens, heads, head_dim, "q");
  check_heads(k, q, tokens, kv_heads, head_dim, "k");
  check_heads(v, q, tokens, kv_heads, head_dim, "v");
  const bool e4m3 = kv_pages.scalar_type() == ScalarType::Float8_e4m3fn;
  check(!e4m3 || q.scalar_type() != ScalarType::Float,
        "kv_pages is float8 and q float32; it needs to be of 16 bits");
  if (e4m3)
    check_cuda(kv_pages, ScalarType::Float8_e4m3fn, "kv_pages");
  else
    check_rows(kv_pages, q, "kv_pages");
  check_shape(kv_pages, {kv_pages.size(0), 2, kv_heads, kPageTokens, head_dim}, "kv_pages");
  check(kv_pages.is_contiguous(), "kv_pages is not contiguous");
  check_cuda(cos_sin, ScalarType::Float, "cos_sin");
  check(cos_sin.is_contiguous(), "cos_sin is not contiguous");
  check(rot_dim <= head_dim && rot_dim % 2 == 0, "cos_sin: rot_dim is ", rot_dim,
        "; it needs to be even and at most head_dim ", head_dim);
  check(head_dim % 2 == 0 && head_dim <= kRotaryMaxHeadDim, "head_dim is ", head_dim,
        "; it needs to be even and at most ", kRotaryMaxHeadDim);
  check_cuda(positions, ScalarType::Int, "positions");
  check_cuda(slots, ScalarType::Long, "slots");
  check_shape(positions, {tokens}, "positions");
  check_shape(slots, {tokens}, "slots");
  const DType dtype = dtype_of(q, "q");
  const int bytes = bytes_of(dtype);
  check_launch(rotary_kv_write(
                   RotaryParams{
                       .q = q.mutable_data_ptr(),
                       .k = k.const_data_ptr(),
                       .v = v.const_data_ptr(),
                       .kv_pages = kv_pages.mutable_data_ptr(),
                       .cos_sin = static_cast<const float*>(cos_sin.const_data_ptr()),
                       .positions = static_cast<const int32_t*>(positions.const_data_ptr()),
                       .slots = static_cast<const int64_t*>(slots.const_data_ptr()),
                       .q_norm = head_norm(q_norm, q, "q_norm"),
                       .k_norm = head_norm(k_norm, q, "k_norm"),
                       .tokens = tokens,
                       .q_stride = q.stride(0),
                       .k_stride = k.stride(0),
                       .v_stride = v.stride(0),
                       .heads = static_cast<int>(heads),
                       .kv_heads = static_cast<int>(kv_heads),
                       .head_dim = static_cast<int>(head_dim),
                       .rot_dim = static_cast<int>(rot_dim),
                       .eps = static_cast<float>(eps),
                       .interleaved = interleaved,
                       .aligned = is_aligned(q.const_data_ptr(), q.stride(0) * bytes) &&
                                  is_aligned(k.const_data_ptr(), k.stride(0) * bytes) &&
                                  is_aligned(v.const_data_ptr(), v.stride(0) * bytes) &&
                                  is_aligned(kv_pages.const_data_ptr()),
                       .e4m3 = e4m3,
                   },
                   dtype, stream_of(q)),
               "rotary_kv_write");
}

}  // namespace
}  // namespace tgi

STABLE_TORCH_LIBRARY_IMPL(tgi, CUDA, m) { m.impl("rotary_kv_write", TORCH_BOX(&tgi::rotary_kv_write_cuda)); }
