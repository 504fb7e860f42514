// How decode's work is shared out: which nodes of which sequences a CTA takes. See decode.cuh.
#pragma once

#include "attention/cuda.h"

namespace tgi {
namespace decode {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;
constexpr int kTile = 64;  // keys
constexpr int kPageRows = 16;
constexpr int kTilePages = kTile / kPageRows;
// In floats. Pairs of keys of four neighbouring queries lie in different banks; and as queries 4 to 7 of
// eight have their keys' eights swapped two by two, so do eight keys of every other query.
constexpr int kScorePitch = kTile + 8;
constexpr int kMergeBits = 6;  // log2 of the parts that one merge takes: three levels of the tree

// Neighbouring nodes of a sequence's tree, for one KV head and one block of query rows; in shared memory,
// tile by tile.
struct Item {
  int slot;  // of the first node, its place among all; negative: there are no more items
  int seq, kv_head, block;
  int tile, end;   // tiles
  int first, len;  // keys some row may see
  int shift;       // log2 of a node's tiles
  int head_slot;   // of the first node of this sequence, KV head and block
};

template <typename KV, int kDim, int kColumns>
struct Shape {
  static constexpr int kRows = 8 * kColumns;            // query rows of an item
  static constexpr int kRowBytes = kDim * sizeof(KV);   // of a key
  static constexpr int kHalfBytes = kTile * kRowBytes;  // the keys or the values of a tile
  static constexpr int kQueryBytes = kRows * kDim * 2;
  static constexpr int kStageBytes = 2 * kHalfBytes;
  // Tiles in the ring, and CTAs of an SM: all in all 100 KB or more under way, and warps to hide a tile's
  // latency.
  static constexpr int kStages = kHalfBytes <= 8192 ? 4 : kHalfBytes <= 16384 && kColumns < 4 ? 3 : 2;
  static constexpr int kResident = kHalfBytes <= 8192 && kColumns == 1 ? 3 : kHalfBytes <= 16384 ? 2 : 1;
  static constexpr int kLevels = kColumns == 4 ? 2 : 3;
  static constexpr int kDimTiles = kDim / kWarps / 16;            // of a warp
  static constexpr bool kReloadQueries = kDim * kColumns >= 512;  // no room in registers from tile to tile
  static constexpr int kMergeLoads = kColumns > 1    ? 4
                                     : kResident > 2 ? 8
                                                     : 16;  // under way, as registers allow

  static constexpr int kQuerySlots = kStages - 1;  // items under way: each may be of one tile
  static constexpr int kQueryAt = kStages * kStageBytes;
  static constexpr int kScoreAt = kQueryAt + kQuerySlots * kQueryBytes;
  static constexpr int kItemAt = kScoreAt + kRows * kScorePitch * 4;
  static constexpr int kPlanAt = kItemAt + (kStages + 1) * static_cast<int>(sizeof(Item));
  static constexpr int shared_bytes(int seqs) { return kPlanAt + 16 + 4 * (2 * seqs + 1); }
};

// ---- plan ----

// All nodes of 2^shift tiles, of which every CTA takes the next `share`; the same in every CTA.
struct Plan {
  int* header;  // shift, total
  int* starts;  // [seqs + 1]: nodes before a sequence
  int* lens;    // [seqs]
  int shift, total;
  int row_blocks;
};

__device__ __forceinline__ int first_key(const DecodeParams& p, int len) {
  return p.window > 0 ? max(0, len - p.queries - p.window + 1) : 0;
}

// Nodes of 2^shift tiles that hold keys some row may see.
__device__ __forceinline__ int nodes_of(int first, int len, int shift) {
  return len <= 0 ? 0 : (((len - 1) / kTile) >> shift) - ((first / kTile) >> shift) + 1;
}

// One warp chooses the level with the shortest estimated time, in tiles: the largest share, the writing of
// parts, and the merge's start and its reads of the longest sequence's parts.
template <int kLevels>
__device__ __forceinline__ void make_plan(Plan& plan, const DecodeParams& p) {
  const int lane = threadIdx.x, copies = p.kv_heads * plan.row_blocks;
  if (threadIdx.x < 32) {
    int nodes[kLevels + 1] = {};
    int longest = 0;
#pragma unroll 1
    for (int seq = lane; seq < p.seqs; seq += 32) {
      const int len = min(max(p.kv_lens[seq], 0), p.max_pages * kPageRows);
      const int first = first_key(p, len);
      plan.lens[seq] = len;
      longest = max(longest, (len - first / kTile * kTile + kTile - 1) / kTile);
#pragma unroll
      for (int level = 0; level <= kLevels; ++level) nodes[level] += nodes_of(first, len, 2 * level);
    }
    longest = __reduce_max_sync(~0u, longest);
    float best = 3e38f;
    int shift = 2 * kLevels;
#pragma unroll
    for (int level = 0; level <= kLevels; ++level) {
      const int total = __reduce_add_sync(~0u, nodes[level]) * copies;
      const int tiles = min(1 << 2 * level, longest);
      const float share = ceilf(__fdividef(total, gridDim.x)) * tiles;
      const int parts = (longest + tiles - 1) / tiles;
      const float cost =
          share * (1.f + 0.0625f / tiles) + (parts > 1 ? 1.5f + min(parts, 64) * 0.0625f : 0.f);
      if (total <= p.slots && cost < best) best = cost, shift = 2 * level;
    }
    int before = 0;
#pragma unroll 1
    for (int base = 0; base < p.seqs; base += 32) {
      const int seq = base + lane, len = seq < p.seqs ? plan.lens[seq] : 0;
      const int mine = nodes_of(first_key(p, len), len, shift) * copies;
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

// The item that begins at a node, and ends with its sequence, KV head and block or before node `stop`.
template <int kLevels>
__device__ __forceinline__ Item item_at(const DecodeParams& p, const Plan& plan, int slot, int stop) {
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
  const int nodes = nodes_of(item.first, item.len, plan.shift), before = slot - plan.starts[low];
  const int copy = before / nodes, node = before - copy * nodes;
  item.kv_head = copy / plan.row_blocks;
  item.block = copy - item.kv_head * plan.row_blocks;
  item.head_slot = slot - node;
  const int taken = min(nodes - node, stop - slot);
  const int first_tile = item.first / kTile, first_node = (first_tile >> plan.shift) + node;
  item.tile = max(first_tile, first_node << plan.shift);
  item.end = min((item.len + kTile - 1) / kTile, (first_node + taken) << plan.shift);
  // An item that nobody shares may take its largest nodes.
  item.shift = taken == nodes ? 2 * kLevels : plan.shift;
  return item;
}

}  // namespace decode
}  // namespace tgi
