// Product of up to 16 tokens with weights of 4 or 8 bits on Hopper, at the rate of memory.
//
// Weights enter the products as whole numbers, code − zero; sums of a chunk of columns, which share a scale,
// are scaled in fp32 and added in ascending order. A strip of 16 rows is a warp's, or where there are few
// rows that of several warps, one a range of columns, whose sums are added in order through a cluster. Chunks
// and ranges follow from the weight's shape alone. docs/kernels/quant_matmul.md.
//
//   each warp:  | words and pairs of stages 0 … 4 | wait for the previous kernel | x of its range |
//               stage n: ldmatrix → widen → mma of each chunk → scale, as stages n + 1 … n + 5 travel |
//               ranges | store |
#include "common/copy.cuh"
#include "common/dispatch.cuh"
#include "common/hopper.cuh"
#include "common/mma.cuh"
#include "common/pdl.cuh"
#include "common/tensor_map.h"
#include "quant/cuda.h"
#include "quant/layout.cuh"
#include "quant/operands.cuh"

namespace tgi {
namespace {

// ---- device ----

constexpr int kMaxWarps = 16;
constexpr int kRowBytes = 128;   // of a piece of x
constexpr int kPartPieces = 16;  // of x that arrive together
constexpr int kMaxParts = 16;
constexpr int kHeaderBytes = 1024;  // the barriers; keeps x on the swizzle's 1024 bytes
constexpr int kMaxRanges = 8;

struct Tiling {
  int units;            // strips of 16 rows
  int warps, clusters;  // of a CTA; of the grid, each of `ranges` CTAs
  int pieces, stages;   // of all columns
  int ranges;           // of stages
  int group_steps;      // k16 steps of a group
  bool whole;           // columns are whole pieces
};

// One warp's walk along its range of columns. kSteps: k16 steps of a chunk.
//
// Stages travel by cp.async through a ring of the warp's own: groups of copies end in order. Loads into
// registers share scoreboards, and waiting for one waited for all (H200, 14336 x 4096, one token: 19.6 µs).
template <typename T, typename S, int kBits, int kTokens, int kSteps, int kDepth>
struct Walk {
  static constexpr int kPieces = 8 / kBits;  // of a stage, which is 32 bytes a lane
  static constexpr int kChunks = kPieces * 4 / kSteps;
  static constexpr int kBlocks = kTokens / 8;
  static constexpr int kLoads = kBits / 4;  // of 16 bytes for a piece
  static constexpr int kWordsBytes = kPieces * kLoads * 512;
  static constexpr int kStageBytes = kWordsBytes + kChunks * 64;  // of 16 rows: words, then pairs
  static constexpr int kRingBytes = kDepth * kStageBytes;

  const QuantMatmulParams& p;
  const Tiling& t;
  const uint32_t ring;
  const uint8_t* words;   // this lane's, of the next stage to load
  const uint32_t* pairs;  // of the strip's first group; of lanes 0 … 3
  int to_load, end;       // stages
  int group, left;        // of the next stage to load: its group, and k16 steps that are left of that
  uint32_t load_slot;     // offset in the ring
  float total[kBlocks][4];

  __device__ __forceinline__ void begin(int unit, int first, int last) {
    const int strip = unit / 4, quarter = unit % 4, lane = threadIdx.x % 32;
    words = static_cast<const uint8_t*>(p.weight.words) +
            (static_cast<int64_t>(strip) * t.pieces + first * kPieces) * kPieceBytes<kBits> + quarter * 512 +
            lane * 16;
    pairs = static_cast<const uint32_t*>(p.weight.scales) +
            static_cast<int64_t>(strip) * p.weight.groups * kStrip + quarter * 16 + lane * 4;
    to_load = first;
    end = last;
    group = first * kPieces * 4 / t.group_steps;
    left = (group + 1) * t.group_steps - first * kPieces * 4;
    load_slot = 0;
#pragma unroll
    for (auto& block : total) {
#pragma unroll
      for (float& sum : block) sum = 0.0f;
    }
    __syncwarp();  // the ring of the tile before is read
#pragma unroll
    for (int i = 0; i < kDepth - 1; ++i) load();
  }

  // Asks for the next stage. A last piece that is not there is zeros.
  __device__ __forceinline__ void load() {
    if (to_load < end) {
      const int lane = threadIdx.x % 32;
      const uint32_t to = ring + load_slot;
#pragma unroll
      for (int piece = 0; piece < kPieces; ++piece) {
        const bool valid = piece == 0 || to_load * kPieces + piece < t.pieces;
#pragma unroll
        for (int i = 0; i < kLoads; ++i) {
          copy_async(to + (piece * kLoads + i) * 512 + lane * 16,
                     valid ? words + piece * kPieceBytes<kBits> + i * 2048 : words, valid);
        }
      }
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        if (lane < 4) {
          copy_async(to + kWordsBytes + c * 64 + lane * 16, pairs + min(group, p.weight.groups - 1) * kStrip);
        }
        left -= kSteps;
        if (left <= 0) {
          ++group;
          left += t.group_steps;
        }
      }
      words += kPieces * kPieceBytes<kBits>;
      ++to_load;
      load_slot = load_slot + kStageBytes == kRingBytes ? 0 : load_slot + kStageBytes;
    }
    commit_copies();
  }

  // Adds a stage's products; x: address of its first piece.
  __device__ __forceinline__ void multiply(uint32_t stage, uint32_t x, const uint32_t (&x_lane)[2]) {
    const int lane = threadIdx.x % 32;
    uint32_t word[kPieces * kLoads][4];
#pragma unroll
    for (int i = 0; i < kPieces * kLoads; ++i) {
      asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(word[i][0]), "=r"(word[i][1]), "=r"(word[i][2]), "=r"(word[i][3])
                   : "r"(stage + i * 512 + lane * 16));
    }
    Exact<T, kBits> exact;
    float scale[2], d[kBlocks][4];
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
      uint32_t b[2][kBlocks][4];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int j = 0; j < kBlocks; ++j) {
          load_matrices(b[half][j], x + (piece * kTokens + j * 8) * kRowBytes + x_lane[half]);
        }
      }
#pragma unroll
      for (int step = 0; step < 4; ++step) {
        const int q = piece * 4 + step;
        if (q % kSteps == 0) {
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            uint32_t pair;
            asm volatile("ld.shared.u32 %0, [%1];"
                         : "=r"(pair)
                         : "r"(stage + kWordsBytes + q / kSteps * 64 + h * 32 + lane / 4 * 4));
            exact.load(h, pair);
            scale[h] = scale_of<S>(pair);
          }
#pragma unroll
          for (auto& block : d) {
#pragma unroll
            for (float& sum : block) sum = 0.0f;
          }
        }
        uint32_t a[4];
        exact.widen(a, &word[0][0] + q * kLoads);
#pragma unroll
        for (int j = 0; j < kBlocks; ++j)
          mma<T>(d[j], a, b[step / 2][j][step % 2 * 2], b[step / 2][j][step % 2 * 2 + 1]);
        if ((q + 1) % kSteps == 0) {
#pragma unroll
          for (int j = 0; j < kBlocks; ++j) {
#pragma unroll
            for (int i = 0; i < 4; ++i) total[j][i] = fmaf(scale[i / 2], d[j][i], total[j][i]);
          }
        }
      }
    }
  }

  // The whole range; x: address of its first piece. `arrived(piece)` returns when a piece and those of its
  // part are there.
  template <typename F>
  __device__ __forceinline__ void run(int first, uint32_t x, F&& arrived) {
    const uint32_t token = threadIdx.x % 8, chunk = threadIdx.x % 32 / 8;
    const uint32_t x_lane[2] = {token * kRowBytes + ((chunk ^ token) << 4),
                                token * kRowBytes + (((4 + chunk) ^ token) << 4)};
    uint32_t slot = 0;
    for (int stage = first; stage < end; ++stage) {
      arrived((stage - first) * kPieces);
      wait_copies<kDepth - 2>();
      __syncwarp();  // all lanes' copies have come, and all lanes have read the slot that is filled next
      load();
      multiply(ring + slot, x, x_lane);
      slot = slot + kStageBytes == kRingBytes ? 0 : slot + kStageBytes;
      x += kPieces * kTokens * kRowBytes;
    }
  }
};

// Leaves four sums in the first CTA's shared memory, and tells its barrier.
__device__ __forceinline__ void send_first(uint32_t address, const float (&value)[4], uint32_t barrier) {
  asm volatile(
      "{\n"
      ".reg .b32 there, told;\n"
      "mapa.shared::cluster.u32 there, %0, 0;\n"
      "mapa.shared::cluster.u32 told, %5, 0;\n"
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [there], {%1, %2, %3, %4}, [told];\n"
      "}\n" ::"r"(address),
      "f"(value[0]), "f"(value[1]), "f"(value[2]), "f"(value[3]), "r"(barrier)
      : "memory");
}

// All CTAs of the cluster have begun, and see each other's barriers.
__device__ __forceinline__ void meet_cluster() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Asks for the x of a range, part by part.
template <int kTokens>
__device__ __forceinline__ void fetch_x(const CUtensorMap* map, const Tiling& t, uint32_t x,
                                        uint32_t barriers, int first, int pieces) {
  for (int part = 0; part * kPartPieces < pieces; ++part) {
    const uint32_t barrier = barriers + 8 * part;
    barrier_arrive_expecting(barrier, kPartPieces * kTokens * kRowBytes);
    const uint32_t to = x + part * kPartPieces * kTokens * kRowBytes;
    const int piece = first + part * kPartPieces;
    if (t.whole) {
      copy_box(to, map, 0, 0, piece, barrier);
      continue;
    }
    for (int i = 0; i < kPartPieces; ++i) {
      copy_box(to + i * kTokens * kRowBytes, map, (piece + i) * kPiece, 0, 0, barrier);
    }
  }
}

// Adds bias and residual to a warp's sums and stores them.
template <typename T, int kTokens>
__device__ __forceinline__ void finish(const QuantMatmulParams& p, int unit,
                                       const float (&total)[kTokens / 8][4]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int feature = unit * 16 + lane / 4 + 8 * h;
    if (feature >= p.weight.rows) continue;
    const float bias = p.bias != nullptr ? to_float(static_cast<const T*>(p.bias)[feature]) : 0.0f;
#pragma unroll
    for (int j = 0; j < kTokens / 8; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int token = 8 * j + 2 * (lane % 4) + e;
        if (token >= p.tokens) continue;
        float y = rounded<T>(total[j][2 * h + e] + bias);
        if (p.residual != nullptr) {
          y += to_float(static_cast<const T*>(p.residual)[token * p.residual_stride + feature]);
        }
        static_cast<T*>(p.out)[token * p.out_stride + feature] = from_float<T>(y);
      }
    }
  }
}

template <typename T, typename S, int kBits, int kTokens, int kSteps, int kDepth>
__global__ void __launch_bounds__(kMaxWarps * 32, 1)
    few_tokens_kernel(const __grid_constant__ CUtensorMap x_map, const QuantMatmulParams p, const Tiling t) {
  using Work = Walk<T, S, kBits, kTokens, kSteps, kDepth>;
  extern __shared__ __align__(1024) uint8_t shared[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int range = blockIdx.x % t.ranges, cluster = blockIdx.x / t.ranges;
  const int first = t.stages * range / t.ranges, last = t.stages * (range + 1) / t.ranges;
  const int pieces = (last - first) * Work::kPieces;
  const uint32_t barriers = shared_address(shared), x = barriers + kHeaderBytes;
  const uint32_t told = barriers + 8 * (kMaxParts + warp);  // of this warp's sums of other ranges
  // The widest range decides, so that all ranks agree where sums are left.
  const int widest = ((t.stages + t.ranges - 1) / t.ranges * Work::kPieces + kPartPieces - 1) / kPartPieces;
  const uint32_t sums = x + widest * kPartPieces * kTokens * kRowBytes;
  const uint32_t rings = sums + (t.ranges - 1) * t.warps * kTokens * 64;

  let_next_start();
  Work work{.p = p, .t = t, .ring = rings + warp * Work::kRingBytes};
  int unit = cluster * t.warps + warp;
  if (unit < t.units) work.begin(unit, first, last);
  if (threadIdx.x == 0) {
    prefetch_map(&x_map);
    for (int i = 0; i < kMaxParts + t.warps; ++i) barrier_init(barriers + 8 * i, 1);
    barrier_init_done();
  }
  __syncthreads();
  wait_for_previous();
  if (threadIdx.x == 0) fetch_x<kTokens>(&x_map, t, x, barriers, first * Work::kPieces, pieces);
  if (t.ranges > 1) meet_cluster();

  for (int base = cluster * t.warps; base < t.units; base += t.clusters * t.warps, unit = base + warp) {
    const bool has_unit = unit < t.units;
    if (has_unit) {
      if (base != cluster * t.warps) work.begin(unit, first, last);
      work.run(first, x, [&](int piece) {
        if (piece % kPartPieces == 0) barrier_wait(barriers + 8 * (piece / kPartPieces), 0);
      });
    }
    if (!has_unit) continue;
    const auto place = [&](int rank, int j) {
      return sums + (((rank - 1) * t.warps + warp) * kTokens / 8 + j) * 512 + lane * 16;
    };
    if (range > 0) {
#pragma unroll
      for (int j = 0; j < kTokens / 8; ++j) send_first(place(range, j), work.total[j], told);
      continue;
    }
    if (t.ranges > 1) {  // then a cluster has one tile
      if (lane == 0) barrier_arrive_expecting(told, (t.ranges - 1) * kTokens * 64);
      barrier_wait(told, 0);
      for (int rank = 1; rank < t.ranges; ++rank) {
#pragma unroll
        for (int j = 0; j < kTokens / 8; ++j) {
          float more[4];
          asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                       : "=f"(more[0]), "=f"(more[1]), "=f"(more[2]), "=f"(more[3])
                       : "r"(place(rank, j)));
#pragma unroll
          for (int i = 0; i < 4; ++i) work.total[j][i] += more[i];
        }
      }
    }
    finish<T, kTokens>(p, unit, work.total);
  }
}

// ---- host ----

constexpr int kSharedBytes = 224 * 1024;

// Ranges of columns: as many as give each scheduler of a large GPU two warps, and as let 16 tokens' x fit.
// They follow from the shape alone, since bits depend on them.
int ranges_for(int rows, int pieces) {
  int ranges = 1;
  while (ranges < kMaxRanges && (rows + 15) / 16 * ranges < 1024 && pieces / ranges > 8) ranges *= 2;
  while (ranges < kMaxRanges && pieces / ranges > 4 * kPartPieces) ranges *= 2;
  return ranges;
}

template <typename T, typename S, int kBits, int kTokens, int kSteps, int kDepth>
cudaError_t launch_few(const QuantMatmulParams& p, int sms, cudaStream_t stream) {
  using Work = Walk<T, S, kBits, kTokens, kSteps, kDepth>;
  constexpr int kPieces = Work::kPieces;
  Tiling t{};
  t.whole = p.weight.columns % kPiece == 0;
  t.units = (p.weight.rows + kStrip - 1) / kStrip * 4;
  t.pieces = (p.weight.columns + kPiece - 1) / kPiece;
  t.stages = (t.pieces + kPieces - 1) / kPieces;
  t.ranges = ranges_for(p.weight.rows, t.pieces);
  t.group_steps = p.weight.group_size / 16;
  const int most = max(1, sms / t.ranges);
  const int parts = ((t.stages + t.ranges - 1) / t.ranges * kPieces + kPartPieces - 1) / kPartPieces;
  const int x_bytes = kHeaderBytes + parts * kPartPieces * kTokens * kRowBytes;
  const auto bytes = [&] { return x_bytes + t.warps * ((t.ranges - 1) * kTokens * 64 + Work::kRingBytes); };
  t.warps = min(kMaxWarps, (t.units + most - 1) / most);
  while (t.warps > 1 && bytes() > kSharedBytes) --t.warps;
  const int shared_bytes = bytes();
  if (parts > kMaxParts || shared_bytes > kSharedBytes) return cudaErrorInvalidValue;
  t.clusters = (t.units + t.warps - 1) / t.warps;
  if (t.ranges == 1) t.clusters = min(most, t.clusters);  // they go on with the next tile, and keep x
  CUtensorMap x_map;
  const cuuint64_t sizes[3] = {static_cast<cuuint64_t>(t.whole ? kPiece : p.weight.columns),
                               static_cast<cuuint64_t>(p.tokens),
                               static_cast<cuuint64_t>(t.whole ? t.pieces : 1)};
  const cuuint64_t strides[2] = {static_cast<cuuint64_t>(p.x_stride) * 2, kRowBytes};
  const cuuint32_t box[3] = {kPiece, kTokens, static_cast<cuuint32_t>(t.whole ? kPartPieces : 1)};
  if (!encode_swizzled_map(&x_map, __is_same(T, __half), p.x, sizes, strides, box))
    return cudaErrorInvalidValue;
  const auto kernel = few_tokens_kernel<T, S, kBits, kTokens, kSteps, kDepth>;
  if (const cudaError_t error =
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes)) {
    return error;
  }
  const dim3 grid(static_cast<unsigned>(t.clusters * t.ranges));
  return launch_clusters(kernel, grid, t.ranges, t.warps * 32, shared_bytes, stream, x_map, p, t);
}

constexpr int kDepth = 6;  // stages of a warp's ring: 5 KB under way

// Chunks are whole groups, or parts of one: columns that share a scale.
template <typename T, typename S, int kBits, int kTokens>
cudaError_t by_chunk(const QuantMatmulParams& p, int sms, cudaStream_t stream) {
  const int columns = p.weight.groups == 1 ? 128 : p.weight.group_size;
  if constexpr (kBits == 4) {
    if (columns % 128 == 0) return launch_few<T, S, kBits, kTokens, 8, kDepth>(p, sms, stream);
  }
  if (columns % 64 == 0) return launch_few<T, S, kBits, kTokens, 4, kDepth>(p, sms, stream);
  return launch_few<T, S, kBits, kTokens, 1, kDepth>(p, sms, stream);
}

}  // namespace

cudaError_t quant_matmul_few(const QuantMatmulParams& p, DType dtype, int sms, cudaStream_t stream) {
  return by_operand_and_scale(dtype, p.weight.scale_dtype, [&]<typename T, typename S>() {
    return by_at_least<8, 16>(p.tokens, [&]<int kTokens>() {
      return p.weight.bits == 4 ? by_chunk<T, S, 4, kTokens>(p, sms, stream)
                                : by_chunk<T, S, 8, kTokens>(p, sms, stream);
    });
  });
}

}  // namespace tgi
