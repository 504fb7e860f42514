// Softmax(q·k·scale)·v over paged keys and values, with a running maximum. Milakov and Gimelshein 2018,
// arXiv:1805.02867; Dao et al. 2022, arXiv:2205.14135.
//
// A row is one query head of one token. Its arithmetic is the same whatever shares its task: steps of four
// pages in order from position 0, splits merged in order, every dot product one chain of fma. So a token's
// bits depend on its own sequence alone.
#pragma once

#include "attention/cpu_params.h"
#include "common/parallel.h"
#include "common/vec.h"

namespace tgi::TGI_ISA {

// Keys of one softmax step: four pages share a maximum, a sum and a rescaling.
constexpr int64_t kStepPages = 4;
constexpr int64_t kStepTokens = kStepPages * kPageTokens;
static_assert(kSplitTokens % kStepTokens == 0);

constexpr int kPageVecs = kPageTokens / kLanes;
#if defined(TGI_ISA_IS_avx512)
constexpr int kTileRows = 8;
#else
constexpr int kTileRows = 4;
#endif

// Running state of a task's rows.
struct Rows {
  float largest[kMaxBlockRows];
  float sum[kMaxBlockRows];
  alignas(64) float values[kMaxBlockRows * kMaxHeadDim];  // [rows, head_dim]
};

struct Keys {  // which keys of the step at hand a row sees: [first, last)
  int first, last;
};

struct Scratch {
  alignas(64) float q[kMaxBlockRows * kMaxHeadDim];       // [rows, head_dim]
  alignas(64) float keys[kMaxHeadDim * kPageTokens];      // [head_dim, 16]: a page's keys, transposed
  alignas(64) float scores[kMaxBlockRows * kStepTokens];  // [rows, 64]
  const float* values[kStepPages];                        // of each page: [16, head_dim]
  Keys seen[kMaxBlockRows];
};

struct Block {
  const AttentionParams& p;
  const AttentionTask& task;
  Scratch& scratch;

  int64_t rows() const { return int64_t{task.queries} * task.heads; }
  int64_t head(int64_t row) const { return task.head + row % task.heads; }
  int64_t token(int64_t row) const { return p.query_starts[task.seq] + task.first + row / task.heads; }
  int64_t position(int64_t row) const {
    return p.kv_lens[task.seq] - p.query_starts[task.seq + 1] + token(row);
  }
};

constexpr float kMinusInfinity = -__builtin_inff();

TGI_INLINE float exp_scalar(float x) { return exp(splat(x))[0]; }

TGI_INLINE Quad load_quad(const float* from) {
  Quad to;
  std::memcpy(&to, from, sizeof(to));
  return to;
}

// [16, head_dim] → [head_dim, 16], four by four.
TGI_INLINE void transpose_page(const float* from, float* to, int64_t head_dim) {
  for (int64_t key = 0; key < kPageTokens; key += 4) {
    const float* rows = from + key * head_dim;
    int64_t d = 0;
    for (; d + 4 <= head_dim; d += 4) {
      const Quad a = load_quad(rows + d), b = load_quad(rows + head_dim + d);
      const Quad c = load_quad(rows + 2 * head_dim + d), e = load_quad(rows + 3 * head_dim + d);
      const Quad ab_low = __builtin_shufflevector(a, b, 0, 4, 1, 5),
                 ab_high = __builtin_shufflevector(a, b, 2, 6, 3, 7);
      const Quad ce_low = __builtin_shufflevector(c, e, 0, 4, 1, 5),
                 ce_high = __builtin_shufflevector(c, e, 2, 6, 3, 7);
      const Quad columns[4] = {__builtin_shufflevector(ab_low, ce_low, 0, 1, 4, 5),
                               __builtin_shufflevector(ab_low, ce_low, 2, 3, 6, 7),
                               __builtin_shufflevector(ab_high, ce_high, 0, 1, 4, 5),
                               __builtin_shufflevector(ab_high, ce_high, 2, 3, 6, 7)};
      for (int i = 0; i < 4; ++i) std::memcpy(to + (d + i) * kPageTokens + key, &columns[i], sizeof(Quad));
    }
    for (; d < head_dim; ++d) {
      for (int i = 0; i < 4; ++i) to[d * kPageTokens + key + i] = rows[i * head_dim + d];
    }
  }
}

// scores[kRows, 16 of 64] = q[kRows, head_dim] · keys[head_dim, 16]
template <int kRows>
TGI_INLINE void score_tile(const float* q, const float* keys, float* scores, int64_t head_dim) {
  Vec sums[kRows][kPageVecs] = {};
  for (int64_t d = 0; d < head_dim; ++d) {
    for (int v = 0; v < kPageVecs; ++v) {
      const Vec k = load(keys + d * kPageTokens + v * kLanes);
      for (int r = 0; r < kRows; ++r) sums[r][v] = fma(splat(q[r * head_dim + d]), k, sums[r][v]);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kPageVecs; ++v) store(scores + r * kStepTokens + v * kLanes, sums[r][v]);
  }
}

// values[kRows, head_dim] += weights[kRows, seen] · pages[seen, head_dim], a strip of kVecs vectors at d.
template <int kRows, int kVecs>
TGI_INLINE void value_strip(const float* weights, const float* const* pages, float* values, int64_t d,
                            int64_t head_dim, Keys seen) {
  Vec sums[kRows][kVecs];
  for (int r = 0; r < kRows; ++r) {
    for (int i = 0; i < kVecs; ++i) sums[r][i] = load(values + r * head_dim + d + i * kLanes);
  }
  for (int key = seen.first; key < seen.last; ++key) {
    const float* v = pages[key / kPageTokens] + key % kPageTokens * head_dim + d;
    Vec value[kVecs];
    for (int i = 0; i < kVecs; ++i) value[i] = load(v + i * kLanes);
    for (int r = 0; r < kRows; ++r) {
      const Vec weight = splat(weights[r * kStepTokens + key]);
      for (int i = 0; i < kVecs; ++i) sums[r][i] = fma(weight, value[i], sums[r][i]);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int i = 0; i < kVecs; ++i) store(values + r * head_dim + d + i * kLanes, sums[r][i]);
  }
}

template <int kRows>
TGI_INLINE void value_tile(const float* weights, const float* const* pages, float* values, int64_t head_dim,
                           Keys seen) {
  int64_t d = 0;
  for (; d + 2 * kLanes <= head_dim; d += 2 * kLanes) {
    value_strip<kRows, 2>(weights, pages, values, d, head_dim, seen);
  }
  for (; d + kLanes <= head_dim; d += kLanes) {
    value_strip<kRows, 1>(weights, pages, values, d, head_dim, seen);
  }
  for (; d < head_dim; ++d) {
    for (int r = 0; r < kRows; ++r) {
      for (int key = seen.first; key < seen.last; ++key) {
        const float value = pages[key / kPageTokens][key % kPageTokens * head_dim + d];
        values[r * head_dim + d] += weights[r * kStepTokens + key] * value;
      }
    }
  }
}

TGI_INLINE void scale_values(float* values, float scale, int64_t size) {
  int64_t d = 0;
  for (; d + kLanes <= size; d += kLanes) store(values + d, load(values + d) * scale);
  for (; d < size; ++d) values[d] *= scale;
}

TGI_INLINE void add_bias(const Block& b, int64_t row, int64_t step_position, Keys seen, float* scores) {
  const AttentionBias& bias = b.p.bias;
  const float* of_row = bias.at + b.token(row) * bias.token_stride + b.head(row) * bias.head_stride;
  const int64_t last = bias.columns - 1, position = b.position(row);
  for (int i = seen.first; i < seen.last; ++i) {
    const int64_t key = step_position + i, column = bias.by_distance ? position - key : key;
    scores[i] += of_row[column < last ? column : last];
  }
}

// Products become what softmax sees: scaled, capped, sloped by distance, biased, −∞ where the row may not
// look.
TGI_INLINE void finish_scores(const Block& b, int64_t row, int64_t step_position, float* scores) {
  const AttentionParams& p = b.p;
  const Keys seen = b.scratch.seen[row];
  for (int i = 0; i < kStepTokens; i += kLanes) store(scores + i, load(scores + i) * p.scale);
  if (p.softcap > 0) {
    for (int i = seen.first; i < seen.last; ++i) {
      scores[i] = p.softcap * __builtin_tanhf(scores[i] / p.softcap);
    }
  }
  if (p.alibi_slopes != nullptr) {
    const float slope = p.alibi_slopes[b.head(row)];
    for (int i = seen.first; i < seen.last; ++i) {
      scores[i] += slope * static_cast<float>(step_position + i - b.position(row));
    }
  }
  if (p.bias.at != nullptr) add_bias(b, row, step_position, seen, scores);
  for (int i = 0; i < seen.first; ++i) scores[i] = kMinusInfinity;
  for (int i = seen.last; i < kStepTokens; ++i) scores[i] = kMinusInfinity;
}

// A row's scores become weights e^(score − maximum); what it has summed so far is scaled to the new maximum.
TGI_INLINE void softmax_row(Block& b, Rows& state, int64_t row, int64_t step_position) {
  float* scores = b.scratch.scores + row * kStepTokens;
  finish_scores(b, row, step_position, scores);
  Vec top = load(scores);
  for (int i = kLanes; i < kStepTokens; i += kLanes) top = max(top, load(scores + i));
  const float before = state.largest[row], highest = largest(top);
  const float now = highest > before ? highest : before;
  if (now > before) {
    const float shrink = exp_scalar(before - now);
    scale_values(state.values + row * b.p.head_dim, shrink, b.p.head_dim);
    state.sum[row] *= shrink;
    state.largest[row] = now;
  }
  if (now == kMinusInfinity) {  // a bias hides all keys so far
    std::memset(scores, 0, sizeof(float) * kStepTokens);
    return;
  }
  Vec total{};
  for (int i = 0; i < kStepTokens; i += kLanes) {
    const Vec weight = exp(load(scores + i) - splat(now));
    store(scores + i, weight);
    total += weight;
  }
  state.sum[row] += sum(total);
}

// Calls tile.operator()<kRows>(first row) over [0, rows) in tiles of at most kTileRows.
template <typename Tile>
TGI_INLINE void in_tiles(int64_t rows, Tile&& tile) {
  int64_t row = 0;
  for (; row + kTileRows <= rows; row += kTileRows) tile.template operator()<kTileRows>(row);
  if constexpr (kTileRows > 4) {
    for (; row + 4 <= rows; row += 4) tile.template operator()<4>(row);
  }
  for (; row + 2 <= rows; row += 2) tile.template operator()<2>(row);
  for (; row < rows; ++row) tile.template operator()<1>(row);
}

// Which keys of the step each row sees.
TGI_INLINE void look(Block& b, int64_t step_position) {
  const auto within = [](int64_t key) {
    return static_cast<int>(key < 0 ? 0 : key < kStepTokens ? key : kStepTokens);
  };
  for (int64_t row = 0; row < b.rows(); ++row) {
    const int64_t position = b.position(row);
    const int64_t oldest = b.p.window > 0 ? position - b.p.window + 1 : 0;
    b.scratch.seen[row] = {within(oldest - step_position), within(position + 1 - step_position)};
  }
}

// Products of every row with the keys of the step's pages [pages.first, pages.last).
TGI_INLINE void score_pages(Block& b, int64_t step_position, Keys pages) {
  const AttentionParams& p = b.p;
  const int64_t head_elements = kPageTokens * p.head_dim;
  const int64_t kv_head = b.task.head / (p.heads / p.kv_heads);
  const int32_t* table = p.page_table + b.task.seq * p.max_pages + step_position / kPageTokens;
  for (int page = pages.first; page < pages.last; ++page) {
    const float* k = p.kv_pages + (table[page] * 2 * p.kv_heads + kv_head) * head_elements;
    b.scratch.values[page] = k + p.kv_heads * head_elements;
    transpose_page(k, b.scratch.keys, p.head_dim);
    in_tiles(b.rows(), [&]<int kRows>(int64_t row) {
      score_tile<kRows>(b.scratch.q + row * p.head_dim, b.scratch.keys,
                        b.scratch.scores + row * kStepTokens + page * kPageTokens, p.head_dim);
    });
  }
}

TGI_INLINE void add_values(Block& b, Rows& state) {
  const int64_t head_dim = b.p.head_dim;
  in_tiles(b.rows(), [&]<int kRows>(int64_t row) {
    const Keys* seen = b.scratch.seen + row;
    bool alike = true;
    for (int r = 1; r < kRows; ++r) {
      alike = alike && seen[r].first == seen[0].first && seen[r].last == seen[0].last;
    }
    const float* weights = b.scratch.scores + row * kStepTokens;
    float* values = state.values + row * head_dim;
    if (alike) return value_tile<kRows>(weights, b.scratch.values, values, head_dim, seen[0]);
    for (int r = 0; r < kRows; ++r) {
      value_tile<1>(weights + r * kStepTokens, b.scratch.values, values + r * head_dim, head_dim, seen[r]);
    }
  });
}

TGI_INLINE void attend_step(Block& b, Rows& state, int64_t step_position) {
  look(b, step_position);
  // The first row looks furthest back, the last one furthest ahead.
  const int first = b.scratch.seen[0].first, last = b.scratch.seen[b.rows() - 1].last;
  if (first >= last) return;
  score_pages(b, step_position, {first / int{kPageTokens}, (last + int{kPageTokens} - 1) / int{kPageTokens}});
  for (int64_t row = 0; row < b.rows(); ++row) {
    if (b.scratch.seen[row].first < b.scratch.seen[row].last) softmax_row(b, state, row, step_position);
  }
  add_values(b, state);
}

TGI_INLINE void clear(Rows& state, int64_t rows, int64_t head_dim) {
  for (int64_t row = 0; row < rows; ++row) {
    state.largest[row] = kMinusInfinity;
    state.sum[row] = 0;
  }
  std::memset(state.values, 0, sizeof(float) * static_cast<size_t>(rows * head_dim));
}

TGI_INLINE void attend_split(Block& b, Rows& state, int64_t split) {
  clear(state, b.rows(), b.p.head_dim);
  const int64_t end = b.position(b.rows() - 1) + 1;
  const int64_t stop = (split + 1) * kSplitTokens < end ? (split + 1) * kSplitTokens : end;
  for (int64_t at = split * kSplitTokens; at < stop; at += kStepTokens) attend_step(b, state, at);
}

// Adds a split's result to the running one of a row: both scaled to the larger maximum.
TGI_INLINE void merge_row(float& largest, float& sum, float* values, float split_largest, float split_sum,
                          const float* split_values, int64_t head_dim) {
  if (split_largest == kMinusInfinity) return;  // the row sees none of the split's keys
  const float now = split_largest > largest ? split_largest : largest;
  const float keep = exp_scalar(largest - now), add = exp_scalar(split_largest - now);
  largest = now;
  sum = sum * keep + split_sum * add;
  for (int64_t d = 0; d < head_dim; ++d) values[d] = values[d] * keep + split_values[d] * add;
}

// out = values / sum; a sink is one more key, which has a score and no value.
TGI_INLINE void finish_row(const Block& b, int64_t row, const float* values, float largest, float sum) {
  const AttentionParams& p = b.p;
  float keep = 1.0f;
  if (p.sinks != nullptr) {
    const float sink = p.sinks[b.head(row)], now = sink > largest ? sink : largest;
    keep = exp_scalar(largest - now);
    sum = sum * keep + exp_scalar(sink - now);
  }
  const float scale = sum == 0.0f ? 0.0f : keep / sum;
  float* out = p.out + (b.token(row) * p.heads + b.head(row)) * p.head_dim;
  for (int64_t d = 0; d < p.head_dim; ++d) out[d] = values[d] * scale;
}

TGI_INLINE void attend(Block& b, Rows& state) {
  const AttentionParams& p = b.p;
  Rows split_state;
  clear(state, b.rows(), p.head_dim);
  const int64_t oldest = p.window > 0 ? b.position(0) - p.window + 1 : 0;
  for (int64_t split = oldest > 0 ? oldest / kSplitTokens : 0;
       split * kSplitTokens <= b.position(b.rows() - 1); ++split) {
    attend_split(b, split_state, split);
    for (int64_t row = 0; row < b.rows(); ++row) {
      merge_row(state.largest[row], state.sum[row], state.values + row * p.head_dim, split_state.largest[row],
                split_state.sum[row], split_state.values + row * p.head_dim, p.head_dim);
    }
  }
  for (int64_t row = 0; row < b.rows(); ++row) {
    finish_row(b, row, state.values + row * p.head_dim, state.largest[row], state.sum[row]);
  }
}

static void attention_task(const AttentionParams& p, const AttentionTask& task) {
  Scratch scratch;
  Rows state;
  Block b{p, task, scratch};
  for (int64_t row = 0; row < b.rows(); ++row) {
    std::memcpy(scratch.q + row * p.head_dim, p.q + b.token(row) * p.q_stride + b.head(row) * p.head_dim,
                sizeof(float) * static_cast<size_t>(p.head_dim));
  }
  if (task.split < 0) {
    attend(b, state);
    return;
  }
  attend_split(b, state, task.split);
  for (int64_t row = 0; row < b.rows(); ++row) {
    float* to = p.partials + (task.partial + row) * (2 + p.head_dim);
    to[0] = state.largest[row];
    to[1] = state.sum[row];
    std::memcpy(to + 2, state.values + row * p.head_dim, sizeof(float) * static_cast<size_t>(p.head_dim));
  }
}

static void merge_task(const AttentionParams& p, const AttentionTask& task) {
  Scratch scratch;
  const Block b{p, task, scratch};
  float values[kMaxHeadDim];
  for (int64_t row = 0; row < b.rows(); ++row) {
    float largest = kMinusInfinity, total = 0;
    std::memset(values, 0, sizeof(values));
    for (int64_t split = 0; split < task.split; ++split) {
      const float* from = p.partials + (task.partial + split * b.rows() + row) * (2 + p.head_dim);
      merge_row(largest, total, values, from[0], from[1], from + 2, p.head_dim);
    }
    finish_row(b, row, values, largest, total);
  }
}

void attention(const AttentionParams& p) {
  parallel_for(p.num_tasks, [&](int64_t task) { attention_task(p, p.tasks[task]); });
}

void attention_merge(const AttentionParams& p) {
  parallel_for(p.num_tasks, [&](int64_t task) { merge_task(p, p.tasks[task]); });
}

}  // namespace tgi::TGI_ISA
