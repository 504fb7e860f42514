// Product of many tokens with weights of 4 or 8 bits on Hopper: weights are the register operand of warpgroup
// products, widened while the products before them run.
//
// A warpgroup has 64 rows of weights. Chunks and ranges of columns are those of chunks.h, so bits are those of the
// kernel for few tokens. A cluster is one CTA; or two, of neighbouring rows, which share x; or one a range, whose
// totals the first adds. docs/kernels/quant_matmul.md.
//
//   producers:  | words, pairs 0 … s-1 | wait for the previous kernel | x 0 … s-1 | all of s, s+1, … as slots
//   free |
//   warpgroup:  | multiply piece p → widen piece p + 1 → wait for the chunk's products → scale | … | ranges | store |
#include <algorithm>

#include "common/dispatch.cuh"
#include "common/hopper.cuh"
#include "common/mma.cuh"
#include "common/pdl.cuh"
#include "common/tensor_map.h"
#include "common/wgmma.cuh"
#include "quant/chunks.h"
#include "quant/cuda.h"
#include "quant/layout.cuh"
#include "quant/operands.cuh"
#include "quant/products.cuh"

namespace tgi {
namespace {

// ---- device ----

constexpr int kWarpgroup = 128;
constexpr int kMaxWarpgroups = 2;
constexpr int kThreads = (kMaxWarpgroups + 1) * kWarpgroup;  // the last are the producers
// Large blocks need more registers than an even share: the producers give up theirs.
template <int kTokens>
constexpr bool kUneven = kTokens > 64;
constexpr int kRowBytes = 128;      // of a piece of x
constexpr int kSlotPieces = 2;
constexpr int kSlotSteps = 8;       // of k16
constexpr int kMaxSlots = 16;
constexpr int kHeaderBytes = 1024;  // the barriers; keeps x on the swizzle's 1024 bytes

enum class Cluster { single, shares_x, ranges };

// How one launch cuts its work: a tile is one strip a warpgroup, and a block of tokens.
struct Tiling {
  Cluster cluster;
  int ranks;                           // CTAs of a cluster
  int warpgroups, strips, row_tiles;   // strips: in all; row_tiles: of a cluster
  int token_blocks, band;              // of which `band` follow each other
  int pieces, steps;                   // of all columns: pieces, and slots full of them
  int ranges, group_steps;             // k16 steps of a group
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

// The strips and tokens of a tile of this CTA, by the tile's number. Within a band of token blocks, blocks that
// share weights follow each other, so that weights come from memory once a band, and the band's x stays in L2.
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
  int block;                      // of tokens
  int group, left;                // of the next slot's first k16 step; steps of it that are left
  const uint8_t *words, *pairs;   // of the next slot and of the strip; `pairs` of both warpgroups
  int64_t more_pairs;

  __device__ __forceinline__ void enter_tile(const Tile& tile, const Walk& walk) {
    block = tile.block;
    // Strips past the last are the last, for nothing.
    const int64_t first = min(tile.strip, t.strips - 1), second = min(tile.strip + 1, t.strips - 1);
    words = static_cast<const uint8_t*>(p.weight.words) +
            ((load == Load::more_words ? second : first) * t.pieces + walk.begin * kSlotPieces) * kPieceBytes<kBits>;
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

  // Asks for this thread's part of a slot. A piece that does not exist has words of any kind, and zeros for x.
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

// An 8 × 8 matrix of 16-bit elements, two of a row in each lane, transposed.
__device__ __forceinline__ uint32_t transposed(uint32_t two) {
  uint32_t to;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(to) : "r"(two));
  return to;
}

// Adds bias and residual to a warpgroup's products and stores them. Accumulator 4j + 2h + e is of row 16 ·
// warp + lane / 4 + 8h of the strip and of token 8j + 2 (lane % 4) + e of the block; they change places, so
// that a lane has four features of one token and a warp writes whole sectors: memory takes parts of them at a
// fifth of its speed.
template <typename T, int kTokens>
__device__ __forceinline__ void finish(const QuantMatmulParams& p, int strip, int block,
                                       const float (&d)[kTokens / 2]) {
  const int lane = threadIdx.x % 32, quad = lane % 4;
  const int row = strip * kStrip + threadIdx.x % kWarpgroup / 32 * 16;
  const int feature = row + quad * 4, features = p.weight.rows;
  float bias[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int of = row + lane / 4 + 8 * h;
    bias[h] = p.bias != nullptr && of < features ? to_float(static_cast<const T*>(p.bias)[of]) : 0.0f;
  }
#pragma unroll
  for (int j = 0; j < kTokens / 8; ++j) {
    uint32_t half[2];
#pragma unroll
    for (int h = 0; h < 2; ++h)
      half[h] = transposed(pack<T>(d[4 * j + 2 * h] + bias[h], d[4 * j + 2 * h + 1] + bias[h]));
    uint32_t y[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int from = lane / 4 * 4 + quad % 2 * 2 + i;
      const uint32_t low = __shfl_sync(~0u, half[0], from), high = __shfl_sync(~0u, half[1], from);
      y[i] = quad < 2 ? low : high;
    }
    const int token = block * kTokens + 8 * j + lane / 4;
    if (token >= p.tokens) continue;
    T* to = static_cast<T*>(p.out) + token * p.out_stride + feature;
    const T* residual = static_cast<const T*>(p.residual) + token * p.residual_stride + feature;
    if (p.is_wide && feature < features) {
      if (p.residual != nullptr) {
        const uint2 more = *reinterpret_cast<const uint2*>(residual);
        const float2 a = unpack<T>(y[0]), b = unpack<T>(y[1]), c = unpack<T>(more.x), e = unpack<T>(more.y);
        y[0] = pack<T>(a.x + c.x, a.y + c.y);
        y[1] = pack<T>(b.x + e.x, b.y + e.y);
      }
      *reinterpret_cast<uint2*>(to) = make_uint2(y[0], y[1]);
      continue;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (feature + i >= features) break;
      const float2 two = unpack<T>(y[i / 2]);
      float one = i % 2 == 0 ? two.x : two.y;
      if (p.residual != nullptr) one += to_float(residual[i]);
      to[i] = from_float<T>(one);
    }
  }
}

// A warpgroup's work. S: type of the scales. kSteps: k16 steps of a chunk.
template <typename T, typename S, int kBits, int kTokens, int kSteps>
struct Consumer {
  static constexpr int kCount = kTokens / 2;              // sums of a thread
  static constexpr int kLoads = kBits / 4;                // of 16 bytes, for a piece
  static constexpr bool kPairs = kSteps == 8;             // a chunk is two pieces
  static constexpr int kChunks = kPairs ? 1 : 4 / kSteps;  // of a piece

  const QuantMatmulParams& p;
  const Tiling& t;
  const Slots& s;
  const int warpgroup, rank;
  Exact<T, kBits> exact;
  float d[kCount], total[kCount];  // of the chunk, of the range
  uint32_t fragments[2][4][4];     // of the piece that multiplies, and of the one that is being widened
  float scale[2][kChunks][2];      // of both
  Cursor at;          // slot of the pieces that multiply
  uint32_t words, pairs;  // this lane's of the slot that is widened
  int left;           // k16 steps of the group that are left for the next chunk to widen
  int groups_left;    // after that one
  int range, border;  // that is being summed, and the first slot after it

  __device__ __forceinline__ void release() {
    if (threadIdx.x % 32 != 0) return;
    barrier_arrive(s.empty + 8 * at.slot);
    if (t.cluster == Cluster::shares_x) barrier_arrive_at(s.empty + 8 * at.slot, rank ^ 1);
  }

  __device__ __forceinline__ void wait_slot(const Cursor& next) {
    const int thread = threadIdx.x % kWarpgroup;
    words = s.words_of(next.slot, warpgroup) + thread * 16;
    pairs = s.pairs_of(next.slot, t.warpgroups, warpgroup) + (thread / 32 * 16 + thread % 32 / 4) * 4;
    barrier_wait(s.full + 8 * next.slot, next.parity);
  }

  // Widens a piece of the slot.
  template <int kTo>
  __device__ __forceinline__ void widen() {
    uint32_t word[kLoads][4];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(word[i][0]), "=r"(word[i][1]), "=r"(word[i][2]), "=r"(word[i][3])
                   : "r"(words + kTo * kPieceBytes<kBits> + i * kWarpgroup * 16));
    }
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      if (kPairs ? kTo == 0 && step == 0 : step % kSteps == 0) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          uint32_t pair;
          asm volatile("ld.shared.u32 %0, [%1];" : "=r"(pair) : "r"(pairs + 32 * h));
          exact.load(h, pair);
          scale[kTo][step / kSteps][h] = scale_of<S>(pair);
        }
        if constexpr (!kPairs) {
          left -= kSteps;
          if (left == 0 && groups_left > 0) {
            left = t.group_steps;
            --groups_left;
            pairs += kPairsBytes;
          }
        }
      }
      exact.widen(fragments[kTo][step], &word[0][0] + step * kLoads);
    }
  }

  // Begins the products of a piece's chunk; those of the second piece of a pair are added to the first's.
  template <int kOf>
  __device__ __forceinline__ void multiply(int chunk) {
    constexpr int kCount = kPairs ? 4 : kSteps;  // of its products
    uint32_t(&a)[4][4] = fragments[kOf];
    // The compiler must not define operands between the products: it would run them one by one.
#pragma unroll
    for (auto& fragment : a) {
#pragma unroll
      for (uint32_t& pair : fragment) asm volatile("" : "+r"(pair)::"memory");
    }
    const uint32_t x = s.at(at.slot) + kOf * kTokens * kRowBytes;
    products_begin();
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int step = chunk * kCount + i;
      weights_times<T>(d, a[step], swizzled_operand(x + 32 * step), (kPairs && kOf == 1) || i > 0);
    }
    products_commit();
  }

  // Ends a chunk: its sums, scaled, go to the totals.
  __device__ __forceinline__ void scale_chunk(const float (&by)[2]) {
    products_wait<0>();
    products_hold(d);
#pragma unroll
    for (int i = 0; i < kCount; ++i) total[i] = fmaf(by[i / 2 % 2], d[i], total[i]);
  }

  // Ends the chunks of a piece, the first of which multiplies.
  template <int kOf>
  __device__ __forceinline__ void end_chunks(const float (&first)[2]) {
    scale_chunk(first);
#pragma unroll
    for (int chunk = 1; chunk < kChunks; ++chunk) {
      multiply<kOf>(chunk);
      scale_chunk(scale[kOf][chunk]);
    }
  }

  // Multiplies a slot, whose first piece is wide, and widens the next piece meanwhile.
  __device__ __forceinline__ void run_slot(int step, int end) {
    multiply<0>(0);
    widen<1>();
    if constexpr (!kPairs) end_chunks<0>(scale[0][0]);
    multiply<1>(0);
    if constexpr (kPairs) products_wait<1>();
    const float(&scales)[2] = scale[kPairs ? 0 : 1][0];
    const float first[2] = {scales[0], scales[1]};
    Cursor next = at;
    next.advance(t.slots);
    if (step + 1 < end) {
      wait_slot(next);
      widen<0>();
    }
    end_chunks<1>(first);
    release();
    at = next;
    if (step + 1 == border) end_range();
  }

  // Adds what ranges before have left to the totals, and leaves the sum, unless this was the last.
  __device__ __forceinline__ void end_range() {
    const uint32_t sums = s.sums + warpgroup * kTokens * kStrip * 4 + threadIdx.x % kWarpgroup * 16;
    const bool last = range == t.ranges - 1;
#pragma unroll
    for (int i = 0; i < kCount; i += 4) {
      const uint32_t place = sums + i / 4 * kWarpgroup * 16;
      if (range > 0) add_from(i, place);
      if (last) continue;
      asm volatile("st.shared.v4.f32 [%4], {%0, %1, %2, %3};" ::"f"(total[i]), "f"(total[i + 1]),
                   "f"(total[i + 2]), "f"(total[i + 3]), "r"(place)
                   : "memory");
      total[i] = total[i + 1] = total[i + 2] = total[i + 3] = 0.0f;
    }
    ++range;
    border = range_border(t.steps, range + 1, t.ranges);
  }

  // Adds four sums of ranges before.
  __device__ __forceinline__ void add_from(int i, uint32_t place) {
    float more[4];
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(more[0]), "=f"(more[1]), "=f"(more[2]), "=f"(more[3])
                 : "r"(place));
#pragma unroll
    for (int e = 0; e < 4; ++e) total[i + e] += more[e];
  }

  // The totals of the cluster's ranges come together in its first CTA, where the slots were. Returns whether this
  // is that.
  __device__ __forceinline__ bool gather_ranges() {
    sync_cluster();
    const int warp = threadIdx.x % kWarpgroup / 32, lane = threadIdx.x % 32;
    const uint32_t told = s.told + 8 * (warpgroup * 4 + warp);
    const auto place = [&](int from, int i) {
      const int warps = ((from - 1) * t.warpgroups + warpgroup) * 4 + warp;
      return s.first + (warps * (kCount / 4) + i / 4) * 512 + lane * 16;
    };
    if (rank > 0) {
#pragma unroll
      for (int i = 0; i < kCount; i += 4) {
        const float four[4] = {total[i], total[i + 1], total[i + 2], total[i + 3]};
        send_first_rank(place(rank, i), four, told);
      }
      return false;
    }
    if (lane == 0) barrier_arrive_expecting(told, (t.ranks - 1) * kTokens * 64);
    barrier_wait(told, 0);
    for (int from = 1; from < t.ranks; ++from) {
#pragma unroll
      for (int i = 0; i < kCount; i += 4) add_from(i, place(from, i));
    }
    return true;
  }

  __device__ __forceinline__ void run_tile(const Tile& tile) {
    const Walk walk(rank, t);
    const int group = walk.begin * kSlotSteps / t.group_steps;
    left = (group + 1) * t.group_steps - walk.begin * kSlotSteps;
    groups_left = p.weight.groups - 1 - group;
    range = 0;
    border = t.cluster == Cluster::ranges || t.ranges == 1 ? -1 : range_border(t.steps, 1, t.ranges);
#pragma unroll
    for (float& sum : total) sum = 0.0f;
    wait_slot(at);
    widen<0>();
    for (int step = walk.begin; step < walk.end; ++step) run_slot(step, walk.end);
    if (t.cluster == Cluster::ranges && !gather_ranges()) return;
    if (tile.strip + warpgroup < t.strips) finish<T, kTokens>(p, tile.strip + warpgroup, tile.block, total);
  }
};

template <typename T, typename S, int kBits, int kTokens, int kSteps>
__global__ void __launch_bounds__(kThreads, 1)
    quant_matmul_kernel(const __grid_constant__ CUtensorMap x_map, const QuantMatmulParams p,
                        const Tiling t) {
  extern __shared__ __align__(1024) uint8_t shared[];
  const Slots slots = Slots::of<kTokens, kBits, kSlotGroups<kSteps>>(shared_address(shared), t);
  const int warpgroup = threadIdx.x / kWarpgroup, rank = blockIdx.x % t.ranks;
  let_next_start();
  if (threadIdx.x == t.warpgroups * kWarpgroup) {
    prefetch_map(&x_map);
    const int readers = t.warpgroups * 4 * (t.cluster == Cluster::shares_x ? 2 : 1);
    for (int slot = 0; slot < t.slots; ++slot) {
      barrier_init(slots.full + 8 * slot, 1);
      barrier_init(slots.empty + 8 * slot, readers);
    }
    for (int warp = 0; warp < t.warpgroups * 4; ++warp) barrier_init(slots.told + 8 * warp, 1);
    barrier_init_done();
  }
  __syncthreads();
  if (t.ranks > 1) meet_cluster();
  if (warpgroup == t.warpgroups) {
    if constexpr (kUneven<kTokens>) asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (threadIdx.x % 32 == 0) {
      const auto load = static_cast<Load>(threadIdx.x % kWarpgroup / 32);
      Producer<kTokens, kBits, kSteps>{.x_map = &x_map, .p = p, .t = t, .s = slots, .load = load, .rank = rank}
          .run();
    } else {
      wait_for_previous();
    }
    __syncwarp();
    if (t.cluster == Cluster::ranges) sync_cluster();
  } else {
    if constexpr (kUneven<kTokens>) asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    wait_for_previous();
    Consumer<T, S, kBits, kTokens, kSteps> worker{
        .p = p, .t = t, .s = slots, .warpgroup = warpgroup, .rank = rank};
    const int tiles = t.row_tiles * t.token_blocks, clusters = gridDim.x / t.ranks;
    for (int number = blockIdx.x / t.ranks; number < tiles; number += clusters) {
      worker.run_tile(Tile(number, rank, t));
    }
  }
  if (t.cluster == Cluster::shares_x) sync_cluster();  // nobody tells a CTA that has gone
}

// ---- host ----

constexpr int kSharedBytes = 224 * 1024;

// The block of tokens, warpgroups and kind of cluster that end first; bits do not depend on them. A piece of a tile
// takes as many cycles as its products, but no fewer than its weights take to be widened.
struct Shape {
  int tokens, warpgroups;
  Cluster cluster;
};

Shape shape_for(int tokens, int strips, int pieces, int ranges, bool whole, int sms) {
  Shape best{};
  int64_t best_cost = -1;
  for (const int block : {64, 128}) {
    const int64_t blocks = (tokens + block - 1) / block;
    for (const int warpgroups : {1, 2}) {
      const int64_t tiles = (strips + warpgroups - 1) / warpgroups * blocks;
      const int cycles = std::max(block == 64 ? 200 : 350, 2 * block * warpgroups);
      for (const bool split : {false, true}) {
        // Totals of the other ranges have to fit where slots were.
        if (split && (ranges == 1 || (ranges - 1) * warpgroups * block * kStrip * 4 > kSharedBytes - kHeaderBytes)) continue;
        const int64_t rounds = (tiles * (split ? ranges : 1) + sms - 1) / sms;
        const int64_t cost = rounds * (pieces / (split ? ranges : 1) * cycles + 1500) + (split ? 1500 : 0);
        if (best_cost >= 0 && cost > best_cost) continue;
        best_cost = cost;
        const bool shares = whole && !split && block == 128 && warpgroups == 2 && tiles > blocks;
        best = {block, warpgroups, split ? Cluster::ranges : shares ? Cluster::shares_x : Cluster::single};
      }
    }
  }
  return best;
}

template <int kTokens, int kBits, int kSteps>
Tiling tiling_for(const QuantMatmulParams& p, const Shape& shape, int* shared_bytes) {
  const QuantMatrix& w = p.weight;
  Tiling t{};
  t.cluster = shape.cluster;
  t.warpgroups = shape.warpgroups;
  t.ranges = ranges_of(w);
  t.ranks = t.cluster == Cluster::single ? 1 : t.cluster == Cluster::shares_x ? 2 : t.ranges;
  t.strips = (w.rows + kStrip - 1) / kStrip;
  const int rows = t.warpgroups * (t.cluster == Cluster::shares_x ? 2 : 1);
  t.row_tiles = (t.strips + rows - 1) / rows;
  t.token_blocks = (p.tokens + kTokens - 1) / kTokens;
  t.band = 2048 / kTokens;
  t.pieces = (w.columns + kPiece - 1) / kPiece;
  t.steps = (t.pieces + kSlotPieces - 1) / kSlotPieces;
  t.group_steps = w.group_size / 16;
  t.whole = w.columns % kPiece == 0;
  const bool leaves = t.cluster != Cluster::ranges && t.ranges > 1;
  const int sums = leaves ? t.warpgroups * kTokens * kStrip * 4 : 0;
  const int slot_bytes = Slots::of<kTokens, kBits, kSlotGroups<kSteps>>(0, t).bytes;
  t.slots = std::min(kMaxSlots, (kSharedBytes - kHeaderBytes - sums) / slot_bytes);
  const int totals = t.cluster == Cluster::ranges ? (t.ranges - 1) * t.warpgroups * kTokens * kStrip * 4 : 0;
  *shared_bytes = kHeaderBytes + std::max(t.slots * slot_bytes + sums, totals);
  return t;
}

template <typename T, typename S, int kBits, int kTokens, int kSteps>
cudaError_t launch_matmul(const QuantMatmulParams& p, const Shape& shape, int sms, cudaStream_t stream) {
  int shared_bytes = 0;
  const Tiling t = tiling_for<kTokens, kBits, kSteps>(p, shape, &shared_bytes);
  CUtensorMap x_map;
  const cuuint64_t sizes[3] = {static_cast<cuuint64_t>(t.whole ? kPiece : p.weight.columns),
                               static_cast<cuuint64_t>(p.tokens),
                               static_cast<cuuint64_t>(t.whole ? t.pieces : 1)};
  const cuuint64_t strides[2] = {static_cast<cuuint64_t>(p.x_stride) * 2, kRowBytes};
  const bool pairs = t.whole && t.cluster != Cluster::shares_x;
  const cuuint32_t box[3] = {kPiece, kTokens, pairs ? kSlotPieces : 1u};
  if (!encode_swizzled_map(&x_map, __is_same(T, __half), p.x, sizes, strides, box))
    return cudaErrorInvalidValue;
  const auto kernel = quant_matmul_kernel<T, S, kBits, kTokens, kSteps>;
  if (const cudaError_t error =
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes)) {
    return error;
  }
  const int tiles = t.row_tiles * t.token_blocks;
  const int clusters = t.cluster == Cluster::ranges ? tiles : std::min(tiles, sms / t.ranks);
  return launch_clusters(kernel, dim3(static_cast<unsigned>(clusters * t.ranks)), t.ranks,
                         (t.warpgroups + 1) * kWarpgroup, shared_bytes, stream, x_map, p, t);
}

}  // namespace

cudaError_t quant_matmul(const QuantMatmulParams& p, DType dtype, cudaStream_t stream) {
  if (p.tokens == 0 || p.weight.rows == 0) return cudaSuccess;
  int device = 0, sms = 0;
  if (const cudaError_t error = cudaGetDevice(&device)) return error;
  if (const cudaError_t error = cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device))
    return error;
  if (p.tokens <= 16) return quant_matmul_few(p, dtype, sms, stream);
  const Shape shape = shape_for(p.tokens, (p.weight.rows + kStrip - 1) / kStrip,
                                (p.weight.columns + kPiece - 1) / kPiece, ranges_of(p.weight),
                                p.weight.columns % kPiece == 0, sms);
  return by_operand_and_scale(dtype, p.weight.scale_dtype, [&]<typename T, typename S>() {
    return by_chunk(p.weight, [&]<int kBits, int kSteps>() {
      return shape.tokens == 64 ? launch_matmul<T, S, kBits, 64, kSteps>(p, shape, sms, stream)
                                : launch_matmul<T, S, kBits, 128, kSteps>(p, shape, sms, stream);
    });
  });
}

}  // namespace tgi
