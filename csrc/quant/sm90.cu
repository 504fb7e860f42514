// Product of many tokens with weights of 4 or 8 bits on Hopper: weights are the register operand of warpgroup
// products, widened while the products before them run.
//
// A warpgroup has 64 rows of weights. Chunks and ranges of columns are those of chunks.h, so bits are those
// of the kernel for few tokens. A cluster is one CTA; or two, of neighbouring rows, which share x; or one a
// range, whose totals the first adds. docs/kernels/quant_matmul.md.
//
//   producers:  | words, pairs 0 … s-1 | wait for the previous kernel | x 0 … s-1 | all of s, s+1, … as slots
//   free |
//   warpgroup:  | multiply 128 columns while the other widens | wait for the products → scale → widen the
//   next | … | ranges | store |
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
#include "quant/sm90_load.cuh"
#include "quant/sm90_store.cuh"

namespace tgi {
namespace {

// ---- device ----

// A warpgroup's work. S: type of the scales. kSteps: k16 steps of a chunk.
template <typename T, typename S, int kBits, int kTokens, int kSteps>
struct Consumer {
  static constexpr int kCount = kTokens / 2;               // sums of a thread
  static constexpr int kLoads = kBits / 4;                 // of 16 bytes, for a piece
  static constexpr bool kPairs = kSteps == 8;              // a chunk is two pieces
  static constexpr int kChunks = kPairs ? 1 : 4 / kSteps;  // of a piece

  const QuantMatmulParams& p;
  const Tiling& t;
  const Slots& s;
  const int warpgroup, rank;
  Exact<T, kBits> exact;
  float d[kCount], total[kCount];  // of the chunk, of the range
  uint32_t fragments[2][4][4];     // of both pieces of a slot
  float scale[2][kChunks][2];
  Cursor at;              // slot of the next pieces to multiply
  uint32_t words, pairs;  // this lane's of the slot that is widened
  int left;               // k16 steps of the group that are left for the next chunk to widen
  int groups_left;        // after that one
  int range, border;      // that is being summed, and the first slot after it

  __device__ __forceinline__ void release(int slot) const {
    if (threadIdx.x % 32 != 0) return;
    barrier_arrive(s.empty + 8 * slot);
    if (t.cluster == Cluster::shares_x) barrier_arrive_at(s.empty + 8 * slot, rank ^ 1);
  }

  __device__ __forceinline__ void wait_slot() {
    const int thread = threadIdx.x % kWarpgroup;
    words = s.words_of(at.slot, warpgroup) + thread * 16;
    pairs = s.pairs_of(at.slot, t.warpgroups, warpgroup) + (thread / 32 * 16 + thread % 32 / 4) * 4;
    barrier_wait(s.full + 8 * at.slot, at.parity);
  }

  struct Words {
    uint32_t of[kSlotPieces][kLoads][4];
  };

  __device__ __forceinline__ Words load_words() const {
    Words word;
#pragma unroll
    for (int piece = 0; piece < kSlotPieces; ++piece) {
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        uint32_t (&to)[4] = word.of[piece][i];
        asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                     : "r"(words + piece * kPieceBytes<kBits> + i * kWarpgroup * 16));
      }
    }
    return word;
  }

  // Widens a piece of the slot.
  template <int kTo>
  __device__ __forceinline__ void widen(const Words& word) {
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
      exact.widen(fragments[kTo][step], &word.of[kTo][0][0] + step * kLoads);
    }
  }

  // Begins the products of a piece's chunk; those of the second piece of a pair are added to the first's.
  template <int kOf>
  __device__ __forceinline__ void multiply(int chunk, int slot) {
    constexpr int kCount = kPairs ? 4 : kSteps;  // of its products
    uint32_t (&a)[4][4] = fragments[kOf];
    // The compiler must not define operands between the products: it would run them one by one.
#pragma unroll
    for (auto& fragment : a) {
#pragma unroll
      for (uint32_t& pair : fragment) asm volatile("" : "+r"(pair)::"memory");
    }
    const uint32_t x = s.at(slot) + kOf * kTokens * kRowBytes;
    products_begin();
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int step = chunk * kCount + i;
      weights_times<T>(d, a[step], swizzled_operand(x + 32 * step), (kPairs && kOf == 1) || i > 0);
    }
    products_commit();
  }

  // Warpgroups multiply in turns: side by side they would widen at the same time, too, and the tensor cores
  // wait.
  __device__ __forceinline__ void take_turn() const {
    if (t.warpgroups == 2) asm volatile("bar.sync %0, 256;" ::"r"(1 + warpgroup) : "memory");
  }
  __device__ __forceinline__ void pass_turn() const {
    if (t.warpgroups == 2) asm volatile("bar.arrive %0, 256;" ::"r"(2 - warpgroup) : "memory");
  }

  // Ends a chunk: its sums, scaled, go to the totals.
  __device__ __forceinline__ void scale_chunk(const float (&by)[2]) {
    products_wait<0>();
    products_hold(d);
#pragma unroll
    for (int i = 0; i < kCount; ++i) total[i] = fmaf(by[i / 2 % 2], d[i], total[i]);
  }

  // Multiplies a slot, which is wide, and widens the next.
  __device__ __forceinline__ void run_slot(int step, int end) {
    Words word;
    const Cursor before = at;
    const auto load_next = [&] {
      at.advance(t.slots);
      if (step + 1 < end) {
        wait_slot();
        word = load_words();
      }
    };
    if constexpr (kPairs) {
      take_turn();
      multiply<0>(0, before.slot);
      multiply<1>(0, before.slot);
      pass_turn();
      load_next();
      scale_chunk(scale[0][0]);
    } else {
#pragma unroll
      for (int chunk = 0; chunk < kSlotPieces * kChunks; ++chunk) {
        take_turn();
        if (chunk < kChunks) {
          multiply<0>(chunk, before.slot);
        } else {
          multiply<1>(chunk - kChunks, before.slot);
        }
        pass_turn();
        if (chunk == kSlotPieces * kChunks - 1) load_next();
        scale_chunk(scale[chunk / kChunks][chunk % kChunks]);
      }
    }
    release(before.slot);
    if (step + 1 < end) {
      widen<0>(word);
      widen<1>(word);
    }
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

  // The totals of the cluster's ranges come together in its first CTA, where the slots were. Returns whether
  // this is that.
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
    wait_slot();
    const Words word = load_words();
    widen<0>(word);
    widen<1>(word);
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
      Producer<kTokens, kBits, kSteps>{
          .x_map = &x_map, .p = p, .t = t, .s = slots, .load = load, .rank = rank}
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
    if (warpgroup == 1) worker.pass_turn();  // the first begins
    const int tiles = t.row_tiles * t.token_blocks, clusters = gridDim.x / t.ranks;
    for (int number = blockIdx.x / t.ranks; number < tiles; number += clusters) {
      worker.run_tile(Tile(number, rank, t));
    }
  }
  if (t.cluster == Cluster::shares_x) sync_cluster();  // nobody tells a CTA that has gone
}

// ---- host ----

constexpr int kSharedBytes = 224 * 1024;

// The block of tokens, warpgroups and kind of cluster that end first; bits do not depend on them.
struct Shape {
  int tokens, warpgroups;
  Cluster cluster;
};

// Hundredths of a microsecond that one or two warpgroups take for a slot of a block, and a tile for its
// beginning and end (H200: within a tenth of all figures of docs/kernels/quant_matmul.md).
constexpr int kSlotTime[2][2] = {{50, 72}, {70, 93}};  // 64, 128 tokens
constexpr int kTileTime = 300, kGatherTime = 900;

Shape shape_for(const QuantMatmulParams& p, int sms) {
  const int strips = (p.weight.rows + kStrip - 1) / kStrip, ranges = ranges_of(p.weight);
  const int slots = (p.weight.columns + kPiece * kSlotPieces - 1) / (kPiece * kSlotPieces);
  Shape best{};
  int64_t best_cost = -1;
  const auto consider = [&](const Shape& shape) {
    const int64_t blocks = (p.tokens + shape.tokens - 1) / shape.tokens;
    const int64_t tiles = (strips + shape.warpgroups - 1) / shape.warpgroups * blocks;
    const int time = kSlotTime[shape.tokens / 128][shape.warpgroups - 1];
    const bool splits = shape.cluster == Cluster::ranges;
    // Larger clusters leave about an eighth of the SMs; see sm90_few.cu.
    const int64_t rounds = splits ? (tiles * ranges * 8 + 7 * sms - 1) / (7 * sms) : (tiles + sms - 1) / sms;
    const int64_t cost =
        rounds * (slots * time / (splits ? ranges : 1) + kTileTime) + (splits ? kGatherTime : 0);
    if (best_cost >= 0 && cost >= best_cost) return;
    best_cost = cost;
    best = shape;
  };
  for (const int warpgroups : {1, 2}) {
    for (const int tokens : {64, 128}) {
      const bool shares = tokens == 128 && warpgroups == 2 && p.weight.columns % kPiece == 0;
      consider({tokens, warpgroups, shares ? Cluster::shares_x : Cluster::single});
      // Totals of the other ranges have to fit where slots were.
      const int totals = (ranges - 1) * warpgroups * tokens * kStrip * 4;
      if (ranges > 1 && totals <= kSharedBytes - kHeaderBytes)
        consider({tokens, warpgroups, Cluster::ranges});
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

// Sixteen tokens after the other.
cudaError_t by_few(QuantMatmulParams p, DType dtype, int sms, cudaStream_t stream) {
  const auto advanced = [](const void* from, int64_t stride) -> const void* {
    return from == nullptr ? nullptr : static_cast<const uint16_t*>(from) + 16 * stride;
  };
  for (int left = p.tokens; left > 0; left -= 16) {
    p.tokens = std::min(left, 16);
    if (const cudaError_t error = quant_matmul_few(p, dtype, sms, stream)) return error;
    p.x = advanced(p.x, p.x_stride);
    p.residual = advanced(p.residual, p.residual_stride);
    p.out = static_cast<uint16_t*>(p.out) + 16 * p.out_stride;
  }
  return cudaSuccess;
}

}  // namespace

cudaError_t quant_matmul(const QuantMatmulParams& p, DType dtype, cudaStream_t stream) {
  if (p.tokens == 0 || p.weight.rows == 0) return cudaSuccess;
  int device = 0, sms = 0;
  if (const cudaError_t error = cudaGetDevice(&device)) return error;
  if (const cudaError_t error = cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device))
    return error;
  // Twice the kernel for few tokens where that ends first (H200, twice 16 tokens against 64: 4096 x 4096 16 ·
  // 21 µs, 14336 x 4096 36 · 41; with one range 53 · 49).
  if (p.tokens <= 16 || (p.tokens <= 32 && ranges_of(p.weight) > 1)) return by_few(p, dtype, sms, stream);
  const Shape shape = shape_for(p, sms);
  return by_operand_and_scale(dtype, p.weight.scale_dtype, [&]<typename T, typename S>() {
    return by_chunk(p.weight, [&]<int kBits, int kSteps>() {
      return shape.tokens == 64 ? launch_matmul<T, S, kBits, 64, kSteps>(p, shape, sms, stream)
                                : launch_matmul<T, S, kBits, 128, kSteps>(p, shape, sms, stream);
    });
  });
}

}  // namespace tgi
