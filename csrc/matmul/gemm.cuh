// Dense matrix product for Hopper: y = x · weightᵀ for many tokens, K walked in order. docs/kernels/gemm.md.
//
// One fp32 accumulator an output takes the k16 steps in ascending order, whatever the tile, so a token's bits
// depend on its own row alone, and are those of the skinny product (sm90.cu).
//
//   a thread for weights:    | wait slot → copy | …
//   a thread for x:          | wait for the previous kernel | wait slot → copy | …
//   each warpgroup:          | wait slot → 64 tokens × columns, k16 by k16 → free the slot before | … | stage
//   | a warp for each of them: | wait staged → residual or gate → memory → free the stage | …
//
// Two CTAs of a cluster, where there are such, lie side by side along tokens: each brings half of the weights
// to both.
#pragma once

#include "activation/gated.cuh"
#include "common/hopper.cuh"
#include "common/mma.cuh"
#include "common/pdl.cuh"
#include "common/tensor_map.h"
#include "common/wgmma.cuh"
#include "matmul/cuda.h"

namespace tgi::gemm {

// ---- device ----

constexpr int kChunk = 64;  // elements of K in a swizzled row of 128 bytes
constexpr int kRowBytes = 128;
constexpr int kMaxStages = 16;
constexpr int kHeaderBytes = 1024;  // the barriers; keeps what follows on the swizzle's 1024 bytes

constexpr int kWarpRows = 16;  // tokens of a tile that one warp sums

// How one launch cuts its work.
struct Schedule {
  int peers;        // CTAs of a cluster: 1, or 2 along tokens
  int token_tiles;  // of clusters
  int feature_tiles;
  int band;      // tiles of tokens that are visited for each of the features before the next band
  int steps;     // stages that cover K
  int x_rows;    // of a box
  bool aligned;  // out and residual: 16 bytes everywhere
};

template <int kWarpgroups, int kColumns>
struct Shape {
  static constexpr int kTokens = 64 * kWarpgroups;
  static constexpr int kThreads = 128 * (kWarpgroups + 1);
  // Chunks of a stage: a small tile's products take less time than handing over a stage does.
  static constexpr int kChunks = kWarpgroups * kColumns <= 128 ? 2 : 1;
  static constexpr int kXChunk = kTokens * kRowBytes, kWeightChunk = kColumns * kRowBytes;  // bytes
  static constexpr int kStageBytes = kChunks * (kXChunk + kWeightChunk);
  // Results leave through shared memory; 16 bytes between rows keep both sides free of bank conflicts.
  static constexpr int kStagedRow = kColumns * 2 + 16;
  static constexpr int kStagedBytes = kTokens * kStagedRow;
  static constexpr int kSharedBytes = 227 * 1024;
  static constexpr int kFitting = (kSharedBytes - kHeaderBytes - kStagedBytes) / kStageBytes;
  static constexpr int kStages = kFitting < kMaxStages ? kFitting : kMaxStages;
  static constexpr int kUsedBytes = kHeaderBytes + kStages * kStageBytes + kStagedBytes;
};

// Where a CTA's tile begins. The last ones reach back into their neighbours where that keeps them inside the
// matrix, for the copy engine is slow outside: `first_token` and `first_feature` are the first of their own.
struct Place {
  int token, feature, first_token, first_feature;

  __device__ __forceinline__ Place(const Schedule& s, int rank, int tile, int tile_tokens, int tokens,
                                   int tile_features, int features) {
    const int band_tiles = s.band * s.feature_tiles, of_band = tile / band_tiles * s.band;
    const int in_band = tile % band_tiles, rows = min(s.band, s.token_tiles - of_band);
    first_token = ((of_band + in_band % rows) * s.peers + rank) * tile_tokens;
    first_feature = in_band / rows * tile_features;
    token = min(first_token, max(tokens - tile_tokens, 0));
    feature = min(first_feature, max((features + 7) / 8 * 8 - tile_features, 0));  // whole vectors
  }
};

// The tiles of one cluster: first, first + step, … below end.
struct Tiles {
  int first, step, end;
};

// The ring in shared memory: barriers of each slot, then slots of x, then of weights.
struct Ring {
  uint32_t full, empty, x, weights;  // addresses of slot 0
};

// A place in the ring, moving with the stages.
template <int kStages>
struct Cursor {
  int slot = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void advance() {
    if (++slot < kStages) return;
    slot = 0;
    parity ^= 1;
  }
};

// What one thread brings into the ring: rows of a matrix, or this CTA's half of rows that are shared.
template <int kStages, int kChunks, int kChunkBytes>
struct Stream {
  const CUtensorMap* map;
  uint32_t to;      // in slot 0
  int chunk_bytes;  // that arrive; kChunkBytes have room
  bool shared;
  int first, up;  // rows from the tile's first to the box's, and on to those of a second box unless 0

  // The thread is alone: every instruction of a stage costs it several clocks.
  template <typename RowOf>
  __device__ __forceinline__ void run(int steps, const Ring& ring, Tiles tiles, RowOf row_of) const {
    const auto copy = [&](uint32_t at, int column, int row, uint32_t barrier) {
      if (shared) {
        copy_box_to(3, at, map, column, row, 0, barrier);
      } else {
        copy_box(at, map, column, row, 0, barrier);
      }
    };
    Cursor<kStages> at;
    at.parity = 1;  // the ring is empty at first
#pragma unroll 1
    for (int tile = tiles.first; tile < tiles.end; tile += tiles.step) {
      const int row = row_of(tile) + first;
      int column = 0;
#pragma unroll 1
      for (int step = 0; step < steps; ++step, at.advance()) {
        const uint32_t barrier = ring.full + 8 * at.slot, slot = to + at.slot * (kChunks * kChunkBytes);
        barrier_wait(ring.empty + 8 * at.slot, at.parity);
        barrier_arrive_expecting(barrier, kChunks * chunk_bytes);
#pragma unroll
        for (int chunk = 0; chunk < kChunks; ++chunk, column += kChunk) {
          copy(slot + chunk * kChunkBytes, column, row, barrier);
          if (up != 0) copy(slot + chunk * kChunkBytes + kChunkBytes / 2, column, row + up, barrier);
        }
      }
    }
  }
};

// What follows the sums of one warp's 16 tokens: bias, residual or gate, each step rounded as the separate
// ops would round it.
template <typename T, int kColumns>
struct Epilogue {
  static constexpr int kStagedRow = Shape<1, kColumns>::kStagedRow;
  const MatmulParams& p;
  bool aligned;
  int lane, features;

  __device__ __forceinline__ bool is_own(Place at, int token, int feature) const {
    return token >= at.first_token && token < p.tokens && feature >= at.first_feature && feature < features;
  }

  // Brings the residual near, long before its turn.
  __device__ __forceinline__ void prefetch(Place at) const {
    if (p.residual == nullptr) return;
    for (int i = lane; i < kWarpRows * (kColumns / 64 + 1); i += 32) {
      const int token = at.token + i % kWarpRows, feature = at.feature + i / kWarpRows * 64;
      if (token < p.tokens && feature < features)
        asm volatile("prefetch.global.L2 [%0];" ::"l"(residual(token) + feature));
    }
  }

  // The sums with bias, rounded, to shared memory.
  __device__ __forceinline__ void stage(uint8_t* staged, Place at, const float (&d)[kColumns / 2]) const {
    const int first = lane % 4 * 2;
    uint8_t* to = staged + lane / 4 * kStagedRow + first * 2;
#pragma unroll
    for (int j = 0; j < kColumns / 8; ++j) {
      float add[2] = {};
      if (p.bias != nullptr) {
        const bool is_up = p.is_gated && j >= kColumns / 16;
        const int row = at.feature + first + 8 * j + (is_up ? features - kColumns / 2 : 0);
        add[0] = bias(row), add[1] = bias(row + 1);
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        *reinterpret_cast<uint32_t*>(to + 8 * i * kStagedRow + 16 * j) =
            pack<T>(d[4 * j + 2 * i] + add[0], d[4 * j + 2 * i + 1] + add[1]);
      }
    }
  }

  // From shared memory to the end.
  __device__ __forceinline__ void finish(const uint8_t* staged, Place at) const {
    if (p.is_gated) {
      finish_gated(staged, at);
    } else if (!aligned) {
      finish_elements(staged, at);
    } else if (p.residual != nullptr) {
      finish_vectors<true>(staged, at);
    } else {
      finish_vectors<false>(staged, at);
    }
  }

  template <bool kAdds>
  __device__ __forceinline__ void finish_vectors(const uint8_t* staged, Place at) const {
    constexpr int kRowVecs = kColumns / 8, kLaneVecs = kWarpRows * kRowVecs / 32;
    constexpr int kBatch = kLaneVecs % 4 == 0 ? 4 : kLaneVecs % 3 == 0 ? 3 : 2;  // under way at once
#pragma unroll 1
    for (int i = 0; i < kLaneVecs; i += kBatch) {
      Vec<T> sums[kBatch], before[kBatch];
      int row[kBatch], column[kBatch];
      bool valid[kBatch];
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        row[b] = ((i + b) * 32 + lane) / kRowVecs;
        column[b] = ((i + b) * 32 + lane) % kRowVecs * 8;
        valid[b] = is_own(at, at.token + row[b], at.feature + column[b]);
        sums[b] = staged_at(staged, row[b], column[b]);
        if (kAdds && valid[b])
          before[b] = load_streaming(residual(at.token + row[b]) + at.feature + column[b]);
      }
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        if (!valid[b]) continue;
        if (kAdds) {
          float y[8];
#pragma unroll
          for (int e = 0; e < 8; ++e) y[e] = element(before[b], e) + element(sums[b], e);
          sums[b] = pack<T>(y);
        }
        store(out(at.token + row[b]) + at.feature + column[b], sums[b]);
      }
    }
  }

  __device__ __forceinline__ void finish_elements(const uint8_t* staged, Place at) const {
    for (int i = lane; i < kWarpRows * kColumns; i += 32) {
      const int token = at.token + i / kColumns, column = i % kColumns, feature = at.feature + column;
      if (!is_own(at, token, feature)) continue;
      const T sum = *reinterpret_cast<const T*>(staged + i / kColumns * kStagedRow + column * 2);
      const float before = p.residual == nullptr ? 0.0f : to_float(residual(token)[feature]);
      out(token)[feature] = from_float<T>(before + to_float(sum));
    }
  }

  // Half of the columns are of the gate, half of what it gates.
  __device__ __forceinline__ void finish_gated(const uint8_t* staged, Place at) const {
    constexpr int kRowVecs = kColumns / 16;
#pragma unroll 1  // the activations are long
    for (int i = lane; i < kWarpRows * kRowVecs; i += 32) {
      const int token = at.token + i / kRowVecs, column = i % kRowVecs * 8;
      if (!is_own(at, token, at.feature + column)) continue;
      const auto gate = staged_at(staged, i / kRowVecs, column);
      const auto up = staged_at(staged, i / kRowVecs, kColumns / 2 + column);
      float y[8];
#pragma unroll
      for (int e = 0; e < 8; ++e) y[e] = gated<T>(p.activation, element(gate, e), element(up, e));
      store_row(out(token), at.feature + column, features, aligned, y);
    }
  }

  __device__ __forceinline__ Vec<T> staged_at(const uint8_t* staged, int row, int column) const {
    return *reinterpret_cast<const Vec<T>*>(staged + row * kStagedRow + column * 2);
  }
  __device__ __forceinline__ float bias(int row) const {
    return row < p.out_features ? to_float(static_cast<const T*>(p.bias)[row]) : 0.0f;
  }
  __device__ __forceinline__ const T* residual(int token) const {
    return static_cast<const T*>(p.residual) + token * p.residual_stride;
  }
  __device__ __forceinline__ T* out(int token) const { return static_cast<T*>(p.out) + token * p.out_stride; }
};

// Barriers between a warpgroup that stages its sums and the warp that finishes them: 160 threads.
__device__ __forceinline__ void wait_named(int id) { asm volatile("bar.sync %0, 160;" ::"r"(id) : "memory"); }
__device__ __forceinline__ void arrive_named(int id) {
  asm volatile("bar.arrive %0, 160;" ::"r"(id) : "memory");
}
constexpr int kStagedBarrier = 1, kFreeBarrier = 3;  // and the next, for the second warpgroup

// Frees a slot of every CTA of the cluster: each brings something into both.
__device__ __forceinline__ void release(uint32_t barrier, int peers, int lane) {
  __syncwarp();
  if (lane < peers) barrier_arrive_at(barrier, lane);
}

template <typename T, int kWarpgroups, int kColumns>
struct Roles {
  using S = Shape<kWarpgroups, kColumns>;
  const MatmulParams& p;
  const Schedule& s;
  const Ring& ring;
  Tiles tiles;
  int rank, features;

  __device__ __forceinline__ Place place(int tile) const {
    return Place(s, rank, tile, S::kTokens, p.tokens, p.is_gated ? kColumns / 2 : kColumns, features);
  }

  // Weights are older than this step: the first ring of them travels while the previous kernel ends. A gate's
  // tile is kColumns / 2 gate rows, then the up rows that they gate: two boxes, or one from each peer.
  __device__ __forceinline__ void bring_weights(const CUtensorMap* map) const {
    const bool shared = s.peers > 1;
    const int up = p.is_gated ? features : 0, half = rank * kColumns / 2;  // rank is 0 unless shared
    const Stream<S::kStages, S::kChunks, S::kWeightChunk> weights{
        .map = map,
        .to = ring.weights + half * kRowBytes,
        .chunk_bytes = S::kWeightChunk,
        .shared = shared,
        .first = p.is_gated ? rank * up : half,
        .up = shared ? 0 : up,
    };
    weights.run(s.steps, ring, tiles, [&](int tile) { return place(tile).feature; });
    wait_for_previous();
  }

  __device__ __forceinline__ void bring_x(const CUtensorMap* map) const {
    const Stream<S::kStages, S::kChunks, S::kXChunk> x{
        .map = map, .to = ring.x, .chunk_bytes = s.x_rows * kRowBytes, .shared = false, .first = 0, .up = 0};
    wait_for_previous();
    x.run(s.steps, ring, tiles, [&](int tile) { return place(tile).token; });
  }

  __device__ __forceinline__ Epilogue<T, kColumns> epilogue() const {
    return {p, s.aligned, static_cast<int>(threadIdx.x) % 32, features};
  }

  // All of a CTA's tiles but the last are finished by other warps, under the products of the next.
  __device__ __forceinline__ void finish(const uint8_t* staged, int warpgroup) const {
    wait_for_previous();
    for (int tile = tiles.first; tile + tiles.step < tiles.end; tile += tiles.step) {
      wait_named(kStagedBarrier + warpgroup);
#pragma unroll 1
      for (int row = warpgroup * 64; row < warpgroup * 64 + 64; row += kWarpRows) {
        Place here = place(tile);
        here.token += row;
        epilogue().finish(staged + row * S::kStagedRow, here);
      }
      arrive_named(kFreeBarrier + warpgroup);
    }
  }

  __device__ __forceinline__ void multiply(uint8_t* staged) const {
    // From lane 0, so that the compiler sees a warp's operands alike.
    const int warp = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 32 - 4, 0), warpgroup = warp / 4;
    const int lane = threadIdx.x % 32;
    staged += warp * kWarpRows * S::kStagedRow;
    const auto end = epilogue();
    wait_for_previous();
    const uint64_t first_x = swizzled_operand(ring.x + warpgroup * 64 * kRowBytes);
    const uint64_t first_weights = swizzled_operand(ring.weights);
    Cursor<S::kStages> at;
    float d[kColumns / 2];
#pragma unroll 1
    for (int tile = tiles.first; tile < tiles.end; tile += tiles.step) {
      Place here = place(tile);
      here.token += warp * kWarpRows;
      end.prefetch(here);
      uint32_t done = 0;
#pragma unroll 1
      for (int step = 0; step < s.steps; ++step) {
        const uint64_t x = first_x + at.slot * operand_step(S::kChunks * S::kXChunk);
        const uint64_t weights = first_weights + at.slot * operand_step(S::kChunks * S::kWeightChunk);
        barrier_wait(ring.full + 8 * at.slot, at.parity);
        products_hold(d);
        products_begin();
#pragma unroll
        for (int k = 0; k < S::kChunks * kChunk; k += 16) {
          const int chunk = k / kChunk, in_chunk = k % kChunk * 2;  // the latter in bytes
          warpgroup_mma<T>(d, x + operand_step(chunk * S::kXChunk + in_chunk),
                           weights + operand_step(chunk * S::kWeightChunk + in_chunk), step > 0 || k > 0);
        }
        products_commit();
        products_wait<1>();
        if (step > 0) release(done, s.peers, lane);
        done = ring.empty + 8 * at.slot;
        at.advance();
      }
      products_wait<0>();
      products_hold(d);
      release(done, s.peers, lane);
      if (tile != tiles.first) wait_named(kFreeBarrier + warpgroup);
      end.stage(staged, here, d);
      if (tile + tiles.step < tiles.end) {
        arrive_named(kStagedBarrier + warpgroup);
      } else {
        __syncwarp();
        end.finish(staged, here);
      }
    }
  }
};

template <typename T, int kWarpgroups, int kColumns>
__global__ void __launch_bounds__(Shape<kWarpgroups, kColumns>::kThreads, 1)
    gemm_kernel(const __grid_constant__ CUtensorMap x_map, const __grid_constant__ CUtensorMap weight_map,
                const __grid_constant__ MatmulParams p, const __grid_constant__ Schedule s) {
  using S = Shape<kWarpgroups, kColumns>;
  extern __shared__ __align__(1024) uint8_t shared[];
  const uint32_t base = shared_address(shared), slots = base + kHeaderBytes;
  const Ring ring{base, base + 8 * kMaxStages, slots, slots + S::kStages * S::kChunks * S::kXChunk};
  const Tiles tiles{static_cast<int>(blockIdx.x) / s.peers, static_cast<int>(gridDim.x) / s.peers,
                    s.token_tiles * s.feature_tiles};
  const Roles<T, kWarpgroups, kColumns> roles{
      p, s, ring, tiles, static_cast<int>(cluster_rank()), p.is_gated ? p.out_features / 2 : p.out_features};

  let_next_start();
  if (threadIdx.x == 0) {
    prefetch_map(&x_map);
    prefetch_map(&weight_map);
    for (int slot = 0; slot < S::kStages; ++slot) {
      barrier_init(ring.full + 8 * slot, 2);  // the threads that bring x and weights
      barrier_init(ring.empty + 8 * slot, 4 * kWarpgroups * s.peers);
    }
    barrier_init_done();
  }
  __syncthreads();
  if (s.peers > 1) sync_cluster();
  uint8_t* staged = shared + kHeaderBytes + S::kStages * S::kStageBytes;
  if (threadIdx.x < 128) {
    if constexpr (kWarpgroups > 1) asm volatile("setmaxnreg.dec.sync.aligned.u32 72;");
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (warp == 0 && lane == 0) {
      roles.bring_weights(&weight_map);
    } else if (warp == 1 && lane == 0) {
      roles.bring_x(&x_map);
    } else if (warp >= 2 && warp < 2 + kWarpgroups) {
      roles.finish(staged, warp - 2);
    } else {
      wait_for_previous();
    }
    __syncwarp();
  } else {
    if constexpr (kWarpgroups > 1) asm volatile("setmaxnreg.inc.sync.aligned.u32 216;");
    roles.multiply(staged);
  }
  // The peer may still arrive at this CTA's barriers.
  if (s.peers > 1) sync_cluster();
}

// ---- host ----

// A tile, and whether two CTAs share weights: clusters of four would leave 12 of 132 SMs empty. The choice
// (sm90_gemm.cu) does not change a bit of the result.
struct Choice {
  int warpgroups, columns, peers;
};

// Rows of K elements as boxes of `box_rows` rows of a chunk; what lies outside arrives as zeros.
template <typename T>
bool encode_rows(CUtensorMap* map, const void* data, int rows, int columns, int64_t stride, int box_rows) {
  const cuuint64_t sizes[3] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows), 1};
  const cuuint64_t row_bytes = static_cast<cuuint64_t>(stride) * 2,
                   strides[2] = {row_bytes, row_bytes * rows};
  const cuuint32_t box[3] = {kChunk, static_cast<cuuint32_t>(box_rows), 1};
  return encode_swizzled_map(map, __is_same(T, __half), data, sizes, strides, box);
}

inline bool in_vectors(const void* data, int64_t stride) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride % 8 == 0;
}

constexpr int tiles_of(int size, int tile) { return (size + tile - 1) / tile; }

template <typename T, int kWarpgroups, int kColumns>
cudaError_t launch_shape(const MatmulParams& p, const Choice& c, int sms, cudaStream_t stream) {
  using S = Shape<kWarpgroups, kColumns>;
  const int features = p.is_gated ? p.out_features / 2 : p.out_features;
  const int tile_features = p.is_gated ? kColumns / 2 : kColumns;
  Schedule s{};
  s.peers = c.peers;
  s.token_tiles = tiles_of(p.tokens, S::kTokens * c.peers);
  s.feature_tiles = tiles_of(features, tile_features);
  s.band = tiles_of(2048, S::kTokens * c.peers);
  s.steps = tiles_of(p.in_features, S::kChunks * kChunk);
  s.x_rows = p.tokens < S::kTokens ? p.tokens : S::kTokens;
  s.aligned = features % 8 == 0 && in_vectors(p.out, p.out_stride) &&
              (p.residual == nullptr || in_vectors(p.residual, p.residual_stride));

  CUtensorMap x_map, weight_map;
  const int pieces = p.is_gated || c.peers > 1 ? 2 : 1;
  if (!encode_rows<T>(&x_map, p.x, p.tokens, p.in_features, p.x_stride, s.x_rows) ||
      !encode_rows<T>(&weight_map, p.weight, p.out_features, p.in_features, p.weight_stride,
                      kColumns / pieces)) {
    return cudaErrorInvalidValue;
  }
  const auto kernel = gemm_kernel<T, kWarpgroups, kColumns>;
  if (const cudaError_t error =
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, S::kUsedBytes)) {
    return error;
  }
  const int tiles = s.token_tiles * s.feature_tiles, room = sms / c.peers;
  const dim3 grid(static_cast<unsigned>((tiles < room ? tiles : room) * c.peers));
  return launch_clusters(kernel, grid, c.peers, S::kThreads, S::kUsedBytes, stream, x_map, weight_map, p, s);
}

// Compiled once for each type (sm90_gemm_bf16.cu, sm90_gemm_f16.cu).
template <typename T>
cudaError_t launch_choice(const MatmulParams& p, const Choice& c, int sms, cudaStream_t stream) {
  switch (c.warpgroups * 1000 + c.columns) {
    case 1032:
      return launch_shape<T, 1, 32>(p, c, sms, stream);
    case 1064:
      return launch_shape<T, 1, 64>(p, c, sms, stream);
    case 1096:
      return launch_shape<T, 1, 96>(p, c, sms, stream);
    case 1128:
      return launch_shape<T, 1, 128>(p, c, sms, stream);
    case 1192:
      return launch_shape<T, 1, 192>(p, c, sms, stream);
    case 1224:
      return launch_shape<T, 1, 224>(p, c, sms, stream);
    case 2128:
      return launch_shape<T, 2, 128>(p, c, sms, stream);
    case 2160:
      return launch_shape<T, 2, 160>(p, c, sms, stream);
    case 2192:
      return launch_shape<T, 2, 192>(p, c, sms, stream);
    case 2224:
      return launch_shape<T, 2, 224>(p, c, sms, stream);
    case 2256:
      return launch_shape<T, 2, 256>(p, c, sms, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace tgi::gemm
