// Prefill for Hopper: the tensor copy engine loads, warpgroup products multiply, and softmax runs under them.
//
// Shah et al. 2024, FlashAttention-3, arXiv:2407.08608. Blocks of rows, and the rules for which keys count,
// are those of prefill.cuh; here a block is 128 rows, a tile 128 keys, and a CTA, of which there is one an
// SM, three warpgroups. One brings keys and values into a ring of two stages, and the queries of the next
// block. Two have 64 rows each and take turns at the tensor cores: while one multiplies, the other makes
// weights of its scores; and each has the next tile's scores under way while it sums this one's values.
#include "attention/prefill.cuh"
#include "common/hopper.cuh"
#include "common/tensor_map.h"
#include "common/wgmma.cuh"

namespace tgi {
namespace prefill90 {

constexpr int kThreads = 384;
constexpr int kRows = 128;
constexpr int kTile = 128;  // keys
constexpr int kPageRows = 16;
constexpr int kTilePages = kTile / kPageRows;
constexpr int kStages = 2;
constexpr int kSliceBytes = kTile * 128;  // 64 head dims of a tile, or of the rows of Q

constexpr int kQueryLoaders = 96;  // three warps
// Blocks told of: that in its epilogue, that being summed, that whose tiles are under way; and one for a
// cheap remainder.
constexpr int kWorks = 4;

// A block of rows, as its consumers need it. Row r is of query (head + r) / group, counted from the first.
struct Work {
  bool is_last;  // there is no block any more
  int seq, kv_head;
  int rows;       // of this block
  int token;      // row of q of the first query
  int position;   // of the first query
  int head;       // of the group, of the first row
  int len;        // keys of the sequence
  int first;      // key that some row sees
  int seen;       // keys the last row sees: one after its own position
  int tile, end;  // tiles

  // A warp finds the block of a number, heaviest first for each sequence, and writes it in shared memory.
  __device__ __forceinline__ void find(const PrefillParams& p, int number) {
    prefill::Block block;
    const bool found = prefill::find_block<kRows>(block, p, number);
    if (threadIdx.x % 32 == 0) {
      is_last = !found;
      if (found) {
        seq = block.seq, kv_head = block.kv_head, len = block.len;
        rows = min(kRows, block.rows - block.first_row);
        const int query = block.first_row / p.group;
        token = block.first_token + query;
        head = block.first_row - query * p.group;
        position = block.first_position + query;
        first = p.window > 0 ? max(0, position - p.window + 1) : 0;
        tile = first / kTile;
        seen = max(0, position + (head + rows - 1) / p.group + 1);
        end = (seen + kTile - 1) / kTile;
      }
    }
    __syncwarp();
  }
};

// Query and head of a row.
struct Row {
  int query, head;
  __device__ __forceinline__ Row(const PrefillParams& p, const Work& work, int row) {
    const int at = work.head + row;  // less than 2^9: the quotient is exact
    query = __float2int_rz((at + 0.5f) * __frcp_rn(static_cast<float>(p.group)));
    head = work.kv_head * p.group + at - query * p.group;
  }
};

template <int kDim>
struct Shape {
  static constexpr int kSlices = kDim / 64;
  static constexpr int kTileBytes = kSlices * kSliceBytes;  // queries, keys, values or results
  static constexpr int kKeyAt = kTileBytes;                 // behind Q
  static constexpr int kValueAt = kKeyAt + kStages * kTileBytes;
  static constexpr int kOutAt = kValueAt + kStages * kTileBytes;
  static constexpr int kWorkAt = kOutAt + kTileBytes;
  static constexpr int kBarrierAt = kWorkAt + (kWorks * static_cast<int>(sizeof(Work)) + 7) / 8 * 8;
  static constexpr int kSharedBytes = kBarrierAt + (4 * kStages + 3) * 8 + 1024;  // 1024 to align
};

// Full and empty: a ring of keys, one of values, and the queries.
struct Barriers {
  uint32_t at;
  __device__ __forceinline__ uint32_t queries_full() const { return at + 4 * kStages * 8; }
  __device__ __forceinline__ uint32_t queries_empty() const { return at + 4 * kStages * 8 + 8; }
  __device__ __forceinline__ uint32_t work_found() const { return at + 4 * kStages * 8 + 16; }
  __device__ __forceinline__ uint32_t keys_full(int stage) const { return at + stage * 8; }
  __device__ __forceinline__ uint32_t values_full(int stage) const { return at + (kStages + stage) * 8; }
  __device__ __forceinline__ uint32_t keys_empty(int stage) const { return at + (2 * kStages + stage) * 8; }
  __device__ __forceinline__ uint32_t values_empty(int stage) const { return at + (3 * kStages + stage) * 8; }
};

// ---- load ----

// Blocks are taken as CTAs come free: the first by their index, the others off a counter, which the last CTA
// to find none sets back to zero. Without a counter they are dealt out, every other round backwards, so that
// none gets the heaviest of each: as fast for one sequence, a fifth slower for many.
__device__ __forceinline__ int next_number(const PrefillParams& p, int round) {
  if (p.counters != nullptr) return gridDim.x + atomicAdd(p.counters, 1);
  return (round + 1) * gridDim.x + (round % 2 ? blockIdx.x : gridDim.x - 1 - blockIdx.x);
}

__device__ __forceinline__ void leave(const PrefillParams& p) {
  if (p.counters == nullptr || atomicAdd(p.counters + 1, 1) != static_cast<int>(gridDim.x) - 1) return;
  p.counters[0] = 0;
  p.counters[1] = 0;
}

// One warp: finds the blocks, and brings the keys and values of all in one ring of tiles. Where a group is a
// power of two, a block's rows are a box of q, [tokens, heads, head_dim], and it brings them, too.
template <int kDim>
__device__ __forceinline__ void load_tiles(const CUtensorMap* map, const CUtensorMap* query_map,
                                           const PrefillParams& p, char* shared, Barriers barriers,
                                           bool queries_in_boxes) {
  using S = Shape<kDim>;
  const uint32_t base = shared_address(shared);
  const int lane = threadIdx.x % 32, page_of_tile = lane % kTilePages, slice = lane / kTilePages;
  int stage = 0, number = blockIdx.x;
  uint32_t phase = 1;  // the ring is empty at first
#pragma unroll 1
  for (int round = 0;; ++round) {
    Work& work = reinterpret_cast<Work*>(shared + S::kWorkAt)[round % kWorks];
    work.find(p, number);
    if (lane == 0) {
      barrier_arrive(barriers.work_found());
      if (work.is_last) leave(p);
      if (!work.is_last) number = next_number(p, round);
    }
    const int* row = p.page_table + static_cast<int64_t>(work.seq) * p.max_pages;
    // Pages outside the span are at −1, outside the tensor: they arrive as zeros.
    const auto find_page = [&](int tile) {
      const int page = tile * kTilePages + page_of_tile;
      return page * kPageRows < work.seen && (page + 1) * kPageRows > work.first ? row[page] : -1;
    };
    const int tiles = work.is_last ? 0 : work.end - work.tile;
    int page = tiles > 0 ? find_page(work.tile) : -1;
#pragma unroll 1
    for (int i = 0; i < max(tiles, 1); ++i) {
      const int next = i + 1 < tiles ? find_page(work.tile + i + 1) : -1;
      const uint32_t to = stage * S::kTileBytes + slice * kSliceBytes + page_of_tile * kPageRows * 128;
      const int chunk = page < 0 ? -1 : page * 2 * p.kv_heads + work.kv_head;
      if (tiles > 0) {
        barrier_wait(barriers.keys_empty(stage), phase);
        if (lane == 0) barrier_arrive_expecting(barriers.keys_full(stage), S::kTileBytes);
        __syncwarp();
        if (slice < S::kSlices)
          copy_box(base + S::kKeyAt + to, map, slice * 64, 0, chunk, barriers.keys_full(stage));
      }
      if (i == 0) {  // the first keys have room sooner than the queries
        barrier_wait(barriers.queries_empty(), ~round & 1);
        if (queries_in_boxes && lane == 0) {
          barrier_arrive_expecting(barriers.queries_full(), tiles > 0 ? S::kTileBytes : 0);
          for (int of_dims = 0; of_dims < (tiles > 0 ? S::kSlices : 0); ++of_dims) {
            copy_box(base + of_dims * kSliceBytes, query_map, of_dims * 64, work.kv_head * p.group,
                     work.token, barriers.queries_full());
          }
        }
        __syncwarp();
      }
      if (tiles > 0) {
        barrier_wait(barriers.values_empty(stage), phase);
        if (lane == 0) barrier_arrive_expecting(barriers.values_full(stage), S::kTileBytes);
        __syncwarp();
        if (slice < S::kSlices) {
          copy_box(base + S::kValueAt + to, map, slice * 64, 0, chunk < 0 ? -1 : chunk + p.kv_heads,
                   barriers.values_full(stage));
        }
        if (++stage == kStages) stage = 0, phase ^= 1;
      }
      page = next;
    }
    if (work.is_last) return;
    number = __shfl_sync(~0u, number, 0);
  }
}

// Three warps: the queries of a block whose rows are no box, swizzled as the copy engine would.
template <int kDim>
__device__ __forceinline__ void load_queries(const PrefillParams& p, char* shared, Barriers barriers) {
  using S = Shape<kDim>;
  constexpr int kChunks = kDim / 8, kStepRows = kQueryLoaders / kChunks;
  const int thread = threadIdx.x - 32, chunk = thread % kChunks;
#pragma unroll 1
  for (int round = 0;; ++round) {
    barrier_wait(barriers.work_found(), round & 1);
    const Work work = reinterpret_cast<const Work*>(shared + S::kWorkAt)[round % kWorks];
    barrier_wait(barriers.queries_empty(), ~round & 1);
    if (!work.is_last) {
#pragma unroll 1
      for (int i = thread / kChunks; i < kRows; i += kStepRows) {
        const Row row(p, work, i);
        const bool valid = i < work.rows && chunk * 8 < p.head_dim;
        const uint16_t* from = static_cast<const uint16_t*>(p.q);
        if (valid)
          from +=
              static_cast<int64_t>(work.token + row.query) * p.q_stride + row.head * p.head_dim + chunk * 8;
        copy_async(shared_address(shared) + chunk / 8 * kSliceBytes + swizzled<128>(i, chunk % 8), from,
                   valid);
      }
      commit_copies();
      wait_copies<0>();
      asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    }
    barrier_arrive(barriers.queries_full());
    if (work.is_last) return;
  }
}

// ---- compute: a warpgroup ----

__device__ __forceinline__ void sync_warpgroup(int id) {
  asm volatile("bar.sync %0, 128;" ::"r"(id) : "memory");
}
// The turns of two warpgroups at the tensor cores: one waits for its turn, the other passes it on.
__device__ __forceinline__ void wait_turn(int id) { asm volatile("bar.sync %0, 256;" ::"r"(id) : "memory"); }
__device__ __forceinline__ void pass_turn(int id) {
  asm volatile("bar.arrive %0, 256;" ::"r"(id) : "memory");
}

// Rows of a page beyond the sequence's last key hold anything, NaN perhaps: their weights are 0, and so must
// they be.
template <int kDim>
__device__ __forceinline__ void clear_unused(char* values, int tile, int len) {
  const int first = len - tile * kTile, rows = -len & (kPageRows - 1);
  if (first <= 0 || first >= kTile) return;
  for (int i = threadIdx.x % 128; i < rows * (kDim / 8); i += 128) {
    const int row = first + i / (kDim / 8), chunk = i % (kDim / 8);
    *reinterpret_cast<uint4*>(values + chunk / 8 * kSliceBytes + row * 128 + chunk % 8 * 16) =
        make_uint4(0, 0, 0, 0);
  }
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// What a thread's two rows, g and g + 8 of its warp's 16, need to know.
struct Rows {
  float gain;
  float slope[2];
  int position[2];
  float maximum[2], sum[2];
};

// Turns a tile's products into weights; returns by what the values so far must be multiplied.
__device__ __forceinline__ float2 weigh(float (&s)[64], Rows& rows, const PrefillParams& p, int base,
                                        bool all_seen, bool scored) {
  const int t = threadIdx.x % 4;
  if (!all_seen && !scored && p.window <= 0) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int last = rows.position[i] - base - 2 * t;
#pragma unroll
      for (int n = 0; n < 16; ++n) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          if (n * 8 + j > last) s[4 * n + 2 * i + j] = negative_infinity();
        }
      }
    }
  } else if (scored || !all_seen) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int n = 0; n < 16; ++n) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          float& score = s[4 * n + 2 * i + j];
          const int distance = base + n * 8 + 2 * t + j - rows.position[i];
          if (scored) score = score_of(score, rows.gain, p.cap) + rows.slope[i] * distance;
          if (distance > 0 || (p.window > 0 && distance <= -p.window)) score = negative_infinity();
        }
      }
    }
  }
  const float by = scored ? 1.f : rows.gain;
  float rescale[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float top = fmaxf(s[2 * i], s[2 * i + 1]);
#pragma unroll
    for (int n = 1; n < 16; ++n) top = fmaxf(top, fmaxf(s[4 * n + 2 * i], s[4 * n + 2 * i + 1]));
    top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
    top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
    const float both = fmaxf(rows.maximum[i], top * by);
    const float reference = finite_max(both);
    rescale[i] = exp2_fast(rows.maximum[i] - reference);
    rows.maximum[i] = both;
    float sum = 0.f;
#pragma unroll
    for (int n = 0; n < 16; ++n) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        s[4 * n + 2 * i + j] = exp2_fast(__fmaf_rn(s[4 * n + 2 * i + j], by, -reference));
        sum += s[4 * n + 2 * i + j];
      }
    }
    rows.sum[i] = __fmaf_rn(rows.sum[i], rescale[i], sum);
  }
  return make_float2(rescale[0], rescale[1]);
}

template <typename T>
__device__ __forceinline__ void round_weights(uint32_t (&weights)[8][4], const float (&s)[64]) {
#pragma unroll
  for (int k = 0; k < 8; ++k) {
#pragma unroll
    for (int i = 0; i < 4; ++i) weights[k][i] = pack<T>(s[8 * k + 2 * i], s[8 * k + 2 * i + 1]);
  }
}

template <typename T, int kDim>
__device__ __forceinline__ void multiply_keys(float (&s)[64], uint32_t queries, uint32_t keys) {
#pragma unroll
  for (int k = 0; k < kDim / 16; ++k) {
    const uint32_t at = k / 4 * kSliceBytes + k % 4 * 32;
    warpgroup_mma<T>(s, swizzled_operand(queries + at), swizzled_operand(keys + at), k > 0);
  }
}

template <typename T, int kDim>
__device__ __forceinline__ void multiply_values(float (&out)[kDim / 2], const uint32_t (&weights)[8][4],
                                                uint32_t values) {
#pragma unroll
  for (int k = 0; k < 8; ++k)
    warpgroup_mma_across<T>(out, weights[k], swizzled_operand(values + k * 16 * 128, kSliceBytes));
}

// The state of a consumer's ring: the stage of the tile to come, and its phase.
struct Ring {
  int stage;
  uint32_t phase;
  __device__ __forceinline__ void advance() {
    if (++stage == kStages) stage = 0, phase ^= 1;
  }
};

__device__ __forceinline__ void release(uint32_t barrier) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) barrier_arrive(barrier);
}

// The weighted values of this warpgroup's 64 rows of a block, not yet divided by the sums.
template <typename T, int kDim>
__device__ __forceinline__ void attend(float (&out)[kDim / 2], Rows& rows, const PrefillParams& p,
                                       const Work& work, char* shared, Barriers barriers, Ring& ring,
                                       int warpgroup) {
  using S = Shape<kDim>;
  const int group_row = warpgroup * 64, my_turn = 1 + warpgroup, other_turn = 2 - warpgroup;
  const uint32_t base = shared_address(shared), queries = base + group_row * 128;
  const int first_query = work.position + Row(p, work, group_row).query;
  const int first = work.tile, end = work.end, seen = work.seen;
  const bool scored = p.cap != 0.f || p.alibi_slopes != nullptr;
  const auto all_seen = [&](int tile) {
    return (tile + 1) * kTile <= first_query + 1 && (p.window <= 0 || tile * kTile >= seen - p.window);
  };
  float s[64];
  uint32_t weights[8][4];
  barrier_wait(barriers.keys_full(ring.stage), ring.phase);
  wait_turn(my_turn);
  products_hold(s);
  products_begin();
  multiply_keys<T, kDim>(s, queries, base + S::kKeyAt + ring.stage * S::kTileBytes);
  products_commit();
  pass_turn(other_turn);
  products_wait<0>();
  products_hold(s);
  release(barriers.keys_empty(ring.stage));
  if (first + 1 == end) release(barriers.queries_empty());
  weigh(s, rows, p, first * kTile, all_seen(first), scored);
  round_weights<T>(weights, s);

#pragma unroll 1
  for (int tile = first + 1; tile < end; ++tile) {
    Ring next = ring;
    next.advance();
    barrier_wait(barriers.keys_full(next.stage), next.phase);
    wait_turn(my_turn);
    products_hold(s);
    products_begin();
    multiply_keys<T, kDim>(s, queries, base + S::kKeyAt + next.stage * S::kTileBytes);
    products_commit();
    barrier_wait(barriers.values_full(ring.stage), ring.phase);
    multiply_values<T, kDim>(out, weights, base + S::kValueAt + ring.stage * S::kTileBytes);
    products_commit();
    pass_turn(other_turn);

    products_wait<1>();
    products_hold(s);
    release(barriers.keys_empty(next.stage));
    if (tile + 1 == end) release(barriers.queries_empty());
    const float2 rescale = weigh(s, rows, p, tile * kTile, all_seen(tile), scored);
    products_wait<0>();
    products_hold(out);
    release(barriers.values_empty(ring.stage));
    // Later tiles seldom raise a maximum; a product by 1 left out changes nothing.
    if (__any_sync(~0u, rescale.x != 1.f || rescale.y != 1.f)) {
#pragma unroll
      for (int i = 0; i < kDim / 2; ++i) out[i] *= i % 4 < 2 ? rescale.x : rescale.y;
    }
    round_weights<T>(weights, s);
    ring = next;
  }

  barrier_wait(barriers.values_full(ring.stage), ring.phase);
  clear_unused<kDim>(shared + S::kValueAt + ring.stage * S::kTileBytes, end - 1, work.len);
  sync_warpgroup(3 + warpgroup);
  products_hold(out);
  products_begin();
  multiply_values<T, kDim>(out, weights, base + S::kValueAt + ring.stage * S::kTileBytes);
  products_commit();
  products_wait<0>();
  products_hold(out);
  release(barriers.values_empty(ring.stage));
  ring.advance();
}

template <typename T, int kDim>
__device__ __forceinline__ void consume_blocks(const PrefillParams& p, char* shared, Barriers barriers,
                                               int warpgroup) {
  using S = Shape<kDim>;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int warp_row = warpgroup * 64 + threadIdx.x / 32 % 4 * 16;
  char* staged = shared + S::kOutAt;
  Ring ring{0, 0};
  if (warpgroup == 1) pass_turn(1);
#pragma unroll 1
  for (int round = 0;; ++round) {
    barrier_wait(barriers.queries_full(), round % 2);
    const Work& work = reinterpret_cast<const Work*>(shared + S::kWorkAt)[round % kWorks];
    if (work.is_last) break;
    Rows rows;
    rows.gain = p.gain;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const Row row(p, work, warp_row + g + 8 * i);
      rows.position[i] = work.position + row.query;
      rows.slope[i] = p.alibi_slopes ? p.alibi_slopes[row.head] * kLog2e : 0.f;
      rows.maximum[i] = negative_infinity(), rows.sum[i] = 0.f;
    }
    float out[kDim / 2] = {};
    if (work.tile < work.end) {
      attend<T, kDim>(out, rows, p, work, shared, barriers, ring, warpgroup);
    } else {
      release(barriers.queries_empty());
    }

    // A warp's rows leave through shared memory, as 16 bytes a lane.
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float total = rows.sum[i] + __shfl_xor_sync(~0u, rows.sum[i], 1);
      total += __shfl_xor_sync(~0u, total, 2);
      const int row = warp_row + g + 8 * i;
      const float sink = p.sinks ? p.sinks[Row(p, work, row).head] * kLog2e : negative_infinity();
      const float scale = normalizer(rows.maximum[i], total, sink) * p.v_scale;
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n) {
        *reinterpret_cast<uint32_t*>(staged + n / 8 * kSliceBytes + swizzled<128>(row, n % 8) + 4 * t) =
            pack<T>(out[4 * n + 2 * i] * scale, out[4 * n + 2 * i + 1] * scale);
      }
    }
    __syncwarp();
    constexpr int kChunks = kDim / 8;
#pragma unroll 2
    for (int i = lane; i < 16 * kChunks; i += 32) {
      const int row = warp_row + i / kChunks, chunk = i % kChunks;
      if (row >= work.rows || chunk * 8 >= p.head_dim) continue;
      const Row at(p, work, row);
      uint16_t* to = static_cast<uint16_t*>(p.out) +
                     static_cast<int64_t>(work.token + at.query) * p.out_stride + at.head * p.head_dim +
                     chunk * 8;
      *reinterpret_cast<uint4*>(to) =
          *reinterpret_cast<const uint4*>(staged + chunk / 8 * kSliceBytes + swizzled<128>(row, chunk % 8));
    }
    __syncwarp();
  }
  if (warpgroup == 0) wait_turn(1);  // the last that was passed
}

// ---- kernel ----

template <typename T, int kDim>
__global__ void __launch_bounds__(kThreads, 1)
    kernel(const __grid_constant__ CUtensorMap map, const __grid_constant__ CUtensorMap query_map,
           const __grid_constant__ PrefillParams p, bool queries_in_boxes) {
  using S = Shape<kDim>;
  extern __shared__ char unaligned[];
  char* shared = unaligned + (-shared_address(unaligned) & 1023);
  const Barriers barriers{shared_address(shared) + S::kBarrierAt};
  if (threadIdx.x == 0) {
    prefetch_map(&map);
    for (int stage = 0; stage < kStages; ++stage) {
      barrier_init(barriers.keys_full(stage), 1);
      barrier_init(barriers.values_full(stage), 1);
      barrier_init(barriers.keys_empty(stage), 8);  // warps of two warpgroups
      barrier_init(barriers.values_empty(stage), 8);
    }
    barrier_init(barriers.queries_full(), queries_in_boxes ? 1 : kQueryLoaders);
    barrier_init(barriers.queries_empty(), 8);
    barrier_init(barriers.work_found(), 1);
    barrier_init_done();
  }
  let_next_start();
  wait_for_previous();
  __syncthreads();
  if (threadIdx.x < 128) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (threadIdx.x < 32) {
      load_tiles<kDim>(&map, &query_map, p, shared, barriers, queries_in_boxes);
    } else if (!queries_in_boxes) {
      load_queries<kDim>(p, shared, barriers);
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    consume_blocks<T, kDim>(p, shared, barriers, threadIdx.x / 128 - 1);
  }
}

// ---- host ----

template <typename T, int kDim>
cudaError_t launch_shape(const PrefillParams& p, cudaStream_t stream) {
  using S = Shape<kDim>;
  // [pages · 2 · kv_heads][16][head_dim]; a box is 64 dims of a page's 16 rows.
  const cuuint64_t sizes[3] = {static_cast<cuuint64_t>(p.head_dim), kPageRows,
                               static_cast<cuuint64_t>(p.pages) * 2 * p.kv_heads};
  const cuuint64_t strides[2] = {static_cast<cuuint64_t>(p.head_dim) * 2,
                                 static_cast<cuuint64_t>(p.head_dim) * 2 * kPageRows};
  const cuuint32_t box[3] = {64, kPageRows, 1};
  CUtensorMap map, query_map;
  if (!encode_swizzled_map(&map, __is_same(T, __half), p.kv_pages, sizes, strides, box))
    return cudaErrorInvalidValue;
  // [tokens][heads][head_dim]; a box is 64 dims of the rows of a block.
  const bool in_boxes = p.group <= kRows && (p.group & (p.group - 1)) == 0;
  const cuuint64_t query_sizes[3] = {static_cast<cuuint64_t>(p.head_dim), static_cast<cuuint64_t>(p.heads),
                                     static_cast<cuuint64_t>(p.tokens)};
  const cuuint64_t query_strides[2] = {static_cast<cuuint64_t>(p.head_dim) * 2,
                                       static_cast<cuuint64_t>(p.q_stride) * 2};
  const cuuint32_t rows = in_boxes ? p.group : 1, query_box[3] = {64, rows, kRows / rows};
  if (!encode_swizzled_map(&query_map, __is_same(T, __half), p.q, query_sizes, query_strides, query_box))
    return cudaErrorInvalidValue;
  if (const cudaError_t error =
          cudaFuncSetAttribute(kernel<T, kDim>, cudaFuncAttributeMaxDynamicSharedMemorySize, S::kSharedBytes))
    return error;
  // Every sequence may end in a block that is not full.
  const int64_t blocks = (p.tokens * p.group / kRows + p.seqs) * p.kv_heads;
  int device = 0, sms = 0;
  if (const cudaError_t error = cudaGetDevice(&device)) return error;
  if (const cudaError_t error = cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device))
    return error;
  const int64_t grid = blocks < sms ? blocks : sms;
  return launch(kernel<T, kDim>, dim3(static_cast<unsigned>(grid)), kThreads, S::kSharedBytes, stream, map,
                query_map, p, in_boxes);
}

}  // namespace prefill90

bool attention_prefill_sm90_takes(const PrefillParams& p, CacheType type) {
  return type != CacheType::e4m3 && p.head_dim <= 128;
}

cudaError_t attention_prefill_sm90(const PrefillParams& p, CacheType type, cudaStream_t stream) {
  if (p.seqs == 0 || p.tokens == 0) return cudaSuccess;
  if (type == CacheType::f16) {
    if (p.head_dim <= 64) return prefill90::launch_shape<__half, 64>(p, stream);
    return prefill90::launch_shape<__half, 128>(p, stream);
  }
  if (p.head_dim <= 64) return prefill90::launch_shape<__nv_bfloat16, 64>(p, stream);
  return prefill90::launch_shape<__nv_bfloat16, 128>(p, stream);
}

}  // namespace tgi
