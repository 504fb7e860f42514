#include <torch/csrc/stable/ops.h>

#include "attention/bias_torch.h"
#include "attention/cuda.h"
#include "common/torch_cuda.h"

namespace tgi {
namespace {

constexpr float kLog2OfE = 1.4426950408889634f;
constexpr int64_t kAlign = 256;  // bytes, of the parts of a workspace

int64_t aligned(int64_t bytes) { return (bytes + kAlign - 1) / kAlign * kAlign; }

CacheType cache_type_of(const Tensor& kv_pages, const Tensor& q) {
  check(q.scalar_type() == ScalarType::BFloat16 || q.scalar_type() == ScalarType::Half, "q has dtype ",
        static_cast<int>(q.scalar_type()), "; attention on CUDA takes float16 and bfloat16");
  if (kv_pages.scalar_type() == ScalarType::Float8_e4m3fn) return CacheType::e4m3;
  check(kv_pages.scalar_type() == q.scalar_type(), "kv_pages has dtype ",
        static_cast<int>(kv_pages.scalar_type()), "; it needs q's, ", static_cast<int>(q.scalar_type()),
        ", or float8_e4m3fn");
  return kv_pages.scalar_type() == ScalarType::Half ? CacheType::f16 : CacheType::bf16;
}

const int* read_ints(const Tensor& tensor, const char* name) {
  check_cuda(tensor, ScalarType::Int, name);
  check(tensor.is_contiguous(), name, " is not contiguous");
  return static_cast<const int*>(tensor.const_data_ptr());
}

const float* read_heads(const std::optional<Tensor>& tensor, int64_t heads, const char* name) {
  if (!tensor.has_value()) return nullptr;
  check_cuda(*tensor, ScalarType::Float, name);
  check_shape(*tensor, {heads}, name);
  check(tensor->is_contiguous(), name, " is not contiguous");
  return static_cast<const float*>(tensor->const_data_ptr());
}

// [tokens, heads, head_dim] whose tokens may lie apart, every row of 16 aligned bytes.
void check_tokens(const Tensor& tensor, int64_t heads, int64_t head_dim, const char* name) {
  check(tensor.is_cuda(), name, " is not on a CUDA device");
  check_dims(tensor, 3, name);
  check(tensor.size(1) == heads && tensor.size(2) == head_dim, name, " has ", tensor.size(1), " heads of ",
        tensor.size(2), "; it needs ", heads, " of ", head_dim);
  check(tensor.numel() == 0 || (tensor.stride(2) == 1 && (heads == 1 || tensor.stride(1) == head_dim)), name,
        ": the heads of a token are not contiguous");
  check(is_aligned(tensor.const_data_ptr(), tensor.stride(0) * 2), name,
        " needs to start on 16 bytes, with a token stride of whole 16 bytes (8 elements)");
}

AttentionBias read_cuda_bias(const std::optional<Tensor>& bias, bool by_distance, const Tensor& q) {
  check(!bias.has_value() || bias->is_cuda(), "bias is not on a CUDA device");
  return read_bias(bias, by_distance, q.size(0), q.size(1));
}

PagedAttention params_of(const Tensor& out, const Tensor& q, const Tensor& kv_pages, const Tensor& page_table,
                         const Tensor& kv_lens, double scale, int64_t window, double softcap,
                         const std::optional<Tensor>& alibi_slopes, const std::optional<Tensor>& sinks,
                         double k_scale, double v_scale) {
  check_dims(q, 3, "q");
  const int64_t heads = q.size(1), head_dim = q.size(2), seqs = page_table.size(0);
  check_dims(kv_pages, 5, "kv_pages");
  const int64_t kv_heads = kv_pages.size(2);
  check_shape(kv_pages, {kv_pages.size(0), 2, kv_heads, 16, head_dim}, "kv_pages");
  check(kv_pages.is_cuda() && kv_pages.is_contiguous(),
        "kv_pages needs to be contiguous and on a CUDA device");
  check(kv_heads > 0 && heads % kv_heads == 0, "q has ", heads, " heads and kv_pages ", kv_heads,
        "; the first is a multiple of the second");
  const int64_t multiple = kv_pages.scalar_type() == ScalarType::Float8_e4m3fn ? 16 : 8;
  check(head_dim > 0 && head_dim <= 256 && head_dim % multiple == 0, "head_dim is ", head_dim,
        "; attention on CUDA takes multiples of 8 (of 16 with float8 caches) up to 256");
  check_tokens(q, heads, head_dim, "q");
  check_tokens(out, heads, head_dim, "out");
  check(out.scalar_type() == q.scalar_type() && out.size(0) == q.size(0),
        "out and q differ in dtype or tokens");
  check_dims(page_table, 2, "page_table");
  check_shape(kv_lens, {seqs}, "kv_lens");
  check(window >= 0 && softcap >= 0, "window is ", window, " and softcap ", softcap,
        "; both are positive, or 0 for none");
  check(scale > 0, "scale is ", scale, "; it needs to be positive");
  const float products = static_cast<float>(scale * k_scale);
  const float cap = static_cast<float>(softcap);
  return {
      .out = out.mutable_data_ptr(),
      .q = q.const_data_ptr(),
      .kv_pages = kv_pages.const_data_ptr(),
      .page_table = read_ints(page_table, "page_table"),
      .kv_lens = read_ints(kv_lens, "kv_lens"),
      .alibi_slopes = read_heads(alibi_slopes, heads, "alibi_slopes"),
      .sinks = read_heads(sinks, heads, "sinks"),
      .out_stride = out.stride(0),
      .q_stride = q.stride(0),
      .pages = kv_pages.size(0),
      .max_pages = static_cast<int>(page_table.size(1)),
      .seqs = static_cast<int>(seqs),
      .heads = static_cast<int>(heads),
      .kv_heads = static_cast<int>(kv_heads),
      .head_dim = static_cast<int>(head_dim),
      .group = static_cast<int>(heads / kv_heads),
      .window = static_cast<int>(window),
      .gain = cap > 0 ? 2 * kLog2OfE * products / cap : kLog2OfE * products,
      .cap = cap * kLog2OfE,
      .v_scale = static_cast<float>(v_scale),
      .q_is_bf16 = q.scalar_type() == ScalarType::BFloat16,
  };
}

#if defined(TGI_HAVE_SM90)
bool is_hopper(const Tensor& tensor) {
  int major = 0;
  const cudaError_t error =
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, tensor.get_device_index());
  return error == cudaSuccess && major == 9;
}
#endif

// Workspace of decode: counters from its start, what is to be merged up to its end. So no call's partial
// results lie where another call, of any size that fits, has its counters.
struct Workspace {
  int64_t slots, counter_bytes, sum_bytes, value_bytes;
  int64_t bytes() const { return counter_bytes + sum_bytes + value_bytes + kAlign; }
};

Workspace workspace_for(int64_t seqs, int64_t heads, int64_t kv_heads, int64_t head_dim, int64_t queries,
                        int64_t max_pages) {
  check(kv_heads > 0 && heads % kv_heads == 0 && queries > 0 && head_dim > 0 && head_dim <= 256,
        "no workspace for ", heads, " heads, ", kv_heads, " kv_heads, ", queries, " queries of ", head_dim);
  const int64_t all_rows = queries * (heads / kv_heads);
  const int rows = decode_rows(static_cast<int>(all_rows), static_cast<int>(head_dim));
  const int64_t groups = seqs * kv_heads * ((all_rows + rows - 1) / rows);
  // A window may begin and end within a part: one more.
  const int64_t most = groups * (max_pages * 16 / decode_longest_part(rows, static_cast<int>(head_dim)) + 2);
  const int64_t few = decode_short_parts(rows), slots = most > few ? most : few;
  return {
      .slots = slots,
      .counter_bytes = aligned(slots * kDecodeMergeLevels * 4),
      .sum_bytes = aligned(slots * kDecodeMergeLevels * rows * 8),
      .value_bytes = aligned(slots * rows * padded_dim(static_cast<int>(head_dim)) * 4),
  };
}

int64_t attention_decode_workspace(int64_t seqs, int64_t heads, int64_t kv_heads, int64_t head_dim,
                                   int64_t queries, int64_t max_pages) {
  return workspace_for(seqs, heads, kv_heads, head_dim, queries, max_pages).bytes();
}

void attention_decode_cuda(const Tensor& out, const Tensor& q, const Tensor& kv_pages,
                           const Tensor& page_table, const Tensor& kv_lens, int64_t queries, double scale,
                           int64_t window, double softcap, const std::optional<Tensor>& alibi_slopes,
                           const std::optional<Tensor>& sinks, const Tensor& workspace, double k_scale,
                           double v_scale, const std::optional<Tensor>& bias, bool bias_by_distance) {
  const CacheType type = cache_type_of(kv_pages, q);
  BiasedDecodeParams params{params_of(out, q, kv_pages, page_table, kv_lens, scale, window, softcap,
                                      alibi_slopes, sinks, k_scale, v_scale)};
  check(queries > 0 && q.size(0) == params.seqs * queries, "q has ", q.size(0), " tokens; ", params.seqs,
        " sequences of ", queries, " need ", params.seqs * queries);
  const Workspace room =
      workspace_for(params.seqs, params.heads, params.kv_heads, params.head_dim, queries, params.max_pages);
  check(workspace.is_cuda() && workspace.is_contiguous() && is_aligned(workspace.const_data_ptr()),
        "workspace needs to be contiguous, on a CUDA device and on 16 bytes");
  const int64_t has = workspace.numel() * static_cast<int64_t>(workspace.element_size());
  check(has >= room.bytes(), "workspace has ", has, " bytes; this call needs ", room.bytes(),
        " (attention_decode_workspace tells)");
  char* start = static_cast<char*>(workspace.mutable_data_ptr());
  char* values = start + (has - room.value_bytes) / kAlign * kAlign;
  params.queries = static_cast<int>(queries);
  params.counters = reinterpret_cast<int*>(start);
  params.values = reinterpret_cast<float*>(values);
  params.sums = reinterpret_cast<float*>(values - room.sum_bytes);
  params.slots = static_cast<int>(room.slots);
  params.bias = read_cuda_bias(bias, bias_by_distance, q);
  check_launch(attention_decode(params, type, stream_of(q)), "attention_decode");
}

// Workspace of prefill, in 32-bit words: counters, and the totals of sequences that may be longer than a
// chunk.
constexpr int64_t kPrefillCounters = 32;

int64_t attention_prefill_workspace(int64_t head_dim, int64_t max_pages) {
  check(head_dim > 0 && head_dim <= 256, "no workspace for heads of ", head_dim);
  if (max_pages * 16 <= chunk_keys(static_cast<int>(head_dim))) return kPrefillCounters;
  int device = 0, sms = 0;
  check_launch(cudaGetDevice(&device), "attention_prefill_workspace");
  check_launch(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device),
               "attention_prefill_workspace");
  return kPrefillCounters + static_cast<int64_t>(sms) * prefill_total_floats(static_cast<int>(head_dim));
}

void attention_prefill_cuda(const Tensor& out, const Tensor& q, const Tensor& kv_pages,
                            const Tensor& page_table, const Tensor& query_starts, const Tensor& kv_lens,
                            double scale, int64_t window, double softcap,
                            const std::optional<Tensor>& alibi_slopes, const std::optional<Tensor>& sinks,
                            const Tensor& workspace, double k_scale, double v_scale, bool anchored,
                            const std::optional<Tensor>& bias, bool bias_by_distance) {
  const CacheType type = cache_type_of(kv_pages, q);
  BiasedPrefillParams params{params_of(out, q, kv_pages, page_table, kv_lens, scale, window, softcap,
                                       alibi_slopes, sinks, k_scale, v_scale)};
  check_shape(query_starts, {params.seqs + 1}, "query_starts");
  params.query_starts = read_ints(query_starts, "query_starts");
  check_cuda(workspace, ScalarType::Int, "workspace");
  const int64_t needed = attention_prefill_workspace(params.head_dim, params.max_pages);
  check(workspace.is_contiguous() && is_aligned(workspace.const_data_ptr()),
        "workspace needs to be contiguous and on 16 bytes");
  check(workspace.numel() >= needed, "workspace has ", workspace.numel(), " int32; this call needs ", needed,
        " (attention_prefill_workspace makes one)");
  params.counters = static_cast<int*>(workspace.mutable_data_ptr());
  params.totals = reinterpret_cast<float*>(params.counters + kPrefillCounters);
  params.tokens = q.size(0);
  params.anchored = anchored;
  params.bias = read_cuda_bias(bias, bias_by_distance, q);
#if defined(TGI_HAVE_SM90)
  if (params.bias.at == nullptr && is_hopper(q) && attention_prefill_sm90_takes(params, type)) {
    check_launch(attention_prefill_sm90(params, type, stream_of(q)), "attention_prefill");
    return;
  }
#endif
  check_launch(attention_prefill(params, type, stream_of(q)), "attention_prefill");
}

// The op of every device, which has no workspace to be given: it allocates one.
void attention_cuda(const Tensor& q, const Tensor& kv_pages, const Tensor& page_table,
                    const Tensor& query_starts, const Tensor& kv_lens, double scale, int64_t window,
                    double softcap, const std::optional<Tensor>& alibi_slopes,
                    const std::optional<Tensor>& sinks, const Tensor& out, const std::optional<Tensor>& bias,
                    bool bias_by_distance) {
  check_dims(q, 3, "q");
  check_dims(page_table, 2, "page_table");
  const Tensor workspace = torch::stable::new_zeros(
      q, {attention_prefill_workspace(q.size(2), page_table.size(1))}, ScalarType::Int);
  attention_prefill_cuda(out, q, kv_pages, page_table, query_starts, kv_lens, scale, window, softcap,
                         alibi_slopes, sinks, workspace, 1.0, 1.0, true, bias, bias_by_distance);
}

}  // namespace
}  // namespace tgi

STABLE_TORCH_LIBRARY_IMPL(tgi, CUDA, m) {
  m.impl("attention", TORCH_BOX(&tgi::attention_cuda));
  m.impl("attention_decode", TORCH_BOX(&tgi::attention_decode_cuda));
  m.impl("attention_prefill", TORCH_BOX(&tgi::attention_prefill_cuda));
}

STABLE_TORCH_LIBRARY_IMPL(tgi, CompositeExplicitAutograd, m) {
  m.impl("attention_decode_workspace", TORCH_BOX(&tgi::attention_decode_workspace));
  m.impl("attention_prefill_workspace", TORCH_BOX(&tgi::attention_prefill_workspace));
}
