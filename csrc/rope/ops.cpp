#include "common/torch_cpu.h"
#include "rope/cpu_params.h"

namespace tgi {
namespace {

constexpr int64_t kPageTokens = 16;

// A view whose tokens may lie apart, as q, k and v of one qkv buffer do; heads and their elements may not.
void check_heads(const Tensor& x, int64_t tokens, int64_t heads, int64_t head_dim, const char* name) {
  check_shape(x, {tokens, heads, head_dim}, name);
  check_cpu<float>(x, name);
  check(x.stride(2) == 1 && (heads == 1 || x.stride(1) == head_dim), name,
        ": a token's heads are not contiguous");
}

void check_range(const RotaryParams& p) {
  for (int64_t token = 0; token < p.tokens; ++token) {
    const int64_t position = p.positions[token], slot = p.slots[token];
    check(position >= 0 && position < p.table_positions, "positions[", token, "] is ", position,
          "; cos_sin has rows for 0 to ", p.table_positions - 1);
    check(slot >= -1 && slot < p.table_slots, "slots[", token, "] is ", slot, "; kv_pages has 0 to ",
          p.table_slots - 1);
  }
}

void rotary_kv_write_cpu(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& kv_pages,
                         const Tensor& cos_sin, const Tensor& positions, const Tensor& slots,
                         bool interleaved, const std::optional<Tensor>& q_norm,
                         const std::optional<Tensor>& k_norm, double eps) {
  check_dims(q, 3, "q");
  check_dims(k, 3, "k");
  check_dims(cos_sin, 2, "cos_sin");
  check_dims(kv_pages, 5, "kv_pages");
  const int64_t tokens = q.size(0), heads = q.size(1), head_dim = q.size(2), kv_heads = k.size(1);
  check_heads(q, tokens, heads, head_dim, "q");
  check_heads(k, tokens, kv_heads, head_dim, "k");
  check_heads(v, tokens, kv_heads, head_dim, "v");
  check_shape(kv_pages, {kv_pages.size(0), 2, kv_heads, kPageTokens, head_dim}, "kv_pages");
  check_shape(positions, {tokens}, "positions");
  check_shape(slots, {tokens}, "slots");
  check(cos_sin.size(1) <= head_dim && cos_sin.size(1) % 2 == 0, "cos_sin: rot_dim is ", cos_sin.size(1),
        "; it needs to be even and at most head_dim ", head_dim);
  if (q_norm.has_value()) check_shape(*q_norm, {head_dim}, "q_norm");
  if (k_norm.has_value()) check_shape(*k_norm, {head_dim}, "k_norm");
  const RotaryParams params{
      .q = static_cast<float*>(q.mutable_data_ptr()),
      .k = static_cast<const float*>(k.const_data_ptr()),
      .v = static_cast<const float*>(v.const_data_ptr()),
      .kv_pages = write<float>(kv_pages, "kv_pages"),
      .cos_sin = read<float>(cos_sin, "cos_sin"),
      .positions = read<int32_t>(positions, "positions"),
      .slots = read<int64_t>(slots, "slots"),
      .q_norm = read_optional<float>(q_norm, "q_norm"),
      .k_norm = read_optional<float>(k_norm, "k_norm"),
      .eps = static_cast<float>(eps),
      .tokens = tokens,
      .heads = heads,
      .kv_heads = kv_heads,
      .head_dim = head_dim,
      .rot_dim = cos_sin.size(1),
      .q_stride = q.stride(0),
      .k_stride = k.stride(0),
      .v_stride = v.stride(0),
      .table_positions = cos_sin.size(0),
      .table_slots = kv_pages.size(0) * kPageTokens,
      .interleaved = interleaved,
  };
  check_range(params);
  rotary_kv_write(params);
}

}  // namespace
}  // namespace tgi

STABLE_TORCH_LIBRARY_FRAGMENT(tgi, m) {
  m.def(
      "rotary_kv_write(Tensor(a!) q, Tensor k, Tensor v, Tensor(b!) kv_pages, Tensor cos_sin, Tensor "
      "positions, "
      "Tensor slots, bool interleaved, Tensor? q_norm, Tensor? k_norm, float eps) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(tgi, CPU, m) { m.impl("rotary_kv_write", TORCH_BOX(&tgi::rotary_kv_write_cpu)); }
