// How decode's work is shared out: which parts of which sequences a CTA takes. See decode.cuh.
#pragma once

#include "attention/cuda.h"
#include "attention/tree.h"

namespace tgi {
namespace decode {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;
constexpr int kPageRows = 16;

// Neighbouring parts of a sequence's tree (tiles, nodes or chunks), for one KV head and one block of query
// rows; in shared memory, tile by tile.
struct Item {
  int slot;  // of the first part, its place among all; negative: there are no more items
  int seq, kv_head, block;
  int tile, end;   // tiles
  int first, len;  // keys some row may see
  int shift;       // log2 of a part's tiles
  int head_slot;   // of the first part of this sequence, KV head and block
};

template <typename KV, int kDim, int kColumns>
struct Shape : Tree<kDim> {
  using Tree<kDim>::kTile;
  static constexpr int kTilePages = kTile / kPageRows;
  static constexpr int kRows = 8 * kColumns;            // query rows of an item
  static constexpr int kRowBytes = kDim * sizeof(KV);   // of a key
  static constexpr int kHalfBytes = kTile * kRowBytes;  // the keys or the values of a tile
  static constexpr int kQueryBytes = kRows * kDim * 2;
  // Halves in the ring, and CTAs of an SM: all in all 100 KB or more under way, and warps to hide a tile's
  // latency.
  static constexpr int kHalves = kHalfBytes <= 16384 || kDim == 256 ? 4 : kColumns < 4 ? 3 : 2;
  static constexpr int kResident = kHalfBytes <= 16384 && kColumns == 1 && kDim < 256 ? 3
                                   : kHalves * kHalfBytes <= 98304                    ? 2
                                                                                      : 1;
  static constexpr int kKeyTiles = kTile / kWarps / 16;  // of a warp, of 16 keys
  static constexpr int kDimTiles = kDim / kWarps / 16;   // of a warp, of 16 head dims
  // The largest part of a CTA: with 32 rows registers have no room for the sums of a chunk.
  static constexpr int kLargestShift = kColumns < 4 ? Tree<kDim>::kChunkShift : Tree<kDim>::kNodeShift;
  static constexpr bool kReloadQueries = kDim * kColumns >= 256;  // no room in registers from tile to tile
  static constexpr int kMergeLoads = kColumns > 1    ? 4
                                     : kResident > 2 ? 8
                                                     : 16;  // under way, as registers allow
  static constexpr int kQuerySlots = (kHalves + 1) / 2;     // items under way: each may be of one tile
  static constexpr int kItems = kHalves / 2 + 2;
  static constexpr int kScoreAt = kQuerySlots * kQueryBytes;  // behind the queries
  static constexpr int kItemAt = kScoreAt + kRows * kTile * 4;
  static constexpr int kRingAt = kItemAt + (kItems * static_cast<int>(sizeof(Item)) + 127) / 128 * 128;
  static constexpr int plan_at(int halves) { return kRingAt + halves * kHalfBytes; }
  static constexpr int shared_bytes(int halves, int seqs) {
    return plan_at(halves) + 16 + 4 * (2 * seqs + 1);
  }
};

// ---- plan ----

// All parts of 2^shift tiles, of which every CTA takes the next `share`; the same in every CTA.
struct Plan {
  int* header;  // shift, total
  int* starts;  // [seqs + 1]: parts before a sequence
  int* lens;    // [seqs]
  int shift, total;
  int row_blocks;
};

__device__ __forceinline__ int first_key(const DecodeParams& p, int len) {
  return p.window > 0 ? max(0, len - p.queries - p.window + 1) : 0;
}

// Parts of 2^shift tiles that hold keys some row may see.
template <int kTile>
__device__ __forceinline__ int parts_of(int first, int len, int shift) {
  return len <= 0 ? 0 : (((len - 1) / kTile) >> shift) - ((first / kTile) >> shift) + 1;
}

// What may leave a CTA: tiles, nodes or chunks.
constexpr int kLevels = 3;
template <typename S>
constexpr int shift_of(int level) {
  return level == 0 ? 0 : level == 1 ? S::kNodeShift : S::kLargestShift;
}

// One warp chooses the level with the shortest estimated time, in units of a tile's bytes at a processor's
// share of the memory: what a processor reads, the latency of each CTA's tiles one after the other, the
// writing of parts, and the merge's start and its reads of the longest sequence's parts. Fitted to an H200:
// at 8x1024 tiles are 1.0 µs faster than nodes, at 1x8192 2.8 slower.
template <typename S>
__device__ __forceinline__ void make_plan(Plan& plan, const DecodeParams& p, int sms) {
  constexpr int kTile = S::kTile;
  const int lane = threadIdx.x, copies = p.kv_heads * plan.row_blocks;
  if (threadIdx.x < 32) {
    int parts[kLevels] = {};
    int longest = 0;
#pragma unroll 1
    for (int seq = lane; seq < p.seqs; seq += 32) {
      const int len = min(max(p.kv_lens[seq], 0), p.max_pages * kPageRows), first = first_key(p, len);
      plan.lens[seq] = len;
      longest = max(longest, (len - first / kTile * kTile + kTile - 1) / kTile);
#pragma unroll
      for (int level = 0; level < kLevels; ++level)
        parts[level] += parts_of<kTile>(first, len, shift_of<S>(level));
    }
    longest = __reduce_max_sync(~0u, longest);
    float best = 3e38f;
    int shift = shift_of<S>(kLevels - 1);
#pragma unroll
    for (int level = 0; level < kLevels; ++level) {
      const int total = __reduce_add_sync(~0u, parts[level]) * copies;
      const int tiles = min(1 << shift_of<S>(level), longest);
      const float of_sm = ceilf(__fdividef(total, sms)) * tiles;
      const float of_cta = ceilf(__fdividef(total, gridDim.x)) * tiles;
      const int most = (longest + tiles - 1) / tiles;
      const float cost = of_sm * (1.f + 0.0625f / tiles) + 0.38f * of_cta +
                         (most > 1 ? 0.37f + min(most, 128) * 0.045f : 0.f);
      if (total <= p.slots && cost < best) best = cost, shift = shift_of<S>(level);
    }
    int before = 0;
#pragma unroll 1
    for (int base = 0; base < p.seqs; base += 32) {
      const int seq = base + lane, len = seq < p.seqs ? plan.lens[seq] : 0;
      const int mine = parts_of<kTile>(first_key(p, len), len, shift) * copies;
      int upto = mine;
#pragma unroll
      for (int step = 1; step < 32; step *= 2) {
        const int left = __shfl_up_sync(~0u, upto, step);
        if (lane >= step) upto += left;
      }
      if (seq < p.seqs) plan.starts[seq] = before + upto - mine;
      before += __shfl_sync(~0u, upto, 31);
    }
    if (lane == 0) plan.starts[p.seqs] = before, plan.header[0] = shift, plan.header[1] = before;
  }
  __syncthreads();
  plan.shift = plan.header[0], plan.total = plan.header[1];
}

// The item that begins at a part, and ends with its sequence, KV head and block or before part `stop`.
template <typename S>
__device__ __forceinline__ Item item_at(const DecodeParams& p, const Plan& plan, int slot, int stop) {
  constexpr int kTile = S::kTile;
  Item item{};
  item.slot = slot < stop ? slot : -1;
  if (slot >= stop) return item;
  int low = 0, high = p.seqs;
#pragma unroll 1
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (plan.starts[middle] <= slot ? low : high) = middle;
  }
  item.seq = low;
  item.len = plan.lens[low];
  item.first = first_key(p, item.len);
  const int parts = parts_of<kTile>(item.first, item.len, plan.shift), before = slot - plan.starts[low];
  const int copy = before / parts, part = before - copy * parts;
  item.kv_head = copy / plan.row_blocks;
  item.block = copy - item.kv_head * plan.row_blocks;
  item.head_slot = slot - part;
  const int taken = min(parts - part, stop - slot);
  const int first_tile = item.first / kTile, first_part = (first_tile >> plan.shift) + part;
  item.tile = max(first_tile, first_part << plan.shift);
  item.end = min((item.len + kTile - 1) / kTile, (first_part + taken) << plan.shift);
  // An item that nobody shares may take its largest parts.
  item.shift = taken == parts ? S::kLargestShift : plan.shift;
  return item;
}

}  // namespace decode
}  // namespace tgi
