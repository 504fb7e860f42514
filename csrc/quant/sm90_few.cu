// Product of up to 16 tokens with weights of 4 or 8 bits on Hopper, at the rate of memory.
//
// Weights enter the products as whole numbers, code − zero; sums of a chunk of columns, which share a scale,
// are scaled in fp32 and added in ascending order. A strip of 16 rows is a warp's, or where there are few
// rows that of several warps, one a range of columns, whose sums are added in order: `inner` of them are of
// one CTA, `outer` CTAs are a cluster, and each has the x of its ranges. Chunks and ranges follow from the
// weight's shape alone. docs/kernels/quant_matmul.md.
//
//   each warp:  | words and pairs of stages 0 … 3 into registers | wait for the previous kernel | x |
//               stage n: ldmatrix → widen → mma of each chunk → scale, as words of stage n + 4 travel |
//               ranges | store |
#include <algorithm>

#include "common/dispatch.cuh"
#include "common/hopper.cuh"
#include "common/mma.cuh"
#include "common/pdl.cuh"
#include "common/tensor_map.h"
#include "quant/chunks.h"
#include "quant/cuda.h"
#include "quant/layout.cuh"
#include "quant/operands.cuh"

namespace tgi {
namespace {

// ---- device ----

constexpr int kMaxWarps = 16;
constexpr int kRowBytes = 128;  // of a piece of x
constexpr int kPartPieces = 8;  // of x that arrive together
constexpr int kMaxParts = 32;
constexpr int kHeaderBytes = 1024;  // the barriers; keeps x on the swizzle's 1024 bytes

struct Tiling {
  int units;                 // strips of 16 rows
  int units_each, clusters;  // units of a CTA; clusters of the grid
  int ranges, inner, outer;  // of stages: in all, of a CTA; CTAs of a cluster
  int pieces, stages;        // of all columns
  int group_steps;           // k16 steps of a group
  bool whole;                // columns are whole pieces
};

// One warp's walk along its range of columns. kSteps: k16 steps of a chunk.
template <typename T, typename S, int kBits, int kTokens, int kSteps>
struct Walk {
  static constexpr int kPieces = 8 / kBits;  // of a stage, which is 32 bytes a lane
  static constexpr int kChunks = kPieces * 4 / kSteps;
  static constexpr int kDepth = kChunks > 2 ? 2 : kChunks > 1 && kTokens > 8 ? 3 : 4;  // stages under way
  static constexpr int kBlocks = kTokens / 8;
  static constexpr int kLoads = kBits / 4;  // of 16 bytes for a piece

  struct Stage {
    uint32_t word[kPieces * kLoads][4];
    uint32_t pair[kChunks][2];
  };

  const QuantMatmulParams& p;
  const Tiling& t;
  const uint8_t* words;   // this lane's, of the next stage to load
  const uint32_t* pairs;  // of the strip's first group
  int to_load, end;       // stages
  int group, left;        // of the next stage to load: its group, and k16 steps that are left of that
  Stage ring[kDepth];
  float total[kBlocks][4];

  __device__ __forceinline__ void begin(int unit, int first, int last) {
    const int strip = unit / 4, quarter = unit % 4, lane = threadIdx.x % 32;
    words = static_cast<const uint8_t*>(p.weight.words) +
            (static_cast<int64_t>(strip) * t.pieces + first * kPieces) * kPieceBytes<kBits> + quarter * 512 +
            lane * 16;
    pairs = static_cast<const uint32_t*>(p.weight.scales) +
            static_cast<int64_t>(strip) * p.weight.groups * kStrip + quarter * 16 + lane / 4;
    to_load = first;
    end = last;
    group = first * kPieces * 4 / t.group_steps;
    left = (group + 1) * t.group_steps - first * kPieces * 4;
#pragma unroll
    for (auto& block : total) {
#pragma unroll
      for (float& sum : block) sum = 0.0f;
    }
#pragma unroll
    for (int i = 0; i < kDepth; ++i) load(ring[i]);
  }

  __device__ __forceinline__ static void load_words(uint32_t (&to)[4], const uint8_t* from) {
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "l"(from));
  }

  // Asks for the next stage. A last piece that is not there is left as it was: its x is zero.
  __device__ __forceinline__ void load(Stage& to) {
    if (to_load >= end) return;
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
      if (piece > 0 && to_load * kPieces + piece >= t.pieces) break;
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        load_words(to.word[piece * kLoads + i], words + piece * kPieceBytes<kBits> + i * 2048);
      }
    }
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const uint32_t* from = pairs + min(group, p.weight.groups - 1) * kStrip;
      to.pair[c][0] = __ldg(from);
      to.pair[c][1] = __ldg(from + 8);
      left -= kSteps;
      if (left <= 0) {
        ++group;
        left += t.group_steps;
      }
    }
    words += kPieces * kPieceBytes<kBits>;
    ++to_load;
  }

  // Adds a stage's products; x: address of its first piece.
  __device__ __forceinline__ void multiply(const Stage& stage, uint32_t x, const uint32_t (&x_lane)[2]) {
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
            exact.load(h, stage.pair[q / kSteps][h]);
            scale[h] = scale_of<S>(stage.pair[q / kSteps][h]);
          }
#pragma unroll
          for (auto& block : d) {
#pragma unroll
            for (float& sum : block) sum = 0.0f;
          }
        }
        uint32_t a[4];
        exact.widen(a, &stage.word[0][0] + q * kLoads);
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

  // The whole range; x: address of its first piece. `arrived(piece, count)` returns when those pieces,
  // counted from this range's first, are there.
  template <typename F>
  __device__ __forceinline__ void run(int first, uint32_t x, F&& arrived) {
    const uint32_t token = threadIdx.x % 8, chunk = threadIdx.x % 32 / 8;
    const uint32_t x_lane[2] = {token * kRowBytes + ((chunk ^ token) << 4),
                                token * kRowBytes + (((4 + chunk) ^ token) << 4)};
    for (int stage = first; stage < end; stage += kDepth) {
      arrived((stage - first) * kPieces, min(kDepth, end - stage) * kPieces);
#pragma unroll
      for (int i = 0; i < kDepth; ++i) {
        if (stage + i >= end) break;
        multiply(ring[i], x, x_lane);
        load(ring[i]);
        x += kPieces * kTokens * kRowBytes;
      }
    }
  }
};

// Parts of x of a CTA, at most.
__host__ __device__ __forceinline__ int parts_of(const Tiling& t) {
  const int steps = t.inner * (((t.pieces + 1) / 2 + t.ranges - 1) / t.ranges);
  return (steps * 2 + kPartPieces - 1) / kPartPieces;
}

// Asks for the x of a CTA, part by part.
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

template <typename T, typename S, int kBits, int kTokens, int kSteps>
__global__ void __launch_bounds__(kMaxWarps * 32, 1)
    few_tokens_kernel(const __grid_constant__ CUtensorMap x_map, const QuantMatmulParams p, const Tiling t) {
  using Work = Walk<T, S, kBits, kTokens, kSteps>;
  extern __shared__ __align__(1024) uint8_t shared[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int rank = blockIdx.x % t.outer, cluster = blockIdx.x / t.outer;
  const int of_cta = warp / t.inner, range = rank * t.inner + warp % t.inner;
  // A stage is 128 columns of 4 bits, or 64 of 8.
  const auto border = [&](int of) {
    return min(t.stages, range_border((t.pieces + 1) / 2, of, t.ranges) * (2 / Work::kPieces));
  };
  const int first = border(range), last = border(range + 1);
  const int cta_piece = border(rank * t.inner) * Work::kPieces;
  const int cta_pieces = border((rank + 1) * t.inner) * Work::kPieces - cta_piece;
  const uint32_t barriers = shared_address(shared), x = barriers + kHeaderBytes;
  const uint32_t told = barriers + 8 * (kMaxParts + of_cta);  // of this unit's sums of other ranges
  // The same in all CTAs of the cluster: as if one had the most pieces that there may be.
  const uint32_t sums = x + parts_of(t) * kPartPieces * kTokens * kRowBytes;

  let_next_start();
  Work work{.p = p, .t = t};
  int unit = cluster * t.units_each + of_cta;
  if (unit < t.units) work.begin(unit, first, last);
  if (threadIdx.x == 0) {
    prefetch_map(&x_map);
    for (int i = 0; i < kMaxParts; ++i) barrier_init(barriers + 8 * i, 1);
    for (int i = 0; i < t.units_each; ++i) barrier_init(barriers + 8 * (kMaxParts + i), t.inner);
    barrier_init_done();
  }
  __syncthreads();
  wait_for_previous();
  if (threadIdx.x == 0) fetch_x<kTokens>(&x_map, t, x, barriers, cta_piece, cta_pieces);
  if (t.outer > 1) meet_cluster();

  const int step = t.clusters * t.units_each;
  for (int base = cluster * t.units_each; base < t.units; base += step, unit += step) {
    if (unit >= t.units) continue;
    if (base != cluster * t.units_each) work.begin(unit, first, last);
    const int from = first * Work::kPieces - cta_piece;
    work.run(first, x + from * kTokens * kRowBytes, [&](int piece, int count) {
      const int end = (from + piece + count - 1) / kPartPieces;
      for (int part = (from + piece) / kPartPieces; part <= end; ++part) barrier_wait(barriers + 8 * part, 0);
    });
    const auto place = [&](int of, int j) {
      return sums + (((of - 1) * t.units_each + of_cta) * kTokens / 8 + j) * 512 + lane * 16;
    };
    if (rank > 0) {
#pragma unroll
      for (int j = 0; j < kTokens / 8; ++j) send_first_rank(place(range, j), work.total[j], told);
      continue;
    }
    if (range > 0) {
#pragma unroll
      for (int j = 0; j < kTokens / 8; ++j) {
        const float (&sum)[4] = work.total[j];
        asm volatile("st.shared.v4.f32 [%4], {%0, %1, %2, %3};" ::"f"(sum[0]), "f"(sum[1]), "f"(sum[2]),
                     "f"(sum[3]), "r"(place(range, j))
                     : "memory");
      }
      __syncwarp();
      if (lane == 0) barrier_arrive(told);
      continue;
    }
    if (t.ranges > 1) {  // then a cluster has one tile
      if (lane == 0) barrier_arrive_expecting(told, (t.ranges - t.inner) * kTokens * 64);
      barrier_wait(told, 0);
      for (int of = 1; of < t.ranges; ++of) {
#pragma unroll
        for (int j = 0; j < kTokens / 8; ++j) {
          float more[4];
          asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                       : "=f"(more[0]), "=f"(more[1]), "=f"(more[2]), "=f"(more[3])
                       : "r"(place(of, j)));
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

// Spreads ranges and units over clusters of two CTAs, or as few more as have room for x, in one round.
// Graphics clusters of odd size leave SMs that larger clusters cannot take (H200: of 33 clusters of four
// about 29 fit; the others ran after them, 14336 x 4096, 16 tokens: 28 instead of 18 µs).
template <int kTokens>
bool spread(Tiling& t, int sms, int* shared_bytes) {
  for (t.outer = t.ranges > 1 ? 2 : 1; t.outer <= t.ranges; ++t.outer) {
    if (t.ranges % t.outer != 0) continue;
    t.inner = t.ranges / t.outer;
    const int parts = parts_of(t);
    const int most = t.outer <= 2 ? sms / t.outer : sms * 7 / 8 / t.outer;
    t.units_each = std::max(1, std::min(kMaxWarps / t.inner, (t.units + most - 1) / most));
    *shared_bytes = kHeaderBytes + parts * kPartPieces * kTokens * kRowBytes +
                    (t.ranges - 1) * t.units_each * kTokens * 64;
    if (t.inner <= kMaxWarps && parts <= kMaxParts && *shared_bytes <= kSharedBytes) break;
  }
  t.clusters = (t.units + t.units_each - 1) / t.units_each;
  if (t.ranges == 1) t.clusters = std::min(sms, t.clusters);  // they go on with the next tile, and keep x
  return t.outer <= t.ranges;
}

template <typename T, typename S, int kBits, int kTokens, int kSteps>
cudaError_t launch_few(const QuantMatmulParams& p, int sms, cudaStream_t stream) {
  constexpr int kPieces = Walk<T, S, kBits, kTokens, kSteps>::kPieces;
  Tiling t{};
  t.whole = p.weight.columns % kPiece == 0;
  t.units = (p.weight.rows + kStrip - 1) / kStrip * 4;
  t.pieces = (p.weight.columns + kPiece - 1) / kPiece;
  t.stages = (t.pieces + kPieces - 1) / kPieces;
  t.ranges = ranges_of(p.weight);
  t.group_steps = p.weight.group_size / 16;
  int shared_bytes = 0;
  if (!spread<kTokens>(t, sms, &shared_bytes)) return cudaErrorInvalidValue;
  CUtensorMap x_map;
  const cuuint64_t sizes[3] = {static_cast<cuuint64_t>(t.whole ? kPiece : p.weight.columns),
                               static_cast<cuuint64_t>(p.tokens),
                               static_cast<cuuint64_t>(t.whole ? t.pieces : 1)};
  const cuuint64_t strides[2] = {static_cast<cuuint64_t>(p.x_stride) * 2, kRowBytes};
  const cuuint32_t box[3] = {kPiece, kTokens, static_cast<cuuint32_t>(t.whole ? kPartPieces : 1)};
  if (!encode_swizzled_map(&x_map, __is_same(T, __half), p.x, sizes, strides, box))
    return cudaErrorInvalidValue;
  const auto kernel = few_tokens_kernel<T, S, kBits, kTokens, kSteps>;
  if (const cudaError_t error =
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes)) {
    return error;
  }
  const dim3 grid(static_cast<unsigned>(t.clusters * t.outer));
  return launch_clusters(kernel, grid, t.outer, t.units_each * t.inner * 32, shared_bytes, stream, x_map, p,
                         t);
}

}  // namespace

cudaError_t quant_matmul_few(const QuantMatmulParams& p, DType dtype, int sms, cudaStream_t stream) {
  return by_operand_and_scale(dtype, p.weight.scale_dtype, [&]<typename T, typename S>() {
    return by_chunk(p.weight, [&]<int kBits, int kSteps>() {
      return p.tokens <= 8 ? launch_few<T, S, kBits, 8, kSteps>(p, sms, stream)
                           : launch_few<T, S, kBits, 16, kSteps>(p, sms, stream);
    });
  });
}

}  // namespace tgi
