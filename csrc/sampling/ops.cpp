#include "common/torch_cpu.h"
#include "sampling/cpu_params.h"

namespace tgi {
namespace {

struct Logits {
  const float* data;
  int64_t rows, vocab, stride;
};

Logits read_logits(const Tensor& logits) {
  check_dims(logits, 2, "logits");
  check_cpu<float>(logits, "logits");
  check(logits.size(1) > 0, "logits has no columns");
  check(logits.stride(1) == 1, "logits: its rows are not contiguous");
  return {static_cast<const float*>(logits.const_data_ptr()), logits.size(0), logits.size(1),
          logits.stride(0)};
}

struct Workers {
  unsigned char* memory;
  int64_t count;
};

Workers read_workspace(const Tensor& workspace, int64_t vocab) {
  check_dims(workspace, 2, "workspace");
  check(workspace.size(0) > 0, "workspace has no rows; it needs one a worker");
  check(workspace.size(1) * int64_t{8} == workspace_bytes(vocab), "workspace: dimension 1 is ",
        workspace.size(1), "; it needs to be ", workspace_bytes(vocab) / 8);
  return {reinterpret_cast<unsigned char*>(write<int64_t>(workspace, "workspace")), workspace.size(0)};
}

void greedy_cpu(const Tensor& logits, const Tensor& ids, const Tensor& logprobs) {
  const Logits from = read_logits(logits);
  check_shape(ids, {from.rows}, "ids");
  check_shape(logprobs, {from.rows}, "logprobs");
  greedy(GreedyParams{
      .logits = from.data,
      .stride = from.stride,
      .ids = write<int64_t>(ids, "ids"),
      .logprobs = write<float>(logprobs, "logprobs"),
      .rows = from.rows,
      .vocab = from.vocab,
  });
}

void sample_cpu(const Tensor& logits, const Tensor& rows, const Tensor& positions, const Tensor& numbers,
                const Tensor& wholes, const Tensor& history, const Tensor& edit_ids,
                const Tensor& edit_values, const Tensor& workspace, const std::optional<Tensor>& places,
                const Tensor& ids, const Tensor& logprobs) {
  const Logits from = read_logits(logits);
  check_dims(numbers, 2, "numbers");
  check_dims(history, 2, "history");
  check_dims(edit_ids, 2, "edit_ids");
  const int64_t table_rows = numbers.size(0), history_size = history.size(1), edits = edit_ids.size(1);
  check_shape(numbers, {table_rows, kNumbers}, "numbers");
  check_shape(wholes, {table_rows, kWholes}, "wholes");
  check_shape(history, {table_rows, history_size}, "history");
  check_shape(edit_ids, {table_rows, edits}, "edit_ids");
  check_shape(edit_values, {table_rows, edits}, "edit_values");
  const int64_t draws = places.has_value() ? places->numel() : from.rows;
  for (const Tensor* tensor : {&rows, &positions}) check_shape(*tensor, {draws}, "a draw's");
  for (const Tensor* tensor : {&ids, &logprobs}) check_shape(*tensor, {from.rows}, "a result");
  const Workers workers = read_workspace(workspace, from.vocab);
  const SampleParams params{
      .logits = from.data,
      .stride = from.stride,
      .draws = draws,
      .places = read_optional<int64_t>(places, "places"),
      .vocab = from.vocab,
      .rows = read<int64_t>(rows, "rows"),
      .positions = read<int64_t>(positions, "positions"),
      .numbers = read<float>(numbers, "numbers"),
      .wholes = read<int64_t>(wholes, "wholes"),
      .history = read<int32_t>(history, "history"),
      .history_size = history_size,
      .edit_ids = read<int32_t>(edit_ids, "edit_ids"),
      .edit_values = read<float>(edit_values, "edit_values"),
      .edits = edits,
      .workspace = workers.memory,
      .workers = workers.count,
      .ids = write<int64_t>(ids, "ids"),
      .logprobs = write<float>(logprobs, "logprobs"),
  };
  for (int64_t draw = 0; draw < params.draws; ++draw) {
    const int64_t row = params.rows[draw], position = params.positions[draw];
    const int64_t place = params.places ? params.places[draw] : draw;
    check(place >= 0 && place < from.rows, "places[", draw, "] is ", place, "; there are ", from.rows,
          " rows of logits");
    check(row >= 0 && row < table_rows, "rows[", draw, "] is ", row, "; the tables have ", table_rows,
          " rows");
    check(position >= 0 && position <= history_size, "positions[", draw, "] is ", position,
          "; history holds ", history_size, " tokens");
    const int64_t used = params.wholes[row * kWholes + kEdits];
    check(used <= edits, "row ", row, " has ", used, " edits; the table has room for ", edits);
    const int64_t prompt = params.wholes[row * kWholes + kPromptTokens];
    check(prompt >= 0, "row ", row, " has ", prompt, " prompt tokens; 0 or more are possible");
  }
  sample(params);
}

void top_logprobs_cpu(const Tensor& logits, const Tensor& workspace, const Tensor& ids,
                      const Tensor& logprobs) {
  const Logits from = read_logits(logits);
  check_dims(ids, 2, "ids");
  const int64_t count = ids.size(1);
  check(count > 0 && count <= from.vocab, "ids has ", count, " columns; 1 to ", from.vocab, " are possible");
  check_shape(ids, {from.rows, count}, "ids");
  check_shape(logprobs, {from.rows, count}, "logprobs");
  const Workers workers = read_workspace(workspace, from.vocab);
  top_logprobs(TopLogprobsParams{
      .logits = from.data,
      .stride = from.stride,
      .rows = from.rows,
      .vocab = from.vocab,
      .count = count,
      .workspace = workers.memory,
      .workers = workers.count,
      .ids = write<int64_t>(ids, "ids"),
      .logprobs = write<float>(logprobs, "logprobs"),
  });
}

void token_logprobs_cpu(const Tensor& logits, const Tensor& ids, const Tensor& logprobs) {
  const Logits from = read_logits(logits);
  check_shape(ids, {from.rows}, "ids");
  check_shape(logprobs, {from.rows}, "logprobs");
  const int64_t* tokens = read<int64_t>(ids, "ids");
  for (int64_t row = 0; row < from.rows; ++row) {
    check(tokens[row] >= 0 && tokens[row] < from.vocab, "ids[", row, "] is ", tokens[row], "; logits has ",
          from.vocab, " columns");
  }
  token_logprobs(TokenLogprobsParams{
      .logits = from.data,
      .stride = from.stride,
      .rows = from.rows,
      .vocab = from.vocab,
      .ids = tokens,
      .logprobs = write<float>(logprobs, "logprobs"),
  });
}

}  // namespace
}  // namespace tgi

STABLE_TORCH_LIBRARY_FRAGMENT(tgi, m) {
  m.def("greedy(Tensor logits, Tensor(a!) ids, Tensor(b!) logprobs) -> ()");
  m.def(
      "sample(Tensor logits, Tensor rows, Tensor positions, Tensor numbers, Tensor wholes, Tensor history, "
      "Tensor edit_ids, Tensor edit_values, Tensor(a!) workspace, Tensor? places, Tensor(b!) ids, "
      "Tensor(c!) logprobs) -> ()");
  m.def("top_logprobs(Tensor logits, Tensor(a!) workspace, Tensor(b!) ids, Tensor(c!) logprobs) -> ()");
  m.def("token_logprobs(Tensor logits, Tensor ids, Tensor(a!) logprobs) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(tgi, CPU, m) {
  m.impl("greedy", TORCH_BOX(&tgi::greedy_cpu));
  m.impl("sample", TORCH_BOX(&tgi::sample_cpu));
  m.impl("top_logprobs", TORCH_BOX(&tgi::top_logprobs_cpu));
  m.impl("token_logprobs", TORCH_BOX(&tgi::token_logprobs_cpu));
}
