// How the product of many tokens with quantised weights is cut into tiles on Hopper, and what brings a tile's
// operands to shared memory.
#pragma once

#include "common/hopper.cuh"
#include "common/pdl.cuh"
#include "quant/chunks.h"
#include "quant/cuda.h"
#include "quant/layout.cuh"

namespace tgi {

constexpr int kWarpgroup = 128;
constexpr int kMaxWarpgroups = 2;
constexpr int kThreads = (kMaxWarpgroups + 1) * kWarpgroup;  // the last are the producers
// Large blocks need more registers than an even share: the producers give up theirs.
template <int kTokens>
constexpr bool kUneven = kTokens > 64;
constexpr int kRowBytes = 128;  // of a piece of x
constexpr int kSlotPieces = 2;
constexpr int kSlotSteps = 8;  // of k16
constexpr int kMaxSlots = 16;
constexpr int kHeaderBytes = 1024;  // the barriers; keeps x on the swizzle's 1024 bytes

enum class Cluster { single, shares_x, ranges };

// How one launch cuts its work: a tile is one strip a warpgroup, and a block of tokens.
struct Tiling {
  Cluster cluster;
  int ranks;                          // CTAs of a cluster
  int warpgroups, strips, row_tiles;  // strips: in all; row_tiles: of a cluster
  int token_blocks, band;             // of which `band` follow each other
  int pieces, steps;                  // of all columns: pieces, and slots full of them
  int ranges, group_steps;            // k16 steps of a group
  int slots;
  bool whole;  // columns are whole pieces
};

// A slot holds two pieces, of which the last may not exist: x [pieces][tokens][128 bytes], then for each
// warpgroup words, then pairs. Sums come after the slots.
struct Slots {
  uint32_t full, empty, told, first, sums;
  int x, words, pairs, bytes;  // sizes in bytes: words and pairs are of one warpgroup

  template <int kTokens, int kBits, int kGroups>
  __host__ __device__ __forceinline__ static Slots of(uint32_t shared, const Tiling& t) {
    Slots s{};
    s.full = shared;
    s.empty = s.full + 8 * kMaxSlots;
    s.told = s.empty + 8 * kMaxSlots;
    s.first = s.full + kHeaderBytes;
    s.x = kSlotPieces * kTokens * kRowBytes;
    s.words = kSlotPieces * kPieceBytes<kBits>;
    s.pairs = kGroups * kPairsBytes;
    s.bytes = (s.x + t.warpgroups * (s.words + s.pairs) + 1023) / 1024 * 1024;
    s.sums = s.first + t.slots * s.bytes;
    return s;
  }
  __device__ __forceinline__ uint32_t at(int slot) const { return first + slot * bytes; }
  __device__ __forceinline__ uint32_t words_of(int slot, int warpgroup) const {
    return at(slot) + x + warpgroup * words;
  }
  __device__ __forceinline__ uint32_t pairs_of(int slot, int warpgroups, int warpgroup) const {
    return at(slot) + x + warpgroups * words + warpgroup * pairs;
  }
};

struct Cursor {
  int slot = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void advance(int slots) {
    if (++slot < slots) return;
    slot = 0;
    parity ^= 1;
  }
};

// The strips and tokens of a tile of this CTA, by the tile's number. Within a band of token blocks, blocks
// that share weights follow each other, so that weights come from memory once a band, and the band's x stays
// in L2.
struct Tile {
  int strip, block;
  __device__ __forceinline__ Tile(int number, int rank, const Tiling& t) {
    const int in_band = t.row_tiles * t.band, band = number / in_band, rest = number - band * in_band;
    const int width = min(t.band, t.token_blocks - band * t.band);
    const int rows = rest / width;
    block = band * t.band + rest % width;
    strip = (t.cluster == Cluster::shares_x ? rows * t.ranks + rank : rows) * t.warpgroups;
  }
};

// Slots that a CTA goes through for a tile.
struct Walk {
  int begin, end;
  __device__ __forceinline__ Walk(int rank, const Tiling& t) {
    const bool one = t.cluster == Cluster::ranges;
    begin = one ? range_border(t.steps, rank, t.ranges) : 0;
    end = one ? range_border(t.steps, rank + 1, t.ranges) : t.steps;
  }
};

// Groups of columns that a slot may touch, whose chunks have kSteps k16 steps.
template <int kSteps>
constexpr int kSlotGroups = kSlotSteps / kSteps;

// Four warps fill the ring, one thread of each: asking for copies takes a thread longer than memory takes to
// bring them (H200, one token, in a chain: 4096 x 4096 16.0 → 13.8 µs, 14336 x 4096 64.4 → 56.8).
enum class Load { words, x, pairs, more_words };  // of the first warpgroup, for all, for all, of the second

template <int kTokens, int kBits, int kSteps>
struct Producer {
  const CUtensorMap* x_map;
  const QuantMatmulParams& p;
  const Tiling& t;
  const Slots& s;
  const Load load;
  const int rank;
  int block;                     // of tokens
  int group, left;               // of the next slot's first k16 step; steps of it that are left
  const uint8_t *words, *pairs;  // of the next slot and of the strip; `pairs` of both warpgroups
  int64_t more_pairs;

  __device__ __forceinline__ void enter_tile(const Tile& tile, const Walk& walk) {
    block = tile.block;
    // Strips past the last are the last, for nothing.
    const int64_t first = min(tile.strip, t.strips - 1), second = min(tile.strip + 1, t.strips - 1);
    words = static_cast<const uint8_t*>(p.weight.words) +
            ((load == Load::more_words ? second : first) * t.pieces + walk.begin * kSlotPieces) *
                kPieceBytes<kBits>;
    pairs = static_cast<const uint8_t*>(p.weight.scales) + first * p.weight.groups * kPairsBytes;
    more_pairs = (second - first) * p.weight.groups * kPairsBytes;
    group = walk.begin * kSlotSteps / t.group_steps;
    left = (group + 1) * t.group_steps - walk.begin * kSlotSteps;
  }

  // Bytes of the pairs of the next slot, which are `*from` the first.
  __device__ __forceinline__ int next_pairs(int* from) {
    *from = group * kPairsBytes;
    int groups = 1;
    for (left -= kSlotSteps; left < 0; left += t.group_steps) ++groups;
    group += groups - 1;
    const int bytes = min(groups, p.weight.groups - *from / kPairsBytes) * kPairsBytes;
    if (left == 0) {
      ++group;
      left = t.group_steps;
    }
    return bytes;
  }

  __device__ __forceinline__ void fill_x(uint32_t to, int step, uint32_t barrier) const {
    const int first = step * kSlotPieces;
    if (!t.whole) {
      for (int i = 0; i < kSlotPieces; ++i) {
        copy_box(to + i * kTokens * kRowBytes, x_map, (first + i) * kPiece, block * kTokens, 0, barrier);
      }
    } else if (t.cluster == Cluster::shares_x) {  // each brings one of the pieces to both
      copy_box_to(3, to + rank * kTokens * kRowBytes, x_map, 0, block * kTokens, first + rank, barrier);
    } else {
      copy_box(to, x_map, 0, block * kTokens, first, barrier);
    }
  }

  // Asks for this thread's part of a slot. A piece that does not exist has words of any kind, and zeros for
  // x.
  __device__ __forceinline__ void fill(int slot, int step, uint64_t policy) {
    const uint32_t barrier = s.full + 8 * slot;
    if (load == Load::x) return fill_x(s.at(slot), step, barrier);
    if (load == Load::pairs) {
      int from;
      const int bytes = next_pairs(&from);
      copy_bytes(s.pairs_of(slot, t.warpgroups, 0), pairs + from, bytes, barrier, policy);
      if (t.warpgroups == 1) return;
      copy_bytes(s.pairs_of(slot, t.warpgroups, 1), pairs + more_pairs + from, bytes, barrier, policy);
      return;
    }
    const int bytes = min(kSlotPieces, t.pieces - step * kSlotPieces) * kPieceBytes<kBits>;
    if (load == Load::words) {
      int from;
      barrier_arrive_expecting(barrier, s.x + t.warpgroups * (bytes + next_pairs(&from)));
    }
    copy_bytes(s.words_of(slot, load == Load::words ? 0 : 1), words, bytes, barrier, policy);
    words += kSlotPieces * kPieceBytes<kBits>;
  }

  // The weights are older than this step: the first ring of them travels while the previous kernel ends.
  __device__ __forceinline__ void run() {
    const uint64_t policy = evict_first();
    bool has_waited = load == Load::x;
    if (has_waited) wait_for_previous();
    Cursor at;
    int filled = 0;
    const Walk walk(rank, t);
    const bool idle = load == Load::more_words && t.warpgroups == 1;
    const int tiles = idle ? 0 : t.row_tiles * t.token_blocks, clusters = gridDim.x / t.ranks;
    for (int number = blockIdx.x / t.ranks; number < tiles; number += clusters) {
      enter_tile(Tile(number, rank, t), walk);
      for (int step = walk.begin; step < walk.end; ++step, at.advance(t.slots)) {
        if (filled < t.slots) {
          ++filled;
        } else {
          if (!has_waited) wait_for_previous();
          has_waited = true;
          barrier_wait(s.empty + 8 * at.slot, at.parity ^ 1);
        }
        fill(at.slot, step, policy);
      }
    }
    if (!has_waited) wait_for_previous();
  }
};

}  // namespace tgi
