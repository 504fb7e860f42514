// Choosing tokens: the likeliest, drawn ones, and their log-probabilities.
#pragma once

#include "common/parallel.h"
#include "sampling/cpu_filters.h"

namespace tgi::TGI_ISA {

// Σ exp(x − most). Parts are summed apart: the error of a sum grows with how many are added one by one.
TGI_INLINE float mass_below(const float* x, int64_t size, float most) {
  constexpr int64_t kPart = 1024;
  Vec mass{};
  int64_t i = 0;
  while (i + kLanes <= size) {
    Vec part{};
    const int64_t end = i + kPart < size ? i + kPart : size;
    for (; i + kLanes <= end; i += kLanes) part += exp(load(x + i) - most);
    mass += part;
  }
  const Vec rest = exp(load_first(x + i, size - i) - most);
  float lanes[kLanes];
  store(lanes, rest);
  float tail = 0.0f;
  for (int64_t lane = 0; lane < size - i; ++lane) tail += lanes[lane];
  return sum(mass) + tail;
}

// log Σ exp(x − most); NaN if nothing is above −∞.
TGI_INLINE float log_mass_below(const float* x, int64_t size, float most) {
  if (most == -__builtin_inff()) return __builtin_nanf("");
  return __builtin_logf(mass_below(x, size, most));
}

TGI_INLINE int64_t first_of(const float* x, float value) {
  int64_t id = 0;
  while (x[id] != value) ++id;
  return id;
}

void greedy(const GreedyParams& p) {
  parallel_for(p.rows, [&](int64_t row) {
    const float* x = p.logits + row * p.stride;
    const float most = largest_of(x, p.vocab);
    p.ids[row] = most == -__builtin_inff() ? 0 : first_of(x, most);
    p.logprobs[row] = -log_mass_below(x, p.vocab, most);
  });
}

// A worker's memory.
struct Workspace {
  uint64_t* keys;   // [vocab]
  float* scores;    // [vocab]
  int32_t* counts;  // [vocab]
  float* maxima;    // [blocks]

  static Workspace of(unsigned char* base, int64_t worker, int64_t vocab) {
    unsigned char* own = base + worker * workspace_bytes(vocab);
    const int64_t padded = blocks_of(vocab) * kBlock;
    return {reinterpret_cast<uint64_t*>(own), reinterpret_cast<float*>(own + padded * 8),
            reinterpret_cast<int32_t*>(own + padded * 12), reinterpret_cast<float*>(own + padded * 16)};
  }
};

// Calls function(row, workspace) for all rows; each worker takes the next row that nobody has taken.
template <typename Function>
TGI_INLINE void for_rows(int64_t rows, int64_t workers, unsigned char* base, int64_t vocab,
                         Function&& function) {
  int64_t next = 0;
  parallel_for(workers < rows ? workers : rows, [&](int64_t worker) {
    const Workspace workspace = Workspace::of(base, worker, vocab);
    for (int64_t row; (row = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED)) < rows;)
      function(row, workspace);
  });
}

// One draw's settings and past.
struct Row {
  const float* numbers;
  const int64_t* wholes;
  const int32_t* history;
  const int32_t* edit_ids;
  const float* edit_values;
  int64_t position;

  static Row of(const SampleParams& p, int64_t draw) {
    const int64_t row = p.rows[draw];
    return {p.numbers + row * kNumbers, p.wholes + row * kWholes,      p.history + row * p.history_size,
            p.edit_ids + row * p.edits, p.edit_values + row * p.edits, p.positions[draw]};
  }
  bool penalised() const {
    return numbers[kRepetition] != 1.0f || numbers[kFrequency] != 0.0f || numbers[kPresence] != 0.0f;
  }
  bool adjusted() const { return penalised() || numbers[kWatermark] != 0.0f || wholes[kEdits] > 0; }
};

// Penalties for the tokens of the past, each once; counts[t] is how often the answer has token t.
TGI_INLINE void penalise(const Row& row, float* scores, int32_t* counts, int64_t vocab) {
  const auto known = [&](int64_t i) { return static_cast<uint32_t>(row.history[i]) < vocab; };
  for (int64_t i = 0; i < row.position; ++i) {
    if (known(i)) counts[row.history[i]] = 0;
  }
  for (int64_t i = row.wholes[kPromptTokens]; i < row.position; ++i) {
    if (known(i)) ++counts[row.history[i]];
  }
  for (int64_t i = 0; i < row.position; ++i) {
    if (!known(i)) continue;
    int32_t& count = counts[row.history[i]];
    if (count < 0) continue;
    float& score = scores[row.history[i]];
    score = score > 0.0f ? score / row.numbers[kRepetition] : score * row.numbers[kRepetition];
    score -= static_cast<float>(count) * row.numbers[kFrequency];
    if (count > 0) score -= row.numbers[kPresence];
    count = -1;
  }
}

// Favours the tokens that a hash of the token before calls green.
TGI_INLINE void watermark(const Row& row, float* scores, int64_t vocab) {
  if (row.position == 0) return;
  constexpr uint64_t kPrime = 15485863;
  const uint64_t key = kPrime * static_cast<uint32_t>(row.history[row.position - 1]);
  for (int64_t first = 0; first < vocab; first += 128) {
    uint64_t words[4] = {static_cast<uint64_t>(first / 128), 0, 0, 0};
    philox(words, key);
    const int64_t end = first + 128 < vocab ? first + 128 : vocab;
    for (int64_t token = first; token < end; ++token) {
      const bool green = words[token / 32 % 4] >> (token % 32) & 1;
      scores[token] += green ? row.numbers[kWatermark] : 0.0f;
    }
  }
}

// What the row's tokens score: logits after penalties, biases, watermark and masks.
TGI_INLINE void adjust(const Row& row, const float* logits, float* scores, int32_t* counts, int64_t vocab) {
  __builtin_memcpy(scores, logits, static_cast<size_t>(vocab) * sizeof(float));
  if (row.penalised()) penalise(row, scores, counts, vocab);
  const bool ending_allowed = row.position >= row.wholes[kPromptTokens] + row.wholes[kMinNewTokens];
  for (int64_t i = 0; i < row.wholes[kEdits]; ++i) {
    const int64_t token = row.edit_ids[i];
    const float value = row.edit_values[i];
    if (token < 0 || token >= vocab || (value == -__builtin_inff() && ending_allowed)) continue;
    scores[token] += value;
  }
  if (row.numbers[kWatermark] != 0.0f) watermark(row, scores, vocab);
}

void sample(const SampleParams& p) {
  for_rows(p.draws, p.workers, p.workspace, p.vocab, [&](int64_t draw_index, const Workspace& workspace) {
    const Row row = Row::of(p, draw_index);
    const int64_t place = p.places ? p.places[draw_index] : draw_index;
    const float* logits = p.logits + place * p.stride;
    Scores scores{logits, workspace.maxima, p.vocab, 0.0f};
    float most;
    if (row.adjusted()) {
      most = largest_of(logits, p.vocab);
      adjust(row, logits, workspace.scores, workspace.counts, p.vocab);
      scores.of = workspace.scores;
      scores.largest = block_maxima(scores.of, p.vocab, workspace.maxima);
    } else {
      most = scores.largest = block_maxima(logits, p.vocab, workspace.maxima);
    }
    int64_t& id = p.ids[place];
    float& logprob = p.logprobs[place];
    if (scores.largest == -__builtin_inff()) {
      id = 0;
      logprob = __builtin_nanf("");
      return;
    }
    const Filters filters{row.numbers[kTemperature], row.wholes[kTopK], row.numbers[kTopP],
                          row.numbers[kTypicalP], row.numbers[kMinP]};
    if (!(filters.temperature >= 1e-6) || scores.largest == __builtin_inff()) {
      id = first_of(scores.of, scores.largest);
    } else {
      const Noise noise{static_cast<uint64_t>(row.wholes[kSeed]), static_cast<uint64_t>(row.position),
                        static_cast<uint64_t>(row.wholes[kChoice])};
      const Kept kept = filter(scores, filters, workspace.keys);
      id = draw(scores, filters.temperature, kept, workspace.keys, noise);
    }
    logprob = (logits[id] - most) - log_mass_below(logits, p.vocab, most);
  });
}

void top_logprobs(const TopLogprobsParams& p) {
  for_rows(p.rows, p.workers, p.workspace, p.vocab, [&](int64_t row, const Workspace& workspace) {
    const float* logits = p.logits + row * p.stride;
    Scores scores{logits, workspace.maxima, p.vocab, 0.0f};
    scores.largest = block_maxima(logits, p.vocab, workspace.maxima);
    const float log_mass = log_mass_below(logits, p.vocab, scores.largest);
    uint64_t* keys = workspace.keys;
    const int64_t found = select_first(scores, p.count, keys);
    for (int64_t i = 0; i < p.count; ++i) {
      int64_t best = i;
      for (int64_t j = i + 1; j < found; ++j) best = keys[j] > keys[best] ? j : best;
      int64_t& id = p.ids[row * p.count + i];
      id = i < found ? token_of(keys[best]) : -1;
      p.logprobs[row * p.count + i] =
          i < found ? (logits[id] - scores.largest) - log_mass : -__builtin_inff();
      if (i < found) keys[best] = keys[i];
    }
  });
}

void token_logprobs(const TokenLogprobsParams& p) {
  parallel_for(p.rows, [&](int64_t row) {
    const float* logits = p.logits + row * p.stride;
    const float most = largest_of(logits, p.vocab);
    p.logprobs[row] = (logits[p.ids[row]] - most) - log_mass_below(logits, p.vocab, most);
  });
}

}  // namespace tgi::TGI_ISA
