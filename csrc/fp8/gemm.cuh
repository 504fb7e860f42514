// Matrix product of e4m3 numbers for Hopper: y = x · weightᵀ with scales, K walked in order.
// docs/kernels/fp8_gemm.md.
//
// The tensor cores' sums of e4m3 keep some 14 bits, so they sum 128 columns and fp32 registers take over: one
// sum an output, chunk by chunk in ascending order, whatever the tile. A token's bits depend on its own row
// alone.
//
//   a thread for weights:    | wait slot → copy | …
//   a thread for x:          | wait for the previous kernel | wait slot → copy | …
//   each warpgroup:          | wait slot → 64 tokens × a part of the columns, one chunk → add to totals | … |
//   stage | a warp for each of them: | wait staged → residual or gate → memory → free the stage | …
#pragma once

#include "activation/gated.cuh"
#include "common/hopper.cuh"
#include "common/mma.cuh"
#include "common/pdl.cuh"
#include "common/tensor_map.h"
#include "common/wgmma.cuh"
#include "fp8/cuda.h"

namespace tgi::fp8 {

// ---- device ----

constexpr int kChunk = kFp8Block;  // elements of K, and bytes, in a swizzled row
constexpr int kMaxStages = 16;
constexpr int kHeaderBytes = 1024;  // the barriers; keeps what follows on the swizzle's 1024 bytes
constexpr int kWarpRows = 16;       // tokens of a tile that one warp sums
constexpr int kScaleGroup = 4;      // chunks whose scales travel together: 16 bytes of a row

// How one launch cuts its work.
struct Schedule {
  int token_tiles, feature_tiles;
  int band;      // tiles of tokens that are visited for each of the features before the next band
  int chunks;    // that cover K
  int x_rows;    // of a box
  bool aligned;  // out and residual: 16 bytes everywhere
};

// A tile of kWarpgroups · 64 tokens. kChunks: of a stage. kXRows: tokens that have room in the ring; of fewer
// than 64 the products read what follows as well, for rows that nobody asks for. kBlocks: there is a scale
// for each block of 128 columns, which come with the stages.
template <bool kBlocks_, int kWarpgroups_, int kColumns_, int kChunks_, int kXRows_ = 64 * kWarpgroups_>
struct Tile {
  static constexpr bool kBlocks = kBlocks_;
  static constexpr int kWarpgroups = kWarpgroups_, kColumns = kColumns_, kChunks = kChunks_;
  static constexpr int kTokens = 64 * kWarpgroups, kXRows = kXRows_;
  static constexpr int kThreads = 128 * (kWarpgroups + 1);
  static constexpr int kXChunk = kXRows * kChunk, kWeightChunk = kColumns * kChunk;  // bytes
  // Scales of a group of chunks: of the tokens, and at its end of the weights, of gate and up.
  static constexpr int kScaleBytes = kBlocks ? kXRows * 16 + 128 : 0;
  static constexpr int kStageBytes = kChunks * (kXChunk + kWeightChunk) + kScaleBytes;
  // Scale and bias of each column, for each warpgroup, of a tile and the next.
  static constexpr int kColumnBytes = 2 * kWarpgroups * kColumns * static_cast<int>(sizeof(float2));
  // Results leave through shared memory; 16 bytes between rows keep both sides free of bank conflicts.
  static constexpr int kStagedRow = kColumns * 2 + 16, kStagedBytes = kTokens * kStagedRow;
  static constexpr int kSharedBytes = 227 * 1024;
  static constexpr int kFitting = (kSharedBytes - kHeaderBytes - kStagedBytes - kColumnBytes) / kStageBytes;
  static constexpr int kStages = kFitting < kMaxStages ? kFitting : kMaxStages;
  static constexpr int kUsedBytes = kHeaderBytes + kStages * kStageBytes + kStagedBytes + kColumnBytes;
};

// Where a tile begins. The last ones reach back into their neighbours where that keeps them inside the
// matrix, for the copy engine is slow outside: `first_token` and `first_feature` are the first of their own.
// Blocks have their scales at fixed columns, so no tile of theirs moves along features.
struct Place {
  int token, feature, first_token, first_feature;
};

// The ring in shared memory: barriers of each slot, then slots of x, of weights, and of groups of scales.
// There are as many of the last as stages: a group's successor in its slot is brought when all its stages are
// free.
struct Ring {
  uint32_t full, empty, x, weights;  // addresses of slot 0
  const uint8_t* scales;
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

// Barriers between a warpgroup that stages its sums and the warp that finishes them: 160 threads.
__device__ __forceinline__ void wait_named(int id) { asm volatile("bar.sync %0, 160;" ::"r"(id) : "memory"); }
__device__ __forceinline__ void arrive_named(int id) {
  asm volatile("bar.arrive %0, 160;" ::"r"(id) : "memory");
}
constexpr int kStagedBarrier = 1, kFreeBarrier = 3,
              kColumnBarrier = 5;  // and the next, for the second warpgroup

// What follows the sums of one warp's 16 tokens: bias, residual or gate, each step rounded as separate ops
// would round it.
template <typename T, int kColumns>
struct Epilogue {
  static constexpr int kStagedRow = kColumns * 2 + 16;
  const Fp8Params& p;
  bool aligned;
  int lane, features;

  __device__ __forceinline__ bool is_own(Place at, int token, int feature) const {
    return token >= at.first_token && token < p.tokens && feature >= at.first_feature && feature < features;
  }

  // Scale and bias of a tile's column.
  __device__ __forceinline__ float2 column_of(Place at, int column) const {
    const bool is_up = p.is_gated && column >= kColumns / 2;
    const int row = at.feature + column + (is_up ? features - kColumns / 2 : 0);
    if (row >= p.out_features) return {1.0f, 0.0f};
    return {p.in_blocks ? 1.0f : __ldg(p.weight_scales + row),
            p.bias == nullptr ? 0.0f : to_float(static_cast<const T*>(p.bias)[row])};
  }

  // Two sums of neighbouring columns for each of two tokens, scaled, with bias, rounded, to shared memory.
  __device__ __forceinline__ void stage(uint8_t* staged, const float2* columns, int column,
                                        const float (&d)[4], const float (&x_scale)[2]) const {
    const float4 both = *reinterpret_cast<const float4*>(columns + column);  // scale, bias; scale, bias
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      *reinterpret_cast<uint32_t*>(staged + (lane / 4 + 8 * i) * kStagedRow + 2 * column) = pack<T>(
          fmaf(d[2 * i], x_scale[i] * both.x, both.y), fmaf(d[2 * i + 1], x_scale[i] * both.z, both.w));
    }
  }

  // From shared memory to the end.
  __device__ __forceinline__ void finish(const uint8_t* staged, Place at) const {
    if (p.is_gated) {
      finish_gated(staged, at);
    } else if (aligned) {
      finish_vectors(staged, at);
    } else {
      finish_elements(staged, at);
    }
  }

  __device__ __forceinline__ void finish_vectors(const uint8_t* staged, Place at) const {
    constexpr int kRowVecs = kColumns / 8, kLaneVecs = kWarpRows * kRowVecs / 32;
    constexpr int kBatch = 2;  // under way at once
    const bool adds = p.residual != nullptr;
#pragma unroll 1
    for (int i = 0; i < kLaneVecs; i += kBatch) {
      Vec<T> sums[kBatch], before[kBatch];
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const int row = ((i + b) * 32 + lane) / kRowVecs, column = ((i + b) * 32 + lane) % kRowVecs * 8;
        sums[b] = staged_at(staged, row, column);
        if (adds && is_own(at, at.token + row, at.feature + column))
          before[b] = load_streaming(residual(at.token + row) + at.feature + column);
      }
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const int row = ((i + b) * 32 + lane) / kRowVecs, column = ((i + b) * 32 + lane) % kRowVecs * 8;
        if (!is_own(at, at.token + row, at.feature + column)) continue;
        if (adds) {
          float y[8];
#pragma unroll
          for (int e = 0; e < 8; ++e) y[e] = element(before[b], e) + element(sums[b], e);
          sums[b] = pack<T>(y);
        }
        store(out(at.token + row) + at.feature + column, sums[b]);
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
      float gates[8], ups[8], y[8];
#pragma unroll
      for (int e = 0; e < 8; ++e) gates[e] = element(gate, e), ups[e] = element(up, e);
      gated_all<T>(p.activation, gates, ups, y);
      store_row(out(token), at.feature + column, features, aligned, y);
    }
  }

  __device__ __forceinline__ Vec<T> staged_at(const uint8_t* staged, int row, int column) const {
    return *reinterpret_cast<const Vec<T>*>(staged + row * kStagedRow + column * 2);
  }
  __device__ __forceinline__ const T* residual(int token) const {
    return static_cast<const T*>(p.residual) + token * p.residual_stride;
  }
  __device__ __forceinline__ T* out(int token) const { return static_cast<T*>(p.out) + token * p.out_stride; }
};

template <typename T, typename S>
struct Roles {
  static constexpr bool kBlocks = S::kBlocks;
  const Fp8Params& p;
  const Schedule& s;
  const Ring& ring;
  int features;

  __device__ __forceinline__ int tiles() const { return s.token_tiles * s.feature_tiles; }
  __device__ __forceinline__ int steps() const { return (s.chunks + S::kChunks - 1) / S::kChunks; }

  __device__ __forceinline__ Place place(int tile) const {
    const int columns = p.is_gated ? S::kColumns / 2 : S::kColumns;
    const int band_tiles = s.band * s.feature_tiles, of_band = tile / band_tiles * s.band;
    const int in_band = tile % band_tiles, rows = min(s.band, s.token_tiles - of_band);
    Place at;
    at.first_token = (of_band + in_band % rows) * S::kTokens;
    at.first_feature = in_band / rows * columns;
    at.token = min(at.first_token, max(p.tokens - S::kTokens, 0));
    at.feature = kBlocks ? at.first_feature : min(at.first_feature, max((features + 7) / 8 * 8 - columns, 0));
    return at;
  }

  // The thread is alone: every instruction of a stage costs it several clocks.
  template <typename Copy, typename CopyScales>
  __device__ __forceinline__ void bring(int bytes, int scale_bytes, Copy&& copy,
                                        CopyScales&& copy_scales) const {
    constexpr int kGroupColumns = kScaleGroup * kChunk / 2;
    uint32_t group = shared_address(ring.scales);
    int groups = 0;
    Cursor<S::kStages> at;
    at.parity = 1;  // the ring is empty at first
#pragma unroll 1
    for (int tile = blockIdx.x; tile < tiles(); tile += gridDim.x) {
      const Place here = place(tile);
      int column = 0;
#pragma unroll 1
      for (int step = steps(); step > 0; --step, at.advance()) {
        const uint32_t barrier = ring.full + 8 * at.slot;
        barrier_wait(ring.empty + 8 * at.slot, at.parity);
        const bool begins = kBlocks && column % kGroupColumns == 0;
        barrier_arrive_expecting(barrier, S::kChunks * bytes + (begins ? scale_bytes : 0));
        if (begins) {
          copy_scales(here, group + groups * S::kScaleBytes, column / (kChunk / 2), barrier);
          groups = groups + 1 == S::kStages ? 0 : groups + 1;
        }
#pragma unroll
        for (int chunk = 0; chunk < S::kChunks; ++chunk, column += kChunk / 2) {
          copy(here, at.slot * S::kChunks + chunk, column, barrier);
        }
      }
    }
  }

  // Weights are older than this step: the first ring of them travels while the previous kernel ends. A gate's
  // tile is kColumns / 2 gate rows, then the up rows that they gate. Maps are of pairs of elements.
  __device__ __forceinline__ void bring_weights(const CUtensorMap* map) const {
    const auto copy = [&](const Place& here, int chunk, int column, uint32_t barrier) {
      const uint32_t to = ring.weights + chunk * S::kWeightChunk;
      copy_box(to, map, column, here.feature, 0, barrier);
      if (p.is_gated) copy_box(to + S::kWeightChunk / 2, map, column, here.feature + features, 0, barrier);
    };
    const auto copy_scales = [&](const Place& here, uint32_t group, int chunk, uint32_t barrier) {
      const uint32_t to = group + S::kXRows * 16;
      copy_bytes(to, weight_scales(here.feature) + chunk, 16, barrier);
      if (p.is_gated) copy_bytes(to + 16, weight_scales(here.feature + features) + chunk, 16, barrier);
    };
    bring(S::kWeightChunk, p.is_gated ? 32 : 16, copy, copy_scales);
    wait_for_previous();
  }

  __device__ __forceinline__ void bring_x(const CUtensorMap* map, const CUtensorMap* scale_map) const {
    wait_for_previous();
    const auto copy = [&](const Place& here, int chunk, int column, uint32_t barrier) {
      copy_box(ring.x + chunk * S::kXChunk, map, column, here.token, 0, barrier);
    };
    const auto copy_scales = [&](const Place& here, uint32_t group, int chunk, uint32_t barrier) {
      copy_box(group, scale_map, chunk, here.token, 0, barrier);
    };
    bring(s.x_rows * kChunk, s.x_rows * 16, copy, copy_scales);
  }

  // Of blocks of 128 rows, the scales of the one that holds a feature.
  __device__ __forceinline__ const float* weight_scales(int feature) const {
    return p.weight_scales + static_cast<int64_t>(feature / kFp8Block) * p.scale_stride;
  }

  __device__ __forceinline__ Epilogue<T, S::kColumns> epilogue() const {
    return {p, s.aligned, static_cast<int>(threadIdx.x) % 32, features};
  }

  // All of a CTA's tiles but the last are finished by other warps, under the products of the next.
  __device__ __forceinline__ void finish(const uint8_t* staged, int warpgroup) const {
    wait_for_previous();
    for (int tile = blockIdx.x; tile + static_cast<int>(gridDim.x) < tiles(); tile += gridDim.x) {
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

  // What a thread's sums of one chunk are multiplied with, by half of the columns and token.
  struct Scale {
    float of[2][2];
  };

  // A thread's place among groups of scales in shared memory.
  struct ScaleSlots {
    const uint8_t *x[2], *weight[2];  // in slot 0
    int slot, in_group;

    // The scale of the next chunk, which has arrived.
    __device__ __forceinline__ Scale take() {
      const auto at = [&](const uint8_t* row) {
        return *reinterpret_cast<const float*>(row + slot * S::kScaleBytes + in_group * 4);
      };
      Scale scale;
#pragma unroll
      for (int i = 0; i < 4; ++i) scale.of[i / 2][i % 2] = at(weight[i / 2]) * at(x[i % 2]);
      if (++in_group == kScaleGroup) end_group();
      return scale;
    }

    __device__ __forceinline__ void end_group() {
      in_group = 0;
      slot = slot + 1 == S::kStages ? 0 : slot + 1;
    }
  };

  __device__ __forceinline__ ScaleSlots scale_slots(int warp, int lane) const {
    ScaleSlots slots{};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      // Of fewer tokens than a tile has, the last one's serve the rest.
      slots.x[i] = ring.scales + min(warp * kWarpRows + lane / 4 + 8 * i, S::kXRows - 1) * 16;
      slots.weight[i] = ring.scales + S::kXRows * 16 + (p.is_gated ? 16 * i : 0);
    }
    return slots;
  }

  // A warpgroup's place among chunks: the slot and the chunk in it.
  struct Chunk {
    Cursor<S::kStages> at;
    int in_slot;
    Scale scale;
  };

  // Waits for a chunk and starts its sums.
  __device__ __forceinline__ void start(float (&sums)[S::kColumns / 2], const Chunk& chunk,
                                        int warpgroup) const {
    const int slot = chunk.at.slot * S::kChunks + chunk.in_slot;
    barrier_wait(ring.full + 8 * chunk.at.slot, chunk.at.parity);
    const uint64_t x = swizzled_operand(ring.x + warpgroup * 64 * kChunk) + slot * operand_step(S::kXChunk);
    const uint64_t weights = swizzled_operand(ring.weights) + slot * operand_step(S::kWeightChunk);
    products_hold(sums);
    products_begin();
#pragma unroll
    for (int k = 0; k < kChunk; k += 32) {
      warpgroup_mma<E4M3>(sums, x + operand_step(k), weights + operand_step(k), k > 0);
    }
    products_commit();
  }

  // Adds the sums of a chunk, which are done, to the totals and frees the slot with its last one.
  __device__ __forceinline__ void add(float (&total)[S::kColumns / 2], float (&sums)[S::kColumns / 2],
                                      const Chunk& chunk) const {
    products_hold(sums);
    __syncwarp();
    if (chunk.in_slot == S::kChunks - 1 && threadIdx.x % 32 == 0)
      barrier_arrive(ring.empty + 8 * chunk.at.slot);
#pragma unroll
    for (int i = 0; i < S::kColumns / 2; ++i) {
      if constexpr (kBlocks) {
        total[i] = fmaf(chunk.scale.of[i / (S::kColumns / 4)][i / 2 % 2], sums[i], total[i]);
      } else {
        total[i] += sums[i];
      }
    }
  }

  // A warpgroup by itself adds a chunk while it sums the next one; two take turns.
  static constexpr bool kTwoSums = S::kWarpgroups == 1;

  // The totals of a tile.
  __device__ __forceinline__ void sum(float (&total)[S::kColumns / 2], Cursor<S::kStages>& at,
                                      ScaleSlots& slots, int warpgroup) const {
    Chunk next{at, 0, {}}, now;
    const auto go_on = [&](float (&free)[S::kColumns / 2]) {
      now = next;
      start(free, now, warpgroup);
      if constexpr (kBlocks) now.scale = slots.take();
      if (S::kChunks == 1 || ++next.in_slot == S::kChunks) next.in_slot = 0, next.at.advance();
    };
    int left = steps() * S::kChunks;
    if constexpr (kTwoSums) {
      float sums[2][S::kColumns / 2];
      const auto step = [&](float (&free)[S::kColumns / 2], float (&busy)[S::kColumns / 2]) {
        const Chunk before = now;
        go_on(free);
        products_wait<1>();
        add(total, busy, before);
      };
      const auto end = [&](float (&busy)[S::kColumns / 2]) {
        products_wait<0>();
        add(total, busy, now);
      };
      go_on(sums[0]);
#pragma unroll 1
      for (left -= 1; left >= 2; left -= 2) {
        step(sums[1], sums[0]);
        step(sums[0], sums[1]);
      }
      if (left == 1) {
        step(sums[1], sums[0]);
        end(sums[1]);
      } else {
        end(sums[0]);
      }
    } else {
      float sums[S::kColumns / 2];
#pragma unroll 1
      for (; left > 0; --left) {
        go_on(sums);
        products_wait<0>();
        add(total, sums, now);
      }
    }
    at = next.at;
    if (kBlocks && slots.in_group > 0) slots.end_group();
  }

  __device__ __forceinline__ void multiply(uint8_t* staged, float2* columns) const {
    // From lane 0, so that the compiler sees a warp's operands alike.
    const int warp = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 32 - 4, 0), warpgroup = warp / 4;
    const int lane = threadIdx.x % 32, column = threadIdx.x % 128;
    staged += warp * kWarpRows * S::kStagedRow;
    columns += warpgroup * S::kColumns;
    const auto end = epilogue();
    wait_for_previous();
    Cursor<S::kStages> at;
    ScaleSlots slots = scale_slots(warp, lane);
    int turn = 0;
#pragma unroll 1
    for (int tile = blockIdx.x; tile < tiles(); tile += gridDim.x, turn ^= 1) {
      Place here = place(tile);
      here.token += warp * kWarpRows;
      // All that the end needs besides the sums, long before.
      const float2 brought = column < S::kColumns ? end.column_of(here, column) : float2{};
      float x_scale[2] = {1.0f, 1.0f};
      if constexpr (!kBlocks) {
#pragma unroll
        for (int i = 0; i < 2; ++i) x_scale[i] = p.x_scales[min(here.token + lane / 4 + 8 * i, p.tokens - 1)];
      }
      float total[S::kColumns / 2] = {};
      sum(total, at, slots, warpgroup);

      // No warp is two tiles ahead of another of its warpgroup, so two turns are enough.
      float2* const own_columns = columns + turn * S::kWarpgroups * S::kColumns;
      if (column < S::kColumns) own_columns[column] = brought;
      asm volatile("bar.sync %0, 128;" ::"r"(kColumnBarrier + warpgroup) : "memory");
      if (tile != static_cast<int>(blockIdx.x)) wait_named(kFreeBarrier + warpgroup);
#pragma unroll
      for (int j = 0; j < S::kColumns / 8; ++j) {
        const float four[4] = {total[4 * j], total[4 * j + 1], total[4 * j + 2], total[4 * j + 3]};
        end.stage(staged, own_columns, 8 * j + lane % 4 * 2, four, x_scale);
      }
      if (tile + static_cast<int>(gridDim.x) < tiles()) {
        arrive_named(kStagedBarrier + warpgroup);
      } else {
        __syncwarp();
        end.finish(staged, here);
      }
    }
  }
};

template <typename T, typename S>
__global__ void __launch_bounds__(S::kThreads, 1)
    gemm_kernel(const __grid_constant__ CUtensorMap x_map, const __grid_constant__ CUtensorMap scale_map,
                const __grid_constant__ CUtensorMap weight_map, const __grid_constant__ Fp8Params p,
                const __grid_constant__ Schedule s) {
  extern __shared__ __align__(1024) uint8_t shared[];
  const uint32_t base = shared_address(shared), slots = base + kHeaderBytes;
  constexpr int kSlots = S::kStages * S::kChunks;
  const Ring ring{base, base + 8 * kMaxStages, slots, slots + kSlots * S::kXChunk,
                  shared + kHeaderBytes + kSlots * (S::kXChunk + S::kWeightChunk)};
  const Roles<T, S> roles{p, s, ring, p.is_gated ? p.out_features / 2 : p.out_features};

  let_next_start();
  if (threadIdx.x == 0) {
    prefetch_map(&x_map);
    if constexpr (S::kBlocks) prefetch_map(&scale_map);
    prefetch_map(&weight_map);
    for (int slot = 0; slot < S::kStages; ++slot) {
      barrier_init(ring.full + 8 * slot, 2);  // the threads that bring x and weights
      barrier_init(ring.empty + 8 * slot, 4 * S::kWarpgroups);
    }
    barrier_init_done();
  }
  __syncthreads();
  uint8_t* staged = shared + kHeaderBytes + S::kStages * S::kStageBytes;
  if (threadIdx.x < 128) {
    if constexpr (S::kWarpgroups > 1) asm volatile("setmaxnreg.dec.sync.aligned.u32 72;");
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (warp == 0 && lane == 0) {
      roles.bring_weights(&weight_map);
    } else if (warp == 1 && lane == 0) {
      roles.bring_x(&x_map, &scale_map);
    } else if (warp >= 2 && warp < 2 + S::kWarpgroups) {
      roles.finish(staged, warp - 2);
    } else {
      wait_for_previous();
    }
    __syncwarp();
  } else {
    if constexpr (S::kWarpgroups > 1) asm volatile("setmaxnreg.inc.sync.aligned.u32 216;");
    roles.multiply(staged, reinterpret_cast<float2*>(staged + S::kStagedBytes));
  }
}

// ---- host ----

// Rows of K codes as boxes of `box_rows` rows of a chunk; what lies outside arrives as zeros. To the copy
// engine a pair of codes is one number.
inline bool encode_rows(CUtensorMap* map, const void* data, int rows, int columns, int64_t stride,
                        int box_rows) {
  const cuuint64_t sizes[3] = {static_cast<cuuint64_t>(columns / 2), static_cast<cuuint64_t>(rows), 1};
  const cuuint64_t row_bytes = static_cast<cuuint64_t>(stride), strides[2] = {row_bytes, row_bytes * rows};
  const cuuint32_t box[3] = {kChunk / 2, static_cast<cuuint32_t>(box_rows), 1};
  return encode_swizzled_map(map, true, data, sizes, strides, box);
}

// Rows of scales as boxes of `box_rows` rows of a group of chunks.
inline bool encode_scales(CUtensorMap* map, const float* scales, int rows, int stride, int box_rows) {
  const cuuint64_t sizes[3] = {static_cast<cuuint64_t>(stride), static_cast<cuuint64_t>(rows), 1};
  const cuuint64_t row_bytes = static_cast<cuuint64_t>(stride) * sizeof(float);
  const cuuint64_t strides[2] = {row_bytes, row_bytes * rows};
  const cuuint32_t box[3] = {kScaleGroup, static_cast<cuuint32_t>(box_rows), 1};
  return encode_float_map(map, scales, sizes, strides, box);
}

inline bool in_vectors(const void* data, int64_t stride) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride % 8 == 0;
}

constexpr int tiles_of(int size, int tile) { return (size + tile - 1) / tile; }

template <typename T, typename S>
cudaError_t launch_tile(const Fp8Params& p, int sms, cudaStream_t stream) {
  const int features = p.is_gated ? p.out_features / 2 : p.out_features;
  Schedule s{};
  s.token_tiles = tiles_of(p.tokens, S::kTokens);
  s.feature_tiles = tiles_of(features, p.is_gated ? S::kColumns / 2 : S::kColumns);
  s.band = tiles_of(2048, S::kTokens);
  s.chunks = tiles_of(p.in_features, kChunk);
  s.x_rows = p.tokens < S::kXRows ? p.tokens : S::kXRows;
  s.aligned = features % 8 == 0 && in_vectors(p.out, p.out_stride) &&
              (p.residual == nullptr || in_vectors(p.residual, p.residual_stride));

  CUtensorMap x_map, scale_map{}, weight_map;
  if (!encode_rows(&x_map, p.x, p.tokens, p.in_features, p.x_stride, s.x_rows) ||
      !encode_rows(&weight_map, p.weight, p.out_features, p.in_features, p.weight_stride,
                   p.is_gated ? S::kColumns / 2 : S::kColumns) ||
      (S::kBlocks && !encode_scales(&scale_map, p.x_scales, p.tokens, p.scale_stride, s.x_rows))) {
    return cudaErrorInvalidValue;
  }
  const auto kernel = gemm_kernel<T, S>;
  if (const cudaError_t error =
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, S::kUsedBytes)) {
    return error;
  }
  const int tiles = s.token_tiles * s.feature_tiles;
  return launch(kernel, dim3(static_cast<unsigned>(tiles < sms ? tiles : sms)), S::kThreads, S::kUsedBytes,
                stream, x_map, scale_map, weight_map, p, s);
}

// Up to which a tile has room for more stages, with less of x in each.
constexpr int kFewTokens = 16;

// Compiled once for each type (sm90_bf16.cu, sm90_f16.cu).
template <typename T>
cudaError_t launch_choice(const Fp8Params& p, int tile, int sms, cudaStream_t stream) {
#define TGI_TILE(number, ...)                                                    \
  case number:                                                                   \
    return p.in_blocks ? launch_tile<T, Tile<true, __VA_ARGS__>>(p, sms, stream) \
                       : launch_tile<T, Tile<false, __VA_ARGS__>>(p, sms, stream);
  switch (tile) {
    TGI_TILE(0, 1, 32, 4, kFewTokens)
    TGI_TILE(1, 1, 32, 4)
    TGI_TILE(2, 1, 64, 2)
    TGI_TILE(3, 1, 128, 1)
    TGI_TILE(4, 2, 128, 1)
    default:
      return cudaErrorInvalidValue;
  }
#undef TGI_TILE
}

}  // namespace tgi::fp8
