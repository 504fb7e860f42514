// What Hopper's prefill works on, and the warps that bring it. See sm90_prefill.cu.
#pragma once

#include "attention/prefill_common.cuh"
#include "common/hopper.cuh"

namespace tgi {
namespace prefill90 {

using prefill::kPageRows;

constexpr int kThreads = 384;
constexpr int kRows = 128;
constexpr int kTile = Tree<128>::kTile;
constexpr int kTilePages = kTile / kPageRows;
constexpr int kStages = 2;
constexpr int kSliceBytes = kTile * 128;  // 64 head dims of a tile, or of the rows of Q
static_assert(kTile == kRows);

// Blocks told of: that in its epilogue, that being summed, that whose tiles are under way; and one for a
// cheap remainder.
constexpr int kWorks = 4;

// A block of rows, as its consumers need it: whole queries, each with all heads of its group.
struct Work {
  bool is_last;  // there is no block any more
  int seq, kv_head;
  int rows;       // of this block
  int token;      // row of q of the first query
  int position;   // of the first query
  int len;        // keys of the sequence
  int first;      // key that some row sees
  int seen;       // keys the last row sees: one after its own position
  int tile, end;  // tiles

  // A warp finds the block of a number, heaviest first for each sequence, and writes it in shared memory.
  __device__ __forceinline__ void find(const PrefillParams& p, int block_rows, int number) {
    prefill::Block block;
    const bool found = prefill::find_block(block, p, number, block_rows);
    if (threadIdx.x % 32 == 0) {
      is_last = !found;
      if (found) {
        seq = block.seq, kv_head = block.kv_head, len = block.len;
        rows = min(block_rows, block.rows - block.first_row);
        const int query = block.first_row / p.group;
        token = block.first_token + query;
        position = block.first_position + query;
        first = p.window > 0 ? max(0, position - p.window + 1) : 0;
        tile = first / kTile;
        seen = max(0, position + (rows - 1) / p.group + 1);
        end = (seen + kTile - 1) / kTile;
      }
    }
    __syncwarp();
  }
};

// Query, counted from the block's first, and head of a row.
struct Row {
  int query, head;
  __device__ __forceinline__ Row(const PrefillParams& p, const Work& work, int row) {
    // At least 1/256 from the next integer: rounding does no harm.
    query = __float2int_rz(__fdividef(row + 0.5f, static_cast<float>(p.group)));
    head = work.kv_head * p.group + row - query * p.group;
  }
};

template <int kDim>
struct Shape {
  static constexpr int kSlices = kDim / 64;
  static constexpr int kTileBytes = kSlices * kSliceBytes;  // queries, keys or values
  static constexpr int kKeyAt = kTileBytes;                 // behind Q
  static constexpr int kValueAt = kKeyAt + kStages * kTileBytes;
  static constexpr int kChunkAt = kValueAt + kStages * kTileBytes;  // sums of chunks, then results
  static constexpr int kStatsAt = kChunkAt + kRows * kDim * 4;      // their maxima and sums of weights
  static constexpr int kWorkAt = kStatsAt + kRows * 8;
  static constexpr int kBarrierAt = kWorkAt + (kWorks * static_cast<int>(sizeof(Work)) + 7) / 8 * 8;
  static constexpr int kSharedBytes = kBarrierAt + (4 * kStages + 2 + kWorks) * 8 + 1024;  // 1024 to align
};

// Full and empty: a ring of keys, one of values, and the queries; and blocks found.
struct Barriers {
  uint32_t at;
  __device__ __forceinline__ uint32_t keys_full(int stage) const { return at + stage * 8; }
  __device__ __forceinline__ uint32_t values_full(int stage) const { return at + (kStages + stage) * 8; }
  __device__ __forceinline__ uint32_t keys_empty(int stage) const { return at + (2 * kStages + stage) * 8; }
  __device__ __forceinline__ uint32_t values_empty(int stage) const { return at + (3 * kStages + stage) * 8; }
  __device__ __forceinline__ uint32_t queries_full() const { return at + 4 * kStages * 8; }
  __device__ __forceinline__ uint32_t queries_empty() const { return at + (4 * kStages + 1) * 8; }
  __device__ __forceinline__ uint32_t work_found(int work) const { return at + (4 * kStages + 2 + work) * 8; }

  __device__ __forceinline__ void init() const {
    for (int stage = 0; stage < kStages; ++stage) {
      barrier_init(keys_full(stage), 2);  // warps that copy
      barrier_init(values_full(stage), 2);
      barrier_init(keys_empty(stage), 8);  // warps of two warpgroups
      barrier_init(values_empty(stage), 8);
    }
    barrier_init(queries_full(), 1);
    barrier_init(queries_empty(), 8);
    for (int work = 0; work < kWorks; ++work) barrier_init(work_found(work), 1);
    barrier_init_done();
  }
};

// Four warps bring the tiles of all blocks in one ring: two the keys, two the values, each half of a tile's
// boxes of 64 dims of a page's 16 rows, a lane a box. One engine instruction a box and its address take the
// longest here: one warp for all of them holds up the products. The first also finds the blocks and brings
// their queries.
template <int kDim>
__device__ __forceinline__ void load_tiles(const CUtensorMap* map, const CUtensorMap* query_map,
                                           const PrefillParams& p, int block_rows, char* shared,
                                           Barriers barriers) {
  using S = Shape<kDim>;
  constexpr int kBoxes = S::kSlices * kTilePages / 2;
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  const bool values = warp >= 2;
  const int box = warp % 2 * kBoxes + lane % kBoxes, page_of_tile = box % kTilePages;
  const int dim = box / kTilePages * 64;
  const uint32_t base = shared_address(shared);
  const uint32_t to = base + (values ? S::kValueAt : S::kKeyAt) + box / kTilePages * kSliceBytes +
                      page_of_tile * kPageRows * 128;
  const Barriers ring{barriers.at + (values ? kStages * 8 : 0)};  // whose keys are what this warp copies
  int stage = 0, number = blockIdx.x;
  uint32_t phase = 1;  // the ring is empty at first
#pragma unroll 1
  for (int round = 0;; ++round) {
    Work& work = reinterpret_cast<Work*>(shared + S::kWorkAt)[round % kWorks];
    if (warp == 0) {
      work.find(p, block_rows, number);
      if (lane == 0) {
        barrier_arrive(barriers.work_found(round % kWorks));
        if (work.is_last) prefill::leave(p);
        if (!work.is_last) number = prefill::next_number(p);
      }
    } else {
      barrier_wait(barriers.work_found(round % kWorks), round / kWorks % 2);
    }
    const bool is_last = work.is_last;
    if (is_last && warp != 0) return;
    const int* row = p.page_table + static_cast<int64_t>(work.seq) * p.max_pages;
    const int first = work.first, seen = work.seen, head = work.kv_head + (values ? p.kv_heads : 0);
    // Pages outside the span are at −1, outside the tensor: they arrive as zeros.
    const auto find_chunk = [&](int tile) {
      const int page = tile * kTilePages + page_of_tile;
      const bool used = page * kPageRows < seen && (page + 1) * kPageRows > first;
      return used ? row[page] * 2 * p.kv_heads + head : -1;
    };
    const int begin = is_last ? 0 : work.tile, end = is_last ? 0 : work.end;
    int chunk = begin < end ? find_chunk(begin) : -1;
#pragma unroll 1
    for (int tile = begin; tile < end; ++tile) {
      const int next = tile + 1 < end ? find_chunk(tile + 1) : -1;
      barrier_wait(ring.keys_empty(stage), phase);
      if (lane == 0) barrier_arrive_expecting(ring.keys_full(stage), S::kTileBytes / 2);
      __syncwarp();
      if (lane < kBoxes) copy_box(to + stage * S::kTileBytes, map, dim, 0, chunk, ring.keys_full(stage));
      if (++stage == kStages) stage = 0, phase ^= 1;
      chunk = next;
      if (warp == 0 && tile == begin) {  // the first keys have room sooner than the queries
        barrier_wait(barriers.queries_empty(), ~round & 1);
        if (lane == 0) {
          barrier_arrive_expecting(barriers.queries_full(), S::kSlices * block_rows * 128);
#pragma unroll
          for (int slice = 0; slice < S::kSlices; ++slice) {
            copy_box(base + slice * kSliceBytes, query_map, slice * 64, work.kv_head * p.group, work.token,
                     barriers.queries_full());
          }
        }
        __syncwarp();
      }
    }
    if (warp != 0) continue;
    if (begin >= end) {  // no tiles, or no block: what there is to know is in its Work
      barrier_wait(barriers.queries_empty(), ~round & 1);
      if (lane == 0) barrier_arrive(barriers.queries_full());
    }
    if (is_last) return;
    number = __shfl_sync(~0u, number, 0);
  }
}

}  // namespace prefill90
}  // namespace tgi
