#include <algorithm>
#include <vector>

#include "attention/bias_torch.h"
#include "attention/cpu_params.h"
#include "common/parallel.h"
#include "common/torch_cpu.h"

namespace tgi {
namespace {

void check_sequences(const AttentionParams& p, int64_t seqs, int64_t tokens, int64_t pages) {
  check(p.query_starts[0] == 0 && p.query_starts[seqs] == tokens, "query_starts goes from ",
        p.query_starts[0], " to ", p.query_starts[seqs], "; q has ", tokens, " tokens");
  for (int64_t seq = 0; seq < seqs; ++seq) {
    const int64_t queries = p.query_starts[seq + 1] - p.query_starts[seq], kv_len = p.kv_lens[seq];
    check(queries >= 0 && queries <= kv_len, "sequence ", seq, " has ", queries, " queries and ", kv_len,
          " keys; every query's own key is among the keys");
    check(kv_len <= p.max_pages * kPageTokens, "sequence ", seq, " has ", kv_len, " keys; its ", p.max_pages,
          " pages hold ", p.max_pages * kPageTokens);
    if (queries == 0) continue;
    const int64_t oldest = p.window > 0 ? std::max<int64_t>(0, kv_len - queries - p.window + 1) : 0;
    for (int64_t page = oldest / kPageTokens; page * kPageTokens < kv_len; ++page) {
      const int64_t id = p.page_table[seq * p.max_pages + page];
      check(id >= 0 && id < pages, "page_table[", seq, "][", page, "] is ", id, "; kv_pages has 0 to ",
            pages - 1);
    }
  }
}

// Tasks of at most kMaxBlockRows rows, those with most keys first: the last ones handed out are the short
// ones.
std::vector<AttentionTask> blocks_of(const AttentionParams& p, int64_t seqs) {
  const int64_t group = p.heads / p.kv_heads, heads = std::min(group, kMaxBlockRows);
  const int64_t queries = kMaxBlockRows / heads;
  std::vector<AttentionTask> tasks;
  for (int64_t seq = 0; seq < seqs; ++seq) {
    const int64_t seq_queries = p.query_starts[seq + 1] - p.query_starts[seq];
    for (int64_t block = (seq_queries + queries - 1) / queries - 1; block >= 0; --block) {
      for (int64_t head = 0; head < p.heads; head += std::min(heads, group - head % group)) {
        tasks.push_back({
            .seq = static_cast<int32_t>(seq),
            .first = static_cast<int32_t>(block * queries),
            .queries = static_cast<int32_t>(std::min(queries, seq_queries - block * queries)),
            .head = static_cast<int32_t>(head),
            .heads = static_cast<int32_t>(std::min(heads, group - head % group)),
            .split = -1,
            .partial = 0,
        });
      }
    }
  }
  return tasks;
}

// Long sequences are shared among threads when there is less than a handful of tasks for each.
bool worth_splitting(size_t tasks) { return tasks < 4 * static_cast<size_t>(num_threads()); }

// The splits of every block as tasks of their own, and how to merge them.
struct Splits {
  std::vector<AttentionTask> tasks, merges;
  int64_t rows = 0;
};

Splits split(const AttentionParams& p, const std::vector<AttentionTask>& blocks) {
  Splits splits;
  for (const AttentionTask& block : blocks) {
    const int64_t first =
        p.kv_lens[block.seq] - p.query_starts[block.seq + 1] + p.query_starts[block.seq] + block.first;
    const int64_t oldest = p.window > 0 ? std::max<int64_t>(0, first - p.window + 1) : 0;
    const int64_t begin = oldest / kSplitTokens, end = (first + block.queries - 1) / kSplitTokens + 1;
    AttentionTask merge = block;
    merge.split = static_cast<int32_t>(end - begin);
    merge.partial = splits.rows;
    splits.merges.push_back(merge);
    for (int64_t at = begin; at < end; ++at) {
      AttentionTask task = block;
      task.split = static_cast<int32_t>(at);
      task.partial = splits.rows;
      splits.tasks.push_back(task);
      splits.rows += int64_t{block.queries} * block.heads;
    }
  }
  return splits;
}

void run(AttentionParams p, int64_t seqs) {
  const std::vector<AttentionTask> blocks = blocks_of(p, seqs);
  if (worth_splitting(blocks.size())) {
    const Splits splits = split(p, blocks);
    if (splits.tasks.size() > blocks.size()) {
      std::vector<float> partials(static_cast<size_t>(splits.rows * (2 + p.head_dim)));
      p.partials = partials.data();
      p.tasks = splits.tasks.data();
      p.num_tasks = static_cast<int64_t>(splits.tasks.size());
      attention(p);
      p.tasks = splits.merges.data();
      p.num_tasks = static_cast<int64_t>(splits.merges.size());
      attention_merge(p);
      return;
    }
  }
  p.tasks = blocks.data();
  p.num_tasks = static_cast<int64_t>(blocks.size());
  attention(p);
}

void attention_cpu(const Tensor& q, const Tensor& kv_pages, const Tensor& page_table,
                   const Tensor& query_starts, const Tensor& kv_lens, double scale, int64_t window,
                   double softcap, const std::optional<Tensor>& alibi_slopes,
                   const std::optional<Tensor>& sinks, const Tensor& out, const std::optional<Tensor>& bias,
                   bool bias_by_distance) {
  check_dims(q, 3, "q");
  check_dims(kv_pages, 5, "kv_pages");
  check_dims(page_table, 2, "page_table");
  const int64_t tokens = q.size(0), heads = q.size(1), head_dim = q.size(2), seqs = kv_lens.size(0);
  const int64_t kv_heads = kv_pages.size(2);
  check_cpu<float>(q, "q");
  check(q.stride(2) == 1 && (heads == 1 || q.stride(1) == head_dim), "q: a token's heads are not contiguous");
  check_shape(kv_pages, {kv_pages.size(0), 2, kv_heads, kPageTokens, head_dim}, "kv_pages");
  check(kv_heads > 0 && heads % kv_heads == 0, "heads ", heads, " is not a multiple of kv_heads ", kv_heads);
  check(head_dim <= kMaxHeadDim, "head_dim is ", head_dim, "; the CPU kernels go up to ", kMaxHeadDim);
  check_shape(page_table, {seqs, page_table.size(1)}, "page_table");
  check_shape(query_starts, {seqs + 1}, "query_starts");
  check_shape(out, {tokens, heads, head_dim}, "out");
  check(window >= 0, "window is ", window, "; 0 is none");
  if (alibi_slopes.has_value()) check_shape(*alibi_slopes, {heads}, "alibi_slopes");
  if (sinks.has_value()) check_shape(*sinks, {heads}, "sinks");
  check(!bias.has_value() || bias->is_cpu(), "bias is not on the CPU");
  const AttentionParams params{
      .q = static_cast<const float*>(q.const_data_ptr()),
      .kv_pages = read<float>(kv_pages, "kv_pages"),
      .page_table = read<int32_t>(page_table, "page_table"),
      .query_starts = read<int32_t>(query_starts, "query_starts"),
      .kv_lens = read<int32_t>(kv_lens, "kv_lens"),
      .alibi_slopes = read_optional<float>(alibi_slopes, "alibi_slopes"),
      .sinks = read_optional<float>(sinks, "sinks"),
      .bias = read_bias(bias, bias_by_distance, tokens, heads),
      .out = write<float>(out, "out"),
      .partials = nullptr,
      .tasks = nullptr,
      .num_tasks = 0,
      .q_stride = q.stride(0),
      .max_pages = page_table.size(1),
      .heads = heads,
      .kv_heads = kv_heads,
      .head_dim = head_dim,
      .window = window,
      .scale = static_cast<float>(scale),
      .softcap = static_cast<float>(softcap),
  };
  check_sequences(params, seqs, tokens, kv_pages.size(0));
  run(params, seqs);
}

}  // namespace
}  // namespace tgi

STABLE_TORCH_LIBRARY_FRAGMENT(tgi, m) {
  m.def(
      "attention(Tensor q, Tensor kv_pages, Tensor page_table, Tensor query_starts, Tensor kv_lens, float "
      "scale, "
      "int window, float softcap, Tensor? alibi_slopes, Tensor? sinks, Tensor(a!) out, Tensor? bias=None, "
      "bool bias_by_distance=False) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(tgi, CPU, m) { m.impl("attention", TORCH_BOX(&tgi::attention_cpu)); }
