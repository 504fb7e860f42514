// Attention of a few new tokens per sequence over a paged KV cache, in one launch.
//
// Dao et al. 2023, Flash-Decoding; here with one summation tree for every batch, see
// docs/kernels/attention_decode.md: 64 keys are a tile, 4 tiles a node of level 1, 4 of those one of level 2
// and so on, from position 0 of the sequence. A work item is any node of level 0 to kLevels, whichever fills
// the chip; what it cuts off is merged along the same tree by the last CTA to finish. So the bits of a result
// depend on its own sequence alone.
//
// Keys are the rows of S^T = K·Q^T and head dims those of O^T = V^T·P^T: the tensor cores want 16 rows and 8
// columns, and there are always 16 keys but seldom 16 queries. Warps share a tile's keys for S and the head
// dims for O.
#pragma once

#include "attention/cuda.h"
#include "common/copy.cuh"
#include "common/mma.cuh"
#include "common/pdl.cuh"
#include "common/softmax.cuh"

namespace tgi {
namespace decode {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;
constexpr int kTile = 64;  // keys
constexpr int kPageRows = 16;
constexpr int kTilePages = kTile / kPageRows;
constexpr int kScorePitch = kTile + 8;  // in floats: pairs of keys of four queries lie in different banks

template <typename KV, int kDim, int kColumns>
struct Shape {
  static constexpr int kRows = 8 * kColumns;            // query rows of an item
  static constexpr int kRowBytes = kDim * sizeof(KV);   // of a key
  static constexpr int kHalfBytes = kTile * kRowBytes;  // the keys or the values of a tile
  // Halves in the ring: about 64 KB under way in a CTA, 32 KB where many rows need the room.
  static constexpr int kHalves = kDim == 256                     ? (sizeof(KV) == 1 ? 4 : 3)
                                 : kColumns == 4                 ? 3
                                 : sizeof(KV) == 1 || kDim == 64 ? 8
                                                                 : 5;
  static constexpr int kQuerySlots = (kHalves + 1) / 2;  // items that may be under way
  static constexpr int kQueryBytes = kRows * kDim * 2;
  static constexpr int kLevels = kColumns == 4 ? 2 : 3;
  static constexpr int kDimTiles = kDim / kWarps / 16;  // of a warp
  static constexpr int kSavedBytes =
      (kDimTiles * kColumns * 16 + kColumns * 8) * kThreads;  // a node above level 1

  static constexpr int kQueryAt = kHalves * kHalfBytes;
  static constexpr int kSavedAt = kQueryAt + kQuerySlots * kQueryBytes;
  static constexpr int kScoreAt = kSavedAt + (kLevels - 1) * kSavedBytes;
  static constexpr int kPlanAt = kScoreAt + kRows * kScorePitch * 4;
  static constexpr int shared_bytes(int seqs) { return kPlanAt + 64 + 4 * (2 * seqs + 1); }
};

// Where item results lie in the workspace, behind the counters.
template <int kRows, int kDim>
struct Partials {
  float2* sums;   // [slots, kRows]: maximum, sum
  float* values;  // [slots, kRows, kDim]
  __device__ Partials(const DecodeParams& p)
      : sums(static_cast<float2*>(p.partials)), values(reinterpret_cast<float*>(sums + p.slots * kRows)) {}
};

// One node of a sequence's tree, for one KV head and one block of query rows.
struct Item {
  int id;  // its place among all items
  int seq, kv_head, block;
  int tile, end;   // tiles
  int first, len;  // keys some row may see
  bool fresh;      // at its first tile
};

// The batch cut into items of 4^level tiles; the same in every CTA.
struct Plan {
  int* starts;  // [seqs + 1]: items before a sequence
  int* lens;    // [seqs]
  int shift;    // log2 of an item's tiles
  int total;
};

__device__ __forceinline__ int first_key(const DecodeParams& p, int len) {
  return p.window > 0 ? max(0, len - p.queries - p.window + 1) : 0;
}

__device__ __forceinline__ int pieces_of(const DecodeParams& p, int len, int shift) {
  if (len <= 0) return 0;
  const int tiles = (len + kTile - 1) / kTile;
  return ((tiles - 1) >> shift) - ((first_key(p, len) / kTile) >> shift) + 1;
}

// Sums of all threads, to all threads. `scratch`: [kWarps][kCount] ints.
template <int kCount>
__device__ __forceinline__ void sum_over_threads(int (&value)[kCount], int* scratch) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    value[i] = __reduce_add_sync(~0u, value[i]);
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32 * kCount + i] = value[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    value[i] = 0;
    for (int warp = 0; warp < kWarps; ++warp) value[i] += scratch[warp * kCount + i];
  }
  __syncthreads();
}

// The level with the shortest estimated time: rounds of the persistent CTAs times an item's tiles, one more
// tile for its start and end, and the last merge at 1/32 tile a piece.
template <int kLevels>
__device__ Plan make_plan(const DecodeParams& p, int row_blocks, char* shared) {
  int* scratch = reinterpret_cast<int*>(shared);
  Plan plan{scratch + 16, scratch + 16 + p.seqs + 1, 0, 0};
  int pieces[kLevels + 1] = {};
  int longest = 0;
  for (int seq = threadIdx.x; seq < p.seqs; seq += kThreads) {
    const int len = min(max(p.kv_lens[seq], 0), p.max_pages * kPageRows);
    plan.lens[seq] = len;
    longest = max(longest, len);
#pragma unroll
    for (int level = 0; level <= kLevels; ++level) pieces[level] += pieces_of(p, len, 2 * level);
  }
  sum_over_threads(pieces, scratch);
  longest = __reduce_max_sync(~0u, longest);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = longest;
  __syncthreads();
  longest = max(max(scratch[0], scratch[1]), max(scratch[2], scratch[3]));
  __syncthreads();

  const int items_per_piece = p.kv_heads * row_blocks;
  float best = 3e38f;
  const int tiles = (longest + kTile - 1) / kTile;
#pragma unroll
  for (int level = 0; level <= kLevels; ++level) {
    const int items = pieces[level] * items_per_piece;
    if (items > p.slots) continue;
    const int rounds = (items + gridDim.x - 1) / gridDim.x;
    const int longest_pieces = (tiles + (1 << 2 * level) - 1) >> 2 * level;
    const float cost =
        rounds * (min(1 << 2 * level, tiles) + 1.f) + (longest_pieces > 1 ? longest_pieces / 32.f : 0.f);
    if (cost < best) best = cost, plan.shift = 2 * level, plan.total = items;
  }

  int before = 0;
  for (int base = 0; base < p.seqs; base += kThreads) {
    const int seq = base + threadIdx.x;
    const int mine = seq < p.seqs ? pieces_of(p, plan.lens[seq], plan.shift) * items_per_piece : 0;
    int upto = mine;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int left = __shfl_up_sync(~0u, upto, step);
      if (threadIdx.x % 32 >= step) upto += left;
    }
    if (threadIdx.x % 32 == 31) scratch[threadIdx.x / 32] = upto;
    __syncthreads();
    for (int warp = 0; warp < threadIdx.x / 32; ++warp) upto += scratch[warp];
    if (seq < p.seqs) plan.starts[seq] = before + upto - mine;
    before += scratch[0] + scratch[1] + scratch[2] + scratch[3];
    __syncthreads();
  }
  if (threadIdx.x == 0) plan.starts[p.seqs] = before;
  __syncthreads();
  return plan;
}

__device__ __forceinline__ Item item_at(const DecodeParams& p, const Plan& plan, int row_blocks, int index) {
  Item item{};
  item.id = index;
  if (index >= plan.total) return item;
  int low = 0, high = p.seqs;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (plan.starts[middle] <= index) {
      low = middle;
    } else {
      high = middle;
    }
  }
  item.seq = low;
  item.len = plan.lens[low];
  item.first = first_key(p, item.len);
  const int rest = index - plan.starts[low];
  const int per_piece = p.kv_heads * row_blocks;
  const int first_tile = item.first / kTile;
  const int piece = rest / per_piece + (first_tile >> plan.shift);
  item.kv_head = rest % per_piece / row_blocks;
  item.block = rest % row_blocks;
  item.tile = max(first_tile, piece << plan.shift);
  item.end = min((item.len + kTile - 1) / kTile, (piece + 1) << plan.shift);
  item.fresh = true;
  return item;
}

__device__ __forceinline__ void step(Item& item, const DecodeParams& p, const Plan& plan, int row_blocks) {
  if (item.id >= plan.total) return;
  item.fresh = false;
  if (++item.tile == item.end) item = item_at(p, plan, row_blocks, item.id + gridDim.x);
}

// ---- load ----

// Runs ahead of the arithmetic, one half tile an issue, across items. Page numbers are read a tile before
// their use.
template <typename KV, int kDim, int kColumns>
struct Loader {
  using S = Shape<KV, kDim, kColumns>;
  static constexpr int kChunks = S::kRowBytes / 16;

  const DecodeParams& p;
  const Plan& plan;
  int row_blocks;
  uint32_t shared;
  Item now, next;
  int pages[kTilePages], next_pages[kTilePages];
  int query_slot;

  __device__ Loader(const DecodeParams& p, const Plan& plan, int row_blocks, uint32_t shared)
      : p(p), plan(plan), row_blocks(row_blocks), shared(shared), query_slot(-1) {
    next = item_at(p, plan, row_blocks, blockIdx.x);
    find_pages();
  }

  __device__ __forceinline__ void find_pages() {
    const int* row = p.page_table + static_cast<int64_t>(next.seq) * p.max_pages;
#pragma unroll
    for (int i = 0; i < kTilePages; ++i) {
      const int page = next.tile * kTilePages + i;
      const bool used =
          next.id < plan.total && page * kPageRows < next.len && (page + 1) * kPageRows > next.first;
      next_pages[i] = used ? row[page] : 0;
    }
  }

  __device__ __forceinline__ void issue(bool values, int slot) {
    if (!values) {
      now = next;
#pragma unroll
      for (int i = 0; i < kTilePages; ++i) pages[i] = next_pages[i];
      step(next, p, plan, row_blocks);
      find_pages();
    }
    if (now.id < plan.total) {
      copy_half(values, shared + slot * S::kHalfBytes);
      if (!values && now.fresh) {
        query_slot = query_slot + 1 == S::kQuerySlots ? 0 : query_slot + 1;
        copy_queries(shared + S::kQueryAt + query_slot * S::kQueryBytes);
      }
    }
    commit_copies();
  }

  // Rows of no key are zeros: what an unused row of a page holds, NaN perhaps, is not read.
  __device__ __forceinline__ void copy_half(bool values, uint32_t to) {
    const int chunk = threadIdx.x % kChunks;
    const int64_t page_head = static_cast<int64_t>(kPageRows) * p.head_dim;
    const KV* base = static_cast<const KV*>(p.kv_pages) + now.kv_head * page_head + chunk * (16 / sizeof(KV));
    const bool in_row = chunk * static_cast<int>(16 / sizeof(KV)) < p.head_dim;
    constexpr int kStepRows = kThreads / kChunks;
#pragma unroll
    for (int i = 0; i < kTile / kStepRows; ++i) {
      const int row = threadIdx.x / kChunks + i * kStepRows;
      int page = pages[i * kStepRows / kPageRows];
      if constexpr (kStepRows > kPageRows) page = row / kPageRows % 2 ? pages[2 * i + 1] : pages[2 * i];
      const int key = now.tile * kTile + row;
      const int64_t at =
          (static_cast<int64_t>(page) * 2 + values) * p.kv_heads * page_head + row % kPageRows * p.head_dim;
      const bool valid = in_row && key >= now.first && key < now.len;
      copy_async(to + swizzled<S::kRowBytes>(row, chunk),
                 valid ? base + at : static_cast<const KV*>(p.kv_pages), valid);
    }
  }

  __device__ __forceinline__ void copy_queries(uint32_t to) {
    const int group = p.heads / p.kv_heads;
    for (int i = threadIdx.x; i < S::kRows * kDim / 8; i += kThreads) {
      const int row = i / (kDim / 8), chunk = i % (kDim / 8);
      const int all_row = now.block * S::kRows + row;
      const bool valid = all_row < p.queries * group && chunk * 8 < p.head_dim;
      const int64_t token = static_cast<int64_t>(now.seq) * p.queries + all_row / group;
      const uint16_t* from = static_cast<const uint16_t*>(p.q) + token * p.q_stride +
                             (now.kv_head * group + all_row % group) * p.head_dim + chunk * 8;
      copy_async(to + swizzled<kDim * 2>(row, chunk), valid ? from : static_cast<const uint16_t*>(p.q),
                 valid);
    }
  }
};

// ---- compute ----

// The node under way in a warp: its share of the head dims of O^T; maximum and sum of query lane / 4 of each
// column tile.
template <int kDimTiles, int kColumns>
struct Node {
  float values[kDimTiles][kColumns][4];
  float maximum[kColumns], sum[kColumns];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
      maximum[n] = negative_infinity();
      sum[n] = 0.f;
#pragma unroll
      for (int m = 0; m < kDimTiles; ++m)
        values[m][n][0] = values[m][n][1] = values[m][n][2] = values[m][n][3] = 0.f;
    }
  }

  // this ← this + right
  __device__ __forceinline__ void merge(const Node& right) {
    const int lane = threadIdx.x % 32, pair = lane % 4 * 8;
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
      const MergeFactors by = merge_sums(maximum[n], sum[n], right.maximum[n], right.sum[n]);
      // Values of queries 2t and 2t + 1 are here, their factors in lanes 8t and 8t + 4.
      const MergeFactors even{__shfl_sync(~0u, by.left, pair), __shfl_sync(~0u, by.right, pair)};
      const MergeFactors odd{__shfl_sync(~0u, by.left, pair + 4), __shfl_sync(~0u, by.right, pair + 4)};
#pragma unroll
      for (int m = 0; m < kDimTiles; ++m) {
        values[m][n][0] = merge_value(values[m][n][0], right.values[m][n][0], even);
        values[m][n][1] = merge_value(values[m][n][1], right.values[m][n][1], odd);
        values[m][n][2] = merge_value(values[m][n][2], right.values[m][n][2], even);
        values[m][n][3] = merge_value(values[m][n][3], right.values[m][n][3], odd);
      }
    }
  }

  // Each thread's own words in shared memory: [tile][thread] float4, then [column][thread] float2.
  __device__ __forceinline__ void store(char* to) const {
    float4* words = reinterpret_cast<float4*>(to) + threadIdx.x;
    float2* sums = reinterpret_cast<float2*>(to + kDimTiles * kColumns * 16 * kThreads) + threadIdx.x;
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
      sums[n * kThreads] = make_float2(maximum[n], sum[n]);
#pragma unroll
      for (int m = 0; m < kDimTiles; ++m)
        words[(m * kColumns + n) * kThreads] =
            make_float4(values[m][n][0], values[m][n][1], values[m][n][2], values[m][n][3]);
    }
  }

  __device__ __forceinline__ void load(const char* from) {
    const float4* words = reinterpret_cast<const float4*>(from) + threadIdx.x;
    const float2* sums =
        reinterpret_cast<const float2*>(from + kDimTiles * kColumns * 16 * kThreads) + threadIdx.x;
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
      const float2 both = sums[n * kThreads];
      maximum[n] = both.x, sum[n] = both.y;
#pragma unroll
      for (int m = 0; m < kDimTiles; ++m) {
        const float4 word = words[(m * kColumns + n) * kThreads];
        values[m][n][0] = word.x, values[m][n][1] = word.y, values[m][n][2] = word.z,
        values[m][n][3] = word.w;
      }
    }
  }
};

// The queries of an item as B operands, and what their scores need. Element [n][i] is of query 2t + i of
// column tile n.
template <typename KV, int kDim, int kColumns>
struct Queries {
  using T = Operand<KV>;
  uint32_t fragments[kColumns][kDim / 16][2];
  float gain[kColumns][2];
  float slope[kColumns][2];
  int position[kColumns][2];

  __device__ __forceinline__ void load(const DecodeParams& p, const Item& item, const char* shared) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int group = p.heads / p.kv_heads;
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
      const int row = n * 8 + g;
#pragma unroll
      for (int k = 0; k < kDim / 16; ++k) {
        if constexpr (sizeof(KV) == 2) {
          fragments[n][k][0] =
              *reinterpret_cast<const uint32_t*>(shared + swizzled<kDim * 2>(row, 2 * k) + 4 * t);
          fragments[n][k][1] =
              *reinterpret_cast<const uint32_t*>(shared + swizzled<kDim * 2>(row, 2 * k + 1) + 4 * t);
        } else {
          // ldmatrix gives a lane four neighbouring e4m3, so k runs through the dims in fours.
          const uint2 four =
              *reinterpret_cast<const uint2*>(shared + swizzled<kDim * 2>(row, 2 * k + t / 2) + t % 2 * 8);
          fragments[n][k][0] = four.x, fragments[n][k][1] = four.y;
        }
      }
      float row_gain = p.gain;
      if constexpr (sizeof(KV) == 1) row_gain *= to_f16(fragments[n], p.q_is_bf16);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int all_row = item.block * 8 * kColumns + n * 8 + 2 * t + i;
        gain[n][i] = __shfl_sync(~0u, row_gain, 8 * t + 4 * i);
        position[n][i] = item.len - p.queries + all_row / group;
        slope[n][i] = p.alibi_slopes ? p.alibi_slopes[item.kv_head * group + all_row % group] * kLog2e : 0.f;
      }
    }
  }

  // Converts a row to fp16, divided by the power of two that brings its largest number to [1, 2); returns
  // that power.
  static __device__ __forceinline__ float to_f16(uint32_t (&row)[kDim / 16][2], bool from_bf16) {
    float largest = 0.f;
#pragma unroll
    for (int k = 0; k < kDim / 16; ++k) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float2 both = from_bf16 ? unpack<__nv_bfloat16>(row[k][i]) : unpack<__half>(row[k][i]);
        largest = fmaxf(largest, fmaxf(fabsf(both.x), fabsf(both.y)));
      }
    }
    largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 1));
    largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 2));
    // Exponents from −100 to 100: the power and its inverse are normal numbers, and rows of zeros stay zero.
    const int exponent = min(max(static_cast<int>(__float_as_uint(largest) >> 23), 27), 227);
    const float power = __int_as_float(exponent << 23), inverse = __int_as_float((254 - exponent) << 23);
#pragma unroll
    for (int k = 0; k < kDim / 16; ++k) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float2 both = from_bf16 ? unpack<__nv_bfloat16>(row[k][i]) : unpack<__half>(row[k][i]);
        row[k][i] = pack<__half>(both.x * inverse, both.y * inverse);
      }
    }
    return power;
  }
};

// S^T of this warp's 16 keys and all queries.
template <typename KV, int kDim, int kColumns>
__device__ __forceinline__ void multiply_keys(float (&scores)[kColumns][4], uint32_t keys,
                                              const Queries<KV, kDim, kColumns>& queries) {
  using T = Operand<KV>;
  const int lane = threadIdx.x % 32;
  const int row = threadIdx.x / 32 * 16 + lane % 16;
#pragma unroll
  for (int n = 0; n < kColumns; ++n) scores[n][0] = scores[n][1] = scores[n][2] = scores[n][3] = 0.f;
  constexpr int kRowBytes = kDim * sizeof(KV);
#pragma unroll
  for (int c = 0; c < kRowBytes / 32; ++c) {
    uint32_t raw[4];
    load_matrices(raw, keys + swizzled<kRowBytes>(row, 2 * c + lane / 16));
    if constexpr (sizeof(KV) == 2) {
#pragma unroll
      for (int n = 0; n < kColumns; ++n)
        mma<T>(scores[n], raw, queries.fragments[n][c][0], queries.fragments[n][c][1]);
    } else {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t a[4];
        widen(raw[2 * half], a[0], a[2]);
        widen(raw[2 * half + 1], a[1], a[3]);
#pragma unroll
        for (int n = 0; n < kColumns; ++n)
          mma<T>(scores[n], a, queries.fragments[n][2 * c + half][0], queries.fragments[n][2 * c + half][1]);
      }
    }
  }
}

// Head dims m of this warp, keys k of the tile, of V^T. For e4m3, rows g and g + 8 are dims 2g and 2g + 1.
template <typename KV, int kDim>
__device__ __forceinline__ void load_values(uint32_t (&a)[4], uint32_t values, int m, int k) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  constexpr int kRowBytes = kDim * sizeof(KV);
  const int dim = warp * (kDim / kWarps) + m * 16;
  if constexpr (sizeof(KV) == 2) {
    load_matrices_transposed(
        a, values + swizzled<kRowBytes>(k * 16 + lane % 8 + lane / 16 * 8, dim / 8 + lane / 8 % 2));
  } else {
    uint32_t raw[2];
    load_matrices_transposed(raw, values + swizzled<kRowBytes>(k * 16 + lane % 16, dim / 16));
    widen(__byte_perm(raw[0], 0, 0x3120), a[0], a[1]);
    widen(__byte_perm(raw[1], 0, 0x3120), a[2], a[3]);
  }
}

// Turns products into scores, masks what a row may not see, and hands them to all warps: [query, key].
template <typename KV, int kDim, int kColumns>
__device__ __forceinline__ void share_scores(float* shared, const float (&products)[kColumns][4],
                                             const Queries<KV, kDim, kColumns>& queries,
                                             const DecodeParams& p, const Item& item) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int key = threadIdx.x / 32 * 16 + g;
  const int base = item.tile * kTile;
  const bool all_seen =
      base + kTile <= item.len - p.queries + 1 && (p.window <= 0 || base >= item.len - p.window);
  const bool plain = all_seen && p.cap == 0.f && p.alibi_slopes == nullptr;
#pragma unroll
  for (int n = 0; n < kColumns; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float score = products[n][i] * queries.gain[n][i % 2];
      if (!plain) {
        const int at = base + key + i / 2 * 8, query = queries.position[n][i % 2];
        score =
            score_of(products[n][i], queries.gain[n][i % 2], p.cap) + queries.slope[n][i % 2] * (at - query);
        if (at > query || (p.window > 0 && at <= query - p.window)) score = negative_infinity();
      }
      shared[(n * 8 + 2 * t + i % 2) * kScorePitch + key + i / 2 * 8] = score;
    }
  }
}

// A tile's node from its scores and values. Every warp takes all of the tile's softmax, and its own head
// dims.
template <typename KV, int kDim, int kColumns>
__device__ __forceinline__ void sum_tile(Node<kDim / 64, kColumns>& node, const float* scores,
                                         uint32_t values) {
  using T = Operand<KV>;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  uint32_t weights[kColumns][4][2];
#pragma unroll
  for (int n = 0; n < kColumns; ++n) {
    float2 score[8];
    float top = negative_infinity();
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      score[i] = *reinterpret_cast<const float2*>(scores + (n * 8 + g) * kScorePitch + i * 8 + 2 * t);
      top = fmaxf(top, fmaxf(score[i].x, score[i].y));
    }
    top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
    top = ceilf(fmaxf(top, __shfl_xor_sync(~0u, top, 2)));
    const float reference = finite_max(top);
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float low = exp2_fast(score[i].x - reference), high = exp2_fast(score[i].y - reference);
      sum += low + high;
      weights[n][i / 2][i % 2] = pack<T>(low, high);
    }
    sum += __shfl_xor_sync(~0u, sum, 1);
    node.sum[n] = sum + __shfl_xor_sync(~0u, sum, 2);
    node.maximum[n] = top;
  }
#pragma unroll
  for (int m = 0; m < kDim / 64; ++m) {
#pragma unroll
    for (int n = 0; n < kColumns; ++n)
      node.values[m][n][0] = node.values[m][n][1] = node.values[m][n][2] = node.values[m][n][3] = 0.f;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      uint32_t a[4];
      load_values<KV, kDim>(a, values, m, k);
#pragma unroll
      for (int n = 0; n < kColumns; ++n) mma<T>(node.values[m][n], a, weights[n][k][0], weights[n][k][1]);
    }
  }
}

// ---- store ----

__device__ __forceinline__ void store_16(void* to, int64_t at, float value, bool bf16) {
  if (bf16) {
    static_cast<__nv_bfloat16*>(to)[at] = __float2bfloat16_rn(value);
  } else {
    static_cast<__half*>(to)[at] = __float2half_rn(value);
  }
}

// Where a row of a block is in out, in elements, and its head.
struct RowPlace {
  int64_t at;
  int head;
};

__device__ __forceinline__ RowPlace place_of(const DecodeParams& p, const Item& item, int all_row) {
  const int group = p.heads / p.kv_heads;
  const int head = item.kv_head * group + all_row % group;
  const int64_t token = static_cast<int64_t>(item.seq) * p.queries + all_row / group;
  return {token * p.out_stride + static_cast<int64_t>(head) * p.head_dim, head};
}

template <typename KV, int kDim, int kColumns>
__device__ __forceinline__ void store_result(const Node<kDim / 64, kColumns>& node, const DecodeParams& p,
                                             const Item& item, bool whole) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int rows = p.queries * (p.heads / p.kv_heads) - item.block * 8 * kColumns;
  const Partials<8 * kColumns, kDim> partials(p);
  // Rows g and g + 8 of a dim tile.
  const int dim = warp * (kDim / kWarps) + (sizeof(KV) == 1 ? 2 * g : g);
  constexpr int kOther = sizeof(KV) == 1 ? 1 : 8;
#pragma unroll
  for (int n = 0; n < kColumns; ++n) {
    float scale = 1.f;
    if (whole) {
      const int row = min(n * 8 + g, rows - 1);
      const float sink = p.sinks ? p.sinks[place_of(p, item, item.block * 8 * kColumns + row).head] * kLog2e
                                 : negative_infinity();
      scale = normalizer(node.maximum[n], node.sum[n], sink) * p.v_scale;
    } else if (warp == 0 && t == 0 && n * 8 + g < rows) {
      partials.sums[static_cast<int64_t>(item.id) * 8 * kColumns + n * 8 + g] =
          make_float2(node.maximum[n], node.sum[n]);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float row_scale = __shfl_sync(~0u, scale, 8 * t + 4 * i);
      const int row = n * 8 + 2 * t + i;
      if (row >= rows) continue;
      const RowPlace place = place_of(p, item, item.block * 8 * kColumns + row);
      float* partial = partials.values + (static_cast<int64_t>(item.id) * 8 * kColumns + row) * kDim;
#pragma unroll
      for (int m = 0; m < kDim / 64; ++m) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int at = dim + m * 16 + h * kOther;
          const float value = node.values[m][n][2 * h + i];
          if (!whole) {
            partial[at] = value;
          } else if (at < p.head_dim) {
            store_16(p.out, place.at + at, value * row_scale, p.q_is_bf16);
          }
        }
      }
    }
  }
}

// Sums a sequence's pieces along the tree: `levels` counts in base 4 above the pieces' own level.
template <int kDim, int kColumns>
__device__ void merge_pieces(const DecodeParams& p, const Plan& plan, const Item& item, int row_blocks,
                             int pieces) {
  constexpr int kRows = 8 * kColumns, kAbove = 9;  // 4^(9 + level) tiles: more than an int can count keys
  const Partials<kRows, kDim> partials(p);
  const int rows = min(kRows, p.queries * (p.heads / p.kv_heads) - item.block * kRows);
  const int stride = p.kv_heads * row_blocks;
  const int first_slot = plan.starts[item.seq] + item.kv_head * row_blocks + item.block;
  const int first_piece = (item.first / kTile) >> plan.shift;
  for (int e = threadIdx.x; e < rows * (kDim / 4); e += kThreads) {
    const int row = e / (kDim / 4), dim = e % (kDim / 4) * 4;
    float4 value[kAbove];
    float maximum[kAbove], sum[kAbove];
#pragma unroll
    for (int level = 0; level < kAbove; ++level) {
      value[level] = make_float4(0.f, 0.f, 0.f, 0.f);
      maximum[level] = negative_infinity(), sum[level] = 0.f;
    }
    const auto merge_into = [&](int level, float4 right, float right_maximum, float right_sum) {
      const MergeFactors by = merge_sums(maximum[level], sum[level], right_maximum, right_sum);
      value[level].x = merge_value(value[level].x, right.x, by);
      value[level].y = merge_value(value[level].y, right.y, by);
      value[level].z = merge_value(value[level].z, right.z, by);
      value[level].w = merge_value(value[level].w, right.w, by);
    };
    const auto carry = [&](int level) {
      merge_into(level + 1, value[level], maximum[level], sum[level]);
      value[level] = make_float4(0.f, 0.f, 0.f, 0.f);
      maximum[level] = negative_infinity(), sum[level] = 0.f;
    };
    constexpr int kAhead = 8;  // loads under way
    for (int base = 0; base < pieces; base += kAhead) {
      float4 part[kAhead];
      float2 sums[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        if (base + i >= pieces) break;
        const int64_t slot = first_slot + static_cast<int64_t>(base + i) * stride;
        part[i] =
            __ldcg(reinterpret_cast<const float4*>(partials.values + (slot * kRows + row) * kDim + dim));
        sums[i] = __ldcg(partials.sums + slot * kRows + row);
      }
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        if (base + i >= pieces) break;
        merge_into(0, part[i], sums[i].x, sums[i].y);
        int count = first_piece + base + i + 1;
#pragma unroll
        for (int level = 0; level + 1 < kAbove; ++level) {
          if (count % 4 != 0) break;
          carry(level);
          count /= 4;
        }
      }
    }
#pragma unroll
    for (int level = 0; level + 1 < kAbove; ++level) carry(level);

    const RowPlace place = place_of(p, item, item.block * kRows + row);
    const float sink = p.sinks ? p.sinks[place.head] * kLog2e : negative_infinity();
    const float scale = normalizer(maximum[kAbove - 1], sum[kAbove - 1], sink) * p.v_scale;
    const float4 total = value[kAbove - 1];
    if (dim < p.head_dim) {
      uint2 both;
      if (p.q_is_bf16) {
        both = make_uint2(pack<__nv_bfloat16>(total.x * scale, total.y * scale),
                          pack<__nv_bfloat16>(total.z * scale, total.w * scale));
      } else {
        both = make_uint2(pack<__half>(total.x * scale, total.y * scale),
                          pack<__half>(total.z * scale, total.w * scale));
      }
      *reinterpret_cast<uint2*>(static_cast<uint16_t*>(p.out) + place.at + dim) = both;
    }
  }
}

// Stores an item's node: the result where it is the whole sequence, else its part, and the sum of all parts
// after the last.
template <typename KV, int kDim, int kColumns>
__device__ __forceinline__ void finish(const Node<kDim / 64, kColumns>& node, const DecodeParams& p,
                                       const Plan& plan, const Item& item, int row_blocks, int* is_last) {
  const int per_piece = p.kv_heads * row_blocks;
  const int pieces = (plan.starts[item.seq + 1] - plan.starts[item.seq]) / per_piece;
  store_result<KV, kDim, kColumns>(node, p, item, pieces == 1);
  if (pieces == 1) return;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    int* counter =
        p.counters + (static_cast<int64_t>(item.seq) * p.kv_heads + item.kv_head) * row_blocks + item.block;
    *is_last = atomicAdd(counter, 1) == pieces - 1;
    if (*is_last) *counter = 0;
  }
  __syncthreads();
  if (*is_last) {
    __threadfence();
    merge_pieces<kDim, kColumns>(p, plan, item, row_blocks, pieces);
  }
}

// A sequence without keys, such as a graph's padding: zeros.
__device__ __forceinline__ void zero_empty(const DecodeParams& p, const Plan& plan) {
  const int row = p.heads * p.head_dim;
  for (int seq = blockIdx.x; seq < p.seqs; seq += gridDim.x) {
    if (plan.lens[seq] > 0) continue;
    for (int i = threadIdx.x; i < p.queries * row; i += kThreads) {
      static_cast<uint16_t*>(
          p.out)[(static_cast<int64_t>(seq) * p.queries + i / row) * p.out_stride + i % row] = 0;
    }
  }
}

// ---- kernel ----

// Two halves of a tile, keys and values, go through one ring. A tile has two barriers: after the first its
// keys are there and the values of the tile before are done with; after the second its values and scores are
// there, its keys done with.
template <typename KV, int kDim, int kColumns>
__global__ void __launch_bounds__(kThreads, 2) kernel(const __grid_constant__ DecodeParams p) {
  using S = Shape<KV, kDim, kColumns>;
  extern __shared__ __align__(128) char shared[];
  float* scores = reinterpret_cast<float*>(shared + S::kScoreAt);
  int* flag = reinterpret_cast<int*>(shared + S::kPlanAt) + 15;
  const uint32_t ring = shared_address(shared);
  const int row_blocks = (p.queries * (p.heads / p.kv_heads) + S::kRows - 1) / S::kRows;

  let_next_start();
  wait_for_previous();
  const Plan plan = make_plan<S::kLevels>(p, row_blocks, shared + S::kPlanAt);
  zero_empty(p, plan);

  Loader<KV, kDim, kColumns> loader(p, plan, row_blocks, ring);
#pragma unroll
  for (int half = 0; half < S::kHalves - 1; ++half) loader.issue(half % 2, half);

  Queries<KV, kDim, kColumns> queries;
  Node<kDim / 64, kColumns> node;  // of level 1
  bool saved[S::kLevels - 1];
  int key_slot = 0, query_slot = -1;
  for (Item item = item_at(p, plan, row_blocks, blockIdx.x); item.id < plan.total;) {
    const int value_slot = key_slot + 1 == S::kHalves ? 0 : key_slot + 1;
    const int free_slot = key_slot == 0 ? S::kHalves - 1 : key_slot - 1;
    wait_copies<S::kHalves - 2>();
    __syncthreads();
    loader.issue(S::kHalves % 2 == 0, free_slot);

    if (item.fresh) {
      query_slot = query_slot + 1 == S::kQuerySlots ? 0 : query_slot + 1;
      queries.load(p, item, shared + S::kQueryAt + query_slot * S::kQueryBytes);
      node.clear();
#pragma unroll
      for (bool& level : saved) level = false;
    }
    float products[kColumns][4];
    multiply_keys<KV, kDim, kColumns>(products, ring + key_slot * S::kHalfBytes, queries);
    share_scores(scores, products, queries, p, item);

    wait_copies<S::kHalves - 2>();
    __syncthreads();
    loader.issue(S::kHalves % 2 == 1, key_slot);
    {
      Node<kDim / 64, kColumns> tile;
      sum_tile<KV, kDim, kColumns>(tile, scores, ring + value_slot * S::kHalfBytes);
      node.merge(tile);
    }
    // Full nodes go up; at an item's end the others do as well. A node's first part is copied, not merged.
    const bool last = item.tile + 1 == item.end;
    char* place = shared + S::kSavedAt;
#pragma unroll
    for (int level = 0; level < S::kLevels - 1; ++level, place += S::kSavedBytes) {
      if (!last && (item.tile + 1) % (4 << 2 * level) != 0) break;
      if (saved[level]) {
        Node<kDim / 64, kColumns> left;
        left.load(place);
        left.merge(node);
        node = left;
      }
      saved[level] = !last;
      if (last) continue;
      // Full at the level above, too: carried on from registers.
      const bool carry = level + 2 < S::kLevels && (item.tile + 1) % (16 << 2 * level) == 0;
      if (carry) {
        saved[level] = false;
        continue;
      }
      node.store(place);
      node.clear();
    }
    if (last) finish<KV, kDim, kColumns>(node, p, plan, item, row_blocks, flag);
    step(item, p, plan, row_blocks);
    key_slot = value_slot + 1 == S::kHalves ? 0 : value_slot + 1;
  }
  wait_copies<0>();
}

// ---- host ----

template <typename KV, int kDim, int kColumns>
cudaError_t launch_shape(const DecodeParams& p, cudaStream_t stream) {
  using S = Shape<KV, kDim, kColumns>;
  const int shared = S::shared_bytes(p.seqs);
  int device = 0, sms = 0, sm_bytes = 0;
  if (const cudaError_t error = cudaGetDevice(&device)) return error;
  if (const cudaError_t error = cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device))
    return error;
  if (const cudaError_t error =
          cudaDeviceGetAttribute(&sm_bytes, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device))
    return error;
  if (const cudaError_t error = cudaFuncSetAttribute(kernel<KV, kDim, kColumns>,
                                                     cudaFuncAttributeMaxDynamicSharedMemorySize, shared))
    return error;
  const int resident = sm_bytes / (shared + 1024) >= 2 ? 2 : 1;
  const int64_t row_blocks = (p.queries * (p.heads / p.kv_heads) + S::kRows - 1) / S::kRows;
  const int64_t tiles = (static_cast<int64_t>(p.max_pages) * kPageRows + kTile - 1) / kTile;
  const int64_t most = p.seqs * p.kv_heads * row_blocks * tiles;
  const int64_t grid = most < sms * resident ? most : sms * resident;
  return launch(kernel<KV, kDim, kColumns>, dim3(static_cast<unsigned>(grid > 0 ? grid : 1)), kThreads,
                shared, stream, p);
}

template <typename KV>
cudaError_t launch_type(const DecodeParams& p, cudaStream_t stream) {
  const int columns = decode_rows(p.queries * (p.heads / p.kv_heads), p.head_dim) / 8;
  const auto with_dim = [&]<int kDim>() {
    if (columns == 1) return launch_shape<KV, kDim, 1>(p, stream);
    if (columns == 2) return launch_shape<KV, kDim, 2>(p, stream);
    if constexpr (kDim < 256) return launch_shape<KV, kDim, 4>(p, stream);
    return cudaErrorInvalidValue;
  };
  if (p.head_dim <= 64) return with_dim.template operator()<64>();
  if (p.head_dim <= 128) return with_dim.template operator()<128>();
  return with_dim.template operator()<256>();
}

}  // namespace decode
}  // namespace tgi
