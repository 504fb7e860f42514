// Product of few tokens with weights of every kind on Hopper: 2 to 8 bits, numbers of a table, e4m3, and runs
// of columns of different widths (EXL2).
//
// It sums as sm90_few.cu does: chunks of columns that share a scale by the tensor cores, exact operands, and
// total = fma(scale, chunk, total) in fp32, in ascending order; where there are few rows, columns are cut
// into ranges, of which `inner` are warps of a CTA and `outer` CTAs are a cluster. An offset is multiplied by
// the chunk's sum of x, which a product with ones gives. Tokens come in slabs of 16.
// docs/kernels/quant_runs.md.
//
//   each warp:  | words and scales of the first blocks | wait for the previous kernel | x of its range |
//               block n: ldmatrix → widen → mma of each chunk → scale, as words of later blocks travel | next
//               run | ranges | store |
#pragma once

#include <cstring>

#include "common/dispatch.cuh"
#include "common/hopper.cuh"
#include "common/mma.cuh"
#include "common/pdl.cuh"
#include "common/tensor_map.h"
#include "quant/kinds.cuh"
#include "quant/runs.h"

namespace tgi::runs {

// ---- device ----

constexpr int kMaxWarps = 16;
constexpr int kRowBytes = 128;  // of a piece of x
constexpr int kPartPieces = 4;  // of x that arrive together
constexpr int kMaxParts = 64;
constexpr int kHeaderBytes = 1024;  // the barriers; keeps x on the swizzle's 1024 bytes
constexpr int kMaxRanges = 8;

struct Tiling {
  int units;                 // strips of 16 rows
  int units_each, clusters;  // units of a CTA; clusters of the grid
  int ranges, inner, outer;  // of blocks: in all, of a CTA; CTAs of a cluster
  bool whole;                // every run begins on a block of x, and columns are whole pieces
  bool has_table;
  uint16_t table[16];  // operands
  float scale;         // of all sums
};

// How sums are scaled, as far as kernels differ.
enum class Format { brief, zeros, single, two };

// One warp's walk along blocks of a run. kSteps: k16 steps of a chunk.
template <typename T, Codes kCodes, Format kFormat, int kTokens, int kSteps>
struct Walk {
  static constexpr int kChunks = 8 / kSteps;
  static constexpr int kWords = 2 * kBitsOf<kCodes>;
  static constexpr int kScales = kFormat == Format::brief ? 1
                                 : kFormat == Format::two ? 4
                                                          : 2;  // words of a chunk
  static constexpr int kStage = kWords + kChunks * kScales;
  // Registers of a thread that has 128: the more sums it keeps, the fewer are left for what is under way.
  static constexpr int kRoom = 56 - kTokens - (kFormat == Format::two ? kTokens : 0);
  static constexpr int kDepth = kStage > kRoom ? 1 : kRoom / kStage < 4 ? kRoom / kStage : 4;
  static constexpr int kBlocks = kTokens / 8;
  static constexpr int kBytes = 1024 * kBitsOf<kCodes>;  // of a block

  struct Stage {
    uint32_t word[kWords];
    uint32_t scale[kChunks][kScales];
  };

  const QuantRun& run;
  Scaling scaling;
  float all_scale;
  const uint8_t* words;    // of the next block to load: of the strip's quarter
  const uint32_t* scales;  // this lane's, of the next block's first group
  int to_load, end;        // blocks of the run
  int left;                // k16 steps of that group that are not loaded
  Stage ring[kDepth];

  __device__ __forceinline__ void begin(int unit, int first, int last) {
    const int strip = unit / 4, quarter = unit % 4, lane = threadIdx.x % 32;
    const int blocks = (run.columns + kBlock - 1) / kBlock, group_steps = run.group_size / 16;
    words = run.words + (static_cast<int64_t>(strip) * blocks + first) * kBytes;
    const int group = first * 8 / group_steps;
    scales = run.scales +
             ((static_cast<int64_t>(strip) * run.groups + group) * (kStrip / 2) + quarter * 8 + lane / 4) *
                 kScales;
    to_load = first;
    end = last;
    left = (group + 1) * group_steps - first * 8;
#pragma unroll
    for (int i = 0; i < kDepth; ++i) load(ring[i], quarter);
  }

  // Asks for the next block.
  __device__ __forceinline__ void load(Stage& to, int quarter) {
    if (to_load >= end) return;
    const int lane = threadIdx.x % 32;
    constexpr int kLoads = kWords / 4;
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(to.word[4 * i]), "=r"(to.word[4 * i + 1]), "=r"(to.word[4 * i + 2]),
                     "=r"(to.word[4 * i + 3])
                   : "l"(words + i * 2048 + quarter * 512 + lane * 16));
    }
    if constexpr (kWords % 4 != 0) {
      asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];"
                   : "=r"(to.word[4 * kLoads]), "=r"(to.word[4 * kLoads + 1])
                   : "l"(words + kLoads * 2048 + quarter * 256 + lane * 8));
    }
    words += kBytes;
    const int group_steps = run.group_size / 16;
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      if constexpr (kScales == 1) {
        to.scale[c][0] = __ldg(scales);
      } else if constexpr (kScales == 2) {
        const uint2 two = __ldg(reinterpret_cast<const uint2*>(scales));
        to.scale[c][0] = two.x, to.scale[c][1] = two.y;
      } else {
        const uint4 four = __ldg(reinterpret_cast<const uint4*>(scales));
        to.scale[c][0] = four.x, to.scale[c][1] = four.y, to.scale[c][2] = four.z, to.scale[c][3] = four.w;
      }
      left -= kSteps;
      if (left <= 0) {
        scales += kScales * (kStrip / 2);
        left += group_steps;
      }
    }
    ++to_load;
  }

  // Of row g + 8h.
  __device__ __forceinline__ float scale_of_row(const uint32_t (&words)[kScales], int h) const {
    if constexpr (kFormat == Format::brief) {
      const uint32_t word = h == 0 ? words[0] : words[0] >> 16;
      return scaling == Scaling::half ? scale_of<__half>(word) : scale_of<__nv_bfloat16>(word);
    } else if constexpr (kFormat == Format::zeros) {
      return scaling == Scaling::half_zeros ? scale_of<__half>(words[h]) : scale_of<__nv_bfloat16>(words[h]);
    } else if constexpr (kCodes == Codes::table) {
      return __uint_as_float(words[h]) * all_scale;
    } else {
      return __uint_as_float(words[h]);
    }
  }

  // Adds a block's products; x: address of its first piece.
  __device__ __forceinline__ void multiply(const Stage& stage, Operands<T, kCodes>& operands, uint32_t x,
                                           const uint32_t (&x_lane)[2], float (&total)[kBlocks][4]) {
    constexpr uint32_t kOne = __is_same(T, __half) ? 0x3c003c00u : 0x3f803f80u;
    constexpr uint32_t kOnes[4] = {kOne, kOne, kOne, kOne};
    float scale[2], d[kBlocks][4], sum[kBlocks][4];
#pragma unroll
    for (int half = 0; half < 4; ++half) {  // of a piece of x
      uint32_t b[kBlocks][4];
#pragma unroll
      for (int j = 0; j < kBlocks; ++j) {
        load_matrices(b[j], x + (half / 2 * kTokens + j * 8) * kRowBytes + x_lane[half % 2]);
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int step = half * 2 + i, chunk = step / kSteps;
        if (step % kSteps == 0) {
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            scale[h] = scale_of_row(stage.scale[chunk], h);
            if constexpr (kFormat == Format::zeros) operands.set_zero(h, stage.scale[chunk][h] >> 16);
          }
#pragma unroll
          for (int j = 0; j < kBlocks; ++j) {
#pragma unroll
            for (int e = 0; e < 4; ++e) d[j][e] = sum[j][e] = 0.0f;
          }
        }
        uint32_t a[4];
        operands.widen(a, stage.word, step);
#pragma unroll
        for (int j = 0; j < kBlocks; ++j) {
          mma<T>(d[j], a, b[j][2 * i], b[j][2 * i + 1]);
          if constexpr (kFormat == Format::two) mma<T>(sum[j], kOnes, b[j][2 * i], b[j][2 * i + 1]);
        }
        if ((step + 1) % kSteps != 0) continue;
#pragma unroll
        for (int j = 0; j < kBlocks; ++j) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            total[j][e] = fmaf(scale[e / 2], d[j][e], total[j][e]);
            if constexpr (kFormat == Format::two) {
              const float shift = __uint_as_float(stage.scale[chunk][2 + e / 2]);
              const float offset = scaling == Scaling::zero ? -shift * scale[e / 2] : shift;
              total[j][e] = fmaf(offset, sum[j][e % 2], total[j][e]);
            }
          }
        }
      }
    }
  }

  // Blocks [first, end); x: address of the first one's. `arrived(i)` returns when x of the i-th of them is
  // there.
  template <typename F>
  __device__ __forceinline__ void walk(int first, int quarter, uint32_t x, uint32_t table,
                                       float (&total)[kBlocks][4], F&& arrived) {
    const uint32_t lane = threadIdx.x % 32, token = lane % 8, chunk = lane / 8;
    const uint32_t x_lane[2] = {token * kRowBytes + ((chunk ^ token) << 4),
                                token * kRowBytes + (((4 + chunk) ^ token) << 4)};
    Operands<T, kCodes> operands;
    if constexpr (kCodes == Codes::table) operands.table = table + lane * 4;
    if constexpr (Operands<T, kCodes>::kHasZero && kFormat != Format::zeros) {
      operands.set_zero(0, run.zero);
      operands.set_zero(1, run.zero);
    }
    for (int block = first; block < end; block += kDepth) {
#pragma unroll
      for (int i = 0; i < kDepth; ++i) {
        if (block + i >= end) break;
        arrived(block + i - first);
        multiply(ring[i], operands, x, x_lane, total);
        load(ring[i], quarter);
        x += 2 * kTokens * kRowBytes;
      }
    }
  }
};

// Asks L2 for the first words of a run, which the walk along the run before it leads to.
__device__ __forceinline__ void prefetch_run(const QuantRun& run, int unit, int bits) {
  const int blocks = (run.columns + kBlock - 1) / kBlock;
  const uint8_t* from =
      run.words + static_cast<int64_t>(unit / 4) * blocks * (1024 * bits) + threadIdx.x % 32 * 128;
  const int bytes = min(blocks, 2) * 1024 * bits;
  for (int i = 0; i < bytes; i += 4096) {
    if (i + static_cast<int>(threadIdx.x % 32) * 128 < bytes) {
      asm volatile("prefetch.global.L2 [%0];" ::"l"(from + i));
    }
  }
}

// The parts of x that a CTA has room for: as if its ranges were all as wide as any.
__host__ __device__ __forceinline__ int parts_of(const Tiling& t, int blocks) {
  const int widest = t.inner * ((blocks + t.ranges - 1) / t.ranges);
  return (widest * 2 + kPartPieces - 1) / kPartPieces;
}

// Asks for the x of blocks [first, last), part by part.
template <int kTokens>
__device__ __forceinline__ void fetch_x(const CUtensorMap* map, const QuantRuns& w, bool whole, uint32_t x,
                                        uint32_t barriers, int first, int last) {
  int run = 0;
  for (int part = 0; part * kPartPieces < (last - first) * 2; ++part) {
    const uint32_t barrier = barriers + 8 * part;
    barrier_arrive_expecting(barrier, kPartPieces * kTokens * kRowBytes);
    const uint32_t to = x + part * kPartPieces * kTokens * kRowBytes;
    if (whole) {
      copy_box(to, map, 0, 0, first * 2 + part * kPartPieces, barrier);
      continue;
    }
    for (int i = 0; i < kPartPieces; ++i) {
      const int block = first + (part * kPartPieces + i) / 2;
      while (run + 1 < w.count && block >= w.run[run + 1].first_block) ++run;
      const int column = w.run[run].x_column + (block - w.run[run].first_block) * kBlock + i % 2 * kPiece;
      copy_box(to + i * kTokens * kRowBytes, map, column, 0, 0, barrier);
    }
  }
}

// Adds bias and residual to a warp's sums and stores them.
template <typename T, int kTokens>
__device__ __forceinline__ void finish(const RunsMatmulParams& p, int rows, int unit,
                                       const float (&total)[kTokens / 8][4]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int feature = unit * 16 + lane / 4 + 8 * h;
    if (feature >= rows) continue;
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

// Calls f.template operator()<kCodes>() with the kind of codes, one of those that the kernel has.
template <Codes kFirst, Codes... kRest, typename F>
__device__ __forceinline__ void by_codes(int codes, F&& f) {
  if constexpr (sizeof...(kRest) == 0) {
    f.template operator()<kFirst>();
  } else if (codes == static_cast<int>(kFirst)) {
    f.template operator()<kFirst>();
  } else {
    by_codes<kRest...>(codes, static_cast<F&&>(f));
  }
}

template <typename T, Format kFormat, int kTokens, int kSteps, Codes... kKinds>
__global__ void __launch_bounds__(kMaxWarps * 32, 1)
    runs_kernel(const __grid_constant__ CUtensorMap x_map, const __grid_constant__ RunsMatmulParams p,
                const __grid_constant__ QuantRuns w, const __grid_constant__ Tiling t) {
  extern __shared__ __align__(1024) uint8_t shared[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int rank = blockIdx.x % t.outer, cluster = blockIdx.x / t.outer;
  const int of_cta = warp / t.inner, range = rank * t.inner + warp % t.inner;
  const auto border = [&](int of) { return w.blocks * of / t.ranges; };
  const int first = border(range), last = border(range + 1);
  const int cta_first = border(rank * t.inner), cta_last = border((rank + 1) * t.inner);
  const uint32_t barriers = shared_address(shared), table = barriers + kHeaderBytes;
  const uint32_t x = table + (t.has_table ? kTableBytes : 0);
  const uint32_t told = barriers + 8 * (kMaxParts + of_cta);  // of this unit's sums of other ranges
  // The same in all CTAs of the cluster.
  const int parts = parts_of(t, w.blocks);
  const uint32_t sums = x + parts * kPartPieces * kTokens * kRowBytes;

  let_next_start();
  bool is_ready = false;
  const auto prepare = [&] {
    if (is_ready) return;
    is_ready = true;
    if (threadIdx.x == 0) {
      prefetch_map(&x_map);
      for (int i = 0; i < parts; ++i) barrier_init(barriers + 8 * i, 1);
      for (int i = 0; i < t.units_each; ++i) barrier_init(barriers + 8 * (kMaxParts + i), t.inner);
      barrier_init_done();
    }
    if (t.has_table) fill_table(table, t.table);
    __syncthreads();
    wait_for_previous();
    if (threadIdx.x == 0) fetch_x<kTokens>(&x_map, w, t.whole, x, barriers, cta_first, cta_last);
    if (t.outer > 1) meet_cluster();
  };

  for (int base = cluster * t.units_each; base < t.units; base += t.clusters * t.units_each) {
    const int unit = base + of_cta;
    if (unit >= t.units) {
      prepare();
      continue;
    }
    float total[kTokens / 8][4] = {};
    for (int i = 0; i < w.count; ++i) {
      const QuantRun& run = w.run[i];
      const int next = i + 1 < w.count ? w.run[i + 1].first_block : w.blocks;
      const int from = max(first, run.first_block), to = min(last, next);
      if (from >= to) continue;
      const uint32_t at = x + (from - cta_first) * 2 * kTokens * kRowBytes;
      by_codes<kKinds...>(run.codes, [&]<Codes kCodes>() {
        Walk<T, kCodes, kFormat, kTokens, kSteps> walk{
            .run = run, .scaling = w.scaling, .all_scale = t.scale};
        walk.begin(unit, from - run.first_block, to - run.first_block);
        prepare();
        if (next < last) prefetch_run(w.run[i + 1], unit, w.run[i + 1].codes);
        walk.walk(from - run.first_block, unit % 4, at, table, total, [&](int block) {
          const int piece = (from - cta_first + block) * 2;
          if (block == 0 || piece % kPartPieces == 0) barrier_wait(barriers + 8 * (piece / kPartPieces), 0);
        });
      });
    }
    const auto place = [&](int of, int j) {
      return sums + (((of - 1) * t.units_each + of_cta) * kTokens / 8 + j) * 512 + lane * 16;
    };
    if (rank > 0) {
#pragma unroll
      for (int j = 0; j < kTokens / 8; ++j) send_first_rank(place(range, j), total[j], told);
      continue;
    }
    if (range > 0) {
#pragma unroll
      for (int j = 0; j < kTokens / 8; ++j) {
        asm volatile("st.shared.v4.f32 [%4], {%0, %1, %2, %3};" ::"f"(total[j][0]), "f"(total[j][1]),
                     "f"(total[j][2]), "f"(total[j][3]), "r"(place(range, j))
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
          for (int e = 0; e < 4; ++e) total[j][e] += more[e];
        }
      }
    }
    finish<T, kTokens>(p, w.rows, unit, total);
  }
}

// ---- host ----

constexpr int kSharedBytes = 224 * 1024;
constexpr int kRangePieces = 80;      // of x of 16 tokens that fit beside a table
constexpr int kWideRangePieces = 64;  // and beside sums

// Ranges of columns: as many as give each SM of a large GPU 12 warps of 16 rows, and as let 16 tokens' x fit.
// An even number, or one, so that clusters of two share them. They follow from the shape alone, since bits
// depend on them.
inline int ranges_for(int rows, int pieces) {
  const int units = (rows + 15) / 16;
  const int fit = pieces <= kRangePieces ? 1 : (pieces + kWideRangePieces - 1) / kWideRangePieces;
  const int wanted = max(min(1536 / units, pieces / 16), fit);
  return wanted <= 1 ? 1 : min(kMaxRanges, (wanted + 1) / 2 * 2);
}

// Spreads ranges and units over clusters of two CTAs, or as few more as have room for x, in one round.
// Clusters lie within a GPC, whose SMs larger ones seldom use up: an eighth is left free, or some came in a
// second round.
template <int kTokens>
bool spread(Tiling& t, int blocks, int sms, int least, int* shared_bytes) {
  for (t.outer = min(least, t.ranges); t.outer <= t.ranges; ++t.outer) {
    if (t.ranges % t.outer != 0) continue;
    t.inner = t.ranges / t.outer;
    if (t.inner > kMaxWarps) continue;
    const int parts = parts_of(t, blocks), most = t.outer <= 2 ? sms / t.outer : sms * 7 / 8 / t.outer;
    const auto bytes = [&] {
      return kHeaderBytes + (t.has_table ? kTableBytes : 0) + parts * kPartPieces * kTokens * kRowBytes +
             (t.ranges - 1) * t.units_each * kTokens * 64;
    };
    t.units_each = max(1, min(kMaxWarps / t.inner, (t.units + most - 1) / most));
    while (t.inner == 1 && t.units_each > 1 && bytes() > kSharedBytes) t.units_each = (t.units_each + 1) / 2;
    *shared_bytes = bytes();
    if (parts <= kMaxParts && *shared_bytes <= kSharedBytes) break;
  }
  if (t.outer > t.ranges) return false;
  t.clusters = (t.units + t.units_each - 1) / t.units_each;
  if (t.ranges == 1) t.clusters = min(sms, t.clusters);  // they go on with the next tile, and keep x
  return true;
}

template <typename T, Format kFormat, int kTokens, int kSteps, Codes... kKinds>
cudaError_t launch_runs(const RunsMatmulParams& p, const QuantRuns& w, int sms, cudaStream_t stream) {
  Tiling t{};
  t.whole = w.columns % kPiece == 0;
  for (int i = 0; i < w.count; ++i) {
    t.whole = t.whole && w.run[i].x_column == w.run[i].first_block * kBlock;
    t.has_table = t.has_table || w.run[i].codes == static_cast<int>(Codes::table);
  }
  if (t.has_table) {
    for (int i = 0; i < 16; ++i) {
      const T number = T(w.table[i] * w.table_scale);
      memcpy(&t.table[i], &number, sizeof(number));
    }
  }
  t.scale = t.has_table ? 1.0f / w.table_scale : 1.0f;
  t.units = (w.rows + kStrip - 1) / kStrip * 4;
  t.ranges = p.ranges > 0 ? p.ranges : ranges_for(w.rows, w.blocks * 2);
  int shared_bytes = 0;
  if (!spread<kTokens>(t, w.blocks, sms, p.least_ctas > 0 ? p.least_ctas : 2, &shared_bytes))
    return cudaErrorInvalidValue;
  CUtensorMap x_map;
  const cuuint64_t sizes[3] = {static_cast<cuuint64_t>(t.whole ? kPiece : w.columns),
                               static_cast<cuuint64_t>(p.tokens),
                               static_cast<cuuint64_t>(t.whole ? w.columns / kPiece : 1)};
  const cuuint64_t strides[2] = {static_cast<cuuint64_t>(p.x_stride) * 2, kRowBytes};
  const cuuint32_t box[3] = {kPiece, kTokens, static_cast<cuuint32_t>(t.whole ? kPartPieces : 1)};
  if (!encode_swizzled_map(&x_map, __is_same(T, __half), p.x, sizes, strides, box))
    return cudaErrorInvalidValue;
  const auto kernel = runs_kernel<T, kFormat, kTokens, kSteps, kKinds...>;
  if (const cudaError_t error =
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes)) {
    return error;
  }
  const dim3 grid(static_cast<unsigned>(t.clusters * t.outer));
  return launch_clusters(kernel, grid, t.outer, t.units_each * t.inner * 32, shared_bytes, stream, x_map, p,
                         w, t);
}

// The columns that share a scale in every run: 16, 32, 64 or 128. A last run of one group has it all.
inline int common_columns(const QuantRuns& w) {
  int columns = kBlock;
  for (int i = 0; i < w.count; ++i) {
    while (w.run[i].group_size % columns != 0) columns /= 2;
  }
  return columns;
}

// Which chunks there are, by format: what checkpoints have often is made for it, the rest takes 16 columns.
template <typename T, int kTokens>
cudaError_t by_format(const RunsMatmulParams& p, const QuantRuns& w, int sms, cudaStream_t stream) {
  using enum Codes;
  const int columns = common_columns(w), codes = w.run[0].codes;
  if (w.scaling <= Scaling::brain) {
    constexpr auto kBrief = Format::brief;
    if (columns >= 128) return launch_runs<T, kBrief, kTokens, 8, i2, i3, i4, i5, i6, i8>(p, w, sms, stream);
    if (columns >= 64) return launch_runs<T, kBrief, kTokens, 4, i2, i3, i4, i5, i6, i8>(p, w, sms, stream);
    if (columns >= 32) return launch_runs<T, kBrief, kTokens, 2, i2, i3, i4, i5, i6, i8>(p, w, sms, stream);
    return cudaErrorInvalidValue;
  }
  if (w.scaling <= Scaling::brain_zeros) {
    if (columns < 32) return cudaErrorInvalidValue;
    return launch_runs<T, Format::zeros, kTokens, 2, i2, i3, i4, i5, i6, i8>(p, w, sms, stream);
  }
  if (w.count != 1) return cudaErrorInvalidValue;
  if (w.scaling == Scaling::single) {
    constexpr auto kSingle = Format::single;
    const bool is_byte = codes == static_cast<int>(i8) || codes == static_cast<int>(e4m3);
    if (codes == static_cast<int>(table) && columns >= 64)
      return launch_runs<T, kSingle, kTokens, 4, table>(p, w, sms, stream);
    if (codes == static_cast<int>(table) && columns >= 32)
      return launch_runs<T, kSingle, kTokens, 2, table>(p, w, sms, stream);
    if (is_byte && columns >= 128) return launch_runs<T, kSingle, kTokens, 8, i8, e4m3>(p, w, sms, stream);
    return launch_runs<T, kSingle, kTokens, 1, i2, i3, i4, i5, i6, i8, table, e4m3>(p, w, sms, stream);
  }
  constexpr auto kTwo = Format::two;
  const bool is_common = codes == static_cast<int>(i4) || codes == static_cast<int>(i5);
  if (is_common && columns >= 32) return launch_runs<T, kTwo, kTokens, 2, i4, i5>(p, w, sms, stream);
  return launch_runs<T, kTwo, kTokens, 1, i2, i3, i4, i5, i6, i8>(p, w, sms, stream);
}

template <typename T>
cudaError_t runs_matmul_of(const RunsMatmulParams& params, const QuantRuns& w, int sms, cudaStream_t stream) {
  // 16 tokens' x of a range fills shared memory where columns are many.
  const int slab = w.blocks * 2 > kRangePieces * kMaxRanges ? 8 : 16;
  for (int first = 0; first < params.tokens; first += slab) {
    RunsMatmulParams p = params;
    p.tokens = min(slab, params.tokens - first);
    p.x = static_cast<const T*>(params.x) + first * params.x_stride;
    p.out = static_cast<T*>(params.out) + first * params.out_stride;
    if (params.residual != nullptr)
      p.residual = static_cast<const T*>(params.residual) + first * params.residual_stride;
    const cudaError_t error =
        by_at_least<8, 16>(p.tokens, [&]<int kTokens>() { return by_format<T, kTokens>(p, w, sms, stream); });
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace tgi::runs
