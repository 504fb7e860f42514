// Skinny matrix product at the memory roof: few tokens, every weight read once, K walked in order.
//
// One accumulator per output takes the k16 steps in ascending order, whatever the number of tokens, so a
// token's bits depend on its own row alone; cuBLAS's kernels that do not split K give the same bits.
// docs/kernels/skinny_matmul.md.
//
//   producer warp:  | weights 0 … s-1 | wait for the previous kernel | x 0 … s-1 | both s, s+1, … as slots
//   free | each consumer:  | wait slot → ldmatrix one half chunk ahead → mma of its 16 rows | … |
//   epilogue |
#include "activation/gated.cuh"
#include "common/dispatch.cuh"
#include "common/hopper.cuh"
#include "common/mma.cuh"
#include "common/pdl.cuh"
#include "matmul/cuda.h"

namespace tgi {
namespace {

// ---- device ----

constexpr int kMaxThreads = 288;  // eight consumer warps and the producer
constexpr int kBlockTokens = 16;  // tokens that one CTA handles
constexpr int kChunk = 64;        // elements of K in one swizzled row of 128 bytes
constexpr int kRowBytes = 128;
constexpr int kMaxStages = 32;
constexpr int kHeaderBytes = 1024;  // the barriers; keeps what follows on the swizzle's 1024 bytes

// How one launch cuts its work. A tile is `rows` weight rows, 16 for each consumer warp.
struct Tiling {
  int rows, tiles;
  int x_rows;                   // tokens in a chunk, zeros past the last
  int chunks;                   // of K in a stage
  int steps;                    // stages that cover K
  int stages;                   // slots of the ring
  int column_step, chunk_step;  // what a stage adds to the maps' coordinates
};

// The ring in shared memory. Slots hold chunks of weights, then of x, each in its own array.
struct Ring {
  uint32_t full, empty, weights, x;  // addresses of slot 0
  int weight_bytes, x_bytes;         // of a chunk

  __device__ __forceinline__ Ring(uint8_t* shared, const Tiling& t)
      : full(shared_address(shared)),
        empty(full + 8 * kMaxStages),
        weights(full + kHeaderBytes),
        x(weights + t.stages * t.chunks * t.rows * kRowBytes),
        weight_bytes(t.rows * kRowBytes),
        x_bytes(t.x_rows * kRowBytes) {}
};

// A place in the ring, moving with the stages.
struct Cursor {
  int slot = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void advance(int stages) {
    if (++slot < stages) return;
    slot = 0;
    parity ^= 1;
  }
};

// One thread fills the ring, stage by stage: two or three copies each, whatever the tile.
__device__ __forceinline__ void produce(const CUtensorMap* weight_map, const CUtensorMap* x_map,
                                        const MatmulParams& p, const Tiling& t, const Ring& ring,
                                        int own_tiles) {
  const uint64_t policy = evict_first();
  const int slot_weights = t.chunks * ring.weight_bytes, slot_x = t.chunks * ring.x_bytes;
  const int first_token = blockIdx.y * kBlockTokens, own_steps = own_tiles * t.steps;
  const int tile_rows = p.is_gated ? t.rows / 2 : t.rows, up = p.out_features / 2;
  const int row_step = tile_rows * static_cast<int>(gridDim.x);
  int row = blockIdx.x * tile_rows, step = 0, column = 0, chunk = 0;  // of the next weights to load

  const auto load_weights = [&](int slot) {
    const uint32_t barrier = ring.full + 8 * slot, to = ring.weights + slot * slot_weights;
    barrier_arrive_expecting(barrier, slot_weights + slot_x);
    copy_box(to, weight_map, column, row, chunk, barrier, policy);
    // With a gate a slot holds the chunks of the gate rows, then those of the up rows.
    if (p.is_gated) copy_box(to + slot_weights / 2, weight_map, column, up + row, chunk, barrier, policy);
  };
  const auto load_x = [&](int slot, int at_column, int at_chunk) {
    copy_box(ring.x + slot * slot_x, x_map, at_column, first_token, at_chunk, ring.full + 8 * slot);
  };
  const auto next = [&] {
    column += t.column_step;
    chunk += t.chunk_step;
    if (++step < t.steps) return;
    step = column = chunk = 0;
    row += row_step;
  };

  // The weights are older than this step: the first ring of them travels while the previous kernel ends.
  // Bringing what comes after it into L2 as well only costs (H200: 0.3 to 1 µs a product for 96 to 200 KB an
  // SM).
  const int ahead = min(t.stages, own_steps);
  for (int i = 0; i < ahead; ++i, next()) load_weights(i);
  wait_for_previous();
  for (int i = 0, of_tile = 0; i < ahead; ++i) {
    load_x(i, of_tile * t.column_step, of_tile * t.chunk_step);
    if (++of_tile == t.steps) of_tile = 0;
  }
  Cursor at;
  for (int i = ahead; i < own_steps; ++i, next(), at.advance(t.stages)) {
    barrier_wait(ring.empty + 8 * at.slot, at.parity);
    load_weights(at.slot);
    load_x(at.slot, column, chunk);
  }
}

// What a lane adds to its products, and where they go. Accumulator 2h + e belongs to weight row 8h + lane / 4
// of the warp's 16 and to token 2 (lane % 4) + e of a group.
template <typename T, int kGroups>
struct Epilogue {
  const MatmulParams& p;
  const Tiling& t;
  int warp, lane;
  float bias[2], before[kGroups][4];

  __device__ __forceinline__ int feature(int tile, int h) const {
    if (!p.is_gated) return tile * t.rows + warp * 16 + h * 8 + lane / 4;
    return h * (p.out_features / 2) + tile * (t.rows / 2) + warp * 8 + lane / 4;
  }

  __device__ __forceinline__ int token(int group, int e) const {
    return static_cast<int>(blockIdx.y) * kBlockTokens + group * 8 + lane % 4 * 2 + e;
  }

  __device__ __forceinline__ float residual(int to_token, int to_feature) const {
    if (to_token >= p.tokens || to_feature >= p.out_features) return 0.0f;
    return to_float(static_cast<const T*>(p.residual)[to_token * p.residual_stride + to_feature]);
  }

  // Called long before finish(): the loads must not wait at the end, when nothing else is left to do.
  __device__ __forceinline__ void fetch(int tile) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int at = feature(tile, h);
      bias[h] = p.bias && at < p.out_features ? to_float(static_cast<const T*>(p.bias)[at]) : 0.0f;
      if (p.residual == nullptr) continue;
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
#pragma unroll
        for (int e = 0; e < 2; ++e) before[g][2 * h + e] = residual(token(g, e), at);
      }
    }
  }

  __device__ __forceinline__ void finish(int tile, const float (&d)[kGroups][4]) const {
    const int features = p.is_gated ? p.out_features / 2 : p.out_features;
    const auto put = [&](int to_token, int to_feature, float y) {
      if (to_token >= p.tokens || to_feature >= features) return;
      static_cast<T*>(p.out)[to_token * p.out_stride + to_feature] = from_float<T>(y);
    };
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float y[2] = {rounded<T>(d[g][e] + bias[0]), rounded<T>(d[g][2 + e] + bias[1])};
        if (p.is_gated) {
          put(token(g, e), feature(tile, 0), gated<T>(p.activation, y[0], y[1]));
          continue;
        }
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          if (p.residual != nullptr) y[h] += before[g][2 * h + e];
          put(token(g, e), feature(tile, h), y[h]);
        }
      }
    }
  }
};

// A warp computes 16 weight rows for kGroups groups of 8 tokens. With a gate, these are 8 gate rows and the 8
// up rows that they gate, so that one thread holds both.
template <typename T, int kGroups>
__global__ void __launch_bounds__(kMaxThreads, 1)
    skinny_matmul_kernel(const __grid_constant__ CUtensorMap weight_map,
                         const __grid_constant__ CUtensorMap x_map, const MatmulParams p, const Tiling t) {
  extern __shared__ __align__(1024) uint8_t shared[];
  const Ring ring(shared, t);
  const int consumers = t.rows / 16;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int own_tiles =
      (t.tiles - static_cast<int>(blockIdx.x) + static_cast<int>(gridDim.x) - 1) / gridDim.x;

  let_next_start();
  if (warp == consumers && lane == 0) {
    prefetch_map(&weight_map);
    prefetch_map(&x_map);
    for (int slot = 0; slot < t.stages; ++slot) {
      barrier_init(ring.full + 8 * slot, 1);
      barrier_init(ring.empty + 8 * slot, consumers);
    }
    barrier_init_done();
  }
  __syncthreads();
  if (warp == consumers) {
    if (lane == 0) {
      produce(&weight_map, &x_map, p, t, ring, own_tiles);
    } else {
      wait_for_previous();
    }
    return;
  }

  // This lane's addresses for ldmatrix, from the start of a chunk, for each k16 step of weights and half
  // chunk of x.
  uint32_t weight_lane[4], x_lane[kGroups][2];
  const int row = p.is_gated ? warp * 8 + lane % 8 : warp * 16 + lane % 16;
  const uint32_t up = p.is_gated && lane / 8 % 2 ? t.chunks * ring.weight_bytes / 2 : 0;
#pragma unroll
  for (int k16 = 0; k16 < 4; ++k16) {
    weight_lane[k16] = up + row * kRowBytes + (((k16 * 2 + lane / 16) ^ row % 8) << 4);
  }
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
    const int token = g * 8 + lane % 8;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      x_lane[g][half] = token * kRowBytes + (((half * 4 + lane / 8) ^ token % 8) << 4);
    }
  }
  // Half a chunk of operands: two k16 steps.
  struct Half {
    uint32_t weight[2][4], x[kGroups][4];
  };
  uint32_t weights = ring.weights, xs = ring.x;  // the chunk to load from
  const int weight_step = p.is_gated ? ring.weight_bytes / 2 : ring.weight_bytes;
  const auto load_half = [&](Half& to, int half) {
    load_matrices(to.weight[0], weights + weight_lane[2 * half]);
    load_matrices(to.weight[1], weights + weight_lane[2 * half + 1]);
#pragma unroll
    for (int g = 0; g < kGroups; ++g) load_matrices(to.x[g], xs + x_lane[g][half]);
  };
  float d[kGroups][4] = {};
  const auto multiply = [&](const Half& half) {
#pragma unroll
    for (int k16 = 0; k16 < 2; ++k16) {
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        mma<T>(d[g], half.weight[k16], half.x[g][2 * k16], half.x[g][2 * k16 + 1]);
      }
    }
  };

  wait_for_previous();
  Epilogue<T, kGroups> epilogue{p, t, warp, lane, {}, {}};
  epilogue.fetch(blockIdx.x);
  Half first, second;
  Cursor at;
  int step = 0, tile = blockIdx.x;
  barrier_wait(ring.full, 0);
  load_half(first, 0);
  for (int left = own_tiles * t.steps; left > 0; --left) {
    for (int c = 1; c < t.chunks; ++c) {
      load_half(second, 1);
      multiply(first);
      weights += weight_step;
      xs += ring.x_bytes;
      load_half(first, 0);
      multiply(second);
    }
    load_half(second, 1);
    multiply(first);
    const uint32_t done = ring.empty + 8 * at.slot;
    at.advance(t.stages);
    weights = ring.weights + at.slot * t.chunks * ring.weight_bytes;
    xs = ring.x + at.slot * t.chunks * ring.x_bytes;
    if (left > 1) {
      barrier_wait(ring.full + 8 * at.slot, at.parity);
      load_half(first, 0);
    }
    multiply(second);
    __syncwarp();
    if (lane == 0) barrier_arrive(done);
    if (++step < t.steps) continue;

    epilogue.finish(tile, d);
#pragma unroll
    for (auto& group : d) {
#pragma unroll
      for (float& sum : group) sum = 0.0f;
    }
    step = 0;
    tile += gridDim.x;
    if (left > 1) epilogue.fetch(tile);
  }
}

// ---- host ----

using EncodeMap = decltype(&cuTensorMapEncodeTiled);

// The driver's encoder, found at run time so that nothing links against libcuda.
EncodeMap find_encoder() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found{};
  if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault,
                                       &found) ||
      found != cudaDriverEntryPointSuccess) {
    return nullptr;
  }
  return reinterpret_cast<EncodeMap>(function);
}

struct Matrix {
  const void* data;
  int rows, columns;
  int64_t stride;
};

// A map whose boxes are `chunks` chunks of `box_rows` rows. Three dimensions, (64, rows, chunks), make a
// stage one copy; rows that are no whole number of chunks are mapped as (columns, rows, 1), for boxes of one
// chunk.
bool encode_map(CUtensorMap* map, DType dtype, const Matrix& matrix, int box_rows, int chunks) {
  static const EncodeMap encode = find_encoder();
  const bool whole = matrix.columns % kChunk == 0;
  const cuuint64_t sizes[3] = {static_cast<cuuint64_t>(whole ? kChunk : matrix.columns),
                               static_cast<cuuint64_t>(matrix.rows),
                               static_cast<cuuint64_t>(whole ? matrix.columns / kChunk : 1)};
  const cuuint64_t strides[2] = {static_cast<cuuint64_t>(matrix.stride) * 2, kRowBytes};
  const cuuint32_t box[3] = {kChunk, static_cast<cuuint32_t>(box_rows), static_cast<cuuint32_t>(chunks)};
  const cuuint32_t steps[3] = {1, 1, 1};
  const auto type = dtype == DType::f16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  return encode != nullptr &&
         encode(map, type, 3, const_cast<void*>(matrix.data), sizes, strides, box, steps,
                CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

// Two CTAs fit an SM, so that the next kernel's weights arrive while this one ends, if half an SM holds four
// stages; else the bytes in flight are worth more (H200, 4096 → 28672, one token, in a chain: 55.4 µs with
// half, 53.7 with all).
constexpr int kHalfSm = 112 * 1024, kWholeSm = 224 * 1024, kMinStages = 4;
constexpr int kMaxRows = 128;

constexpr int round_up(int value, int to) { return (value + to - 1) / to * to; }

// Rows of a tile: every SM gets the same number of tiles, as few as the longest tile allows.
int rows_for(int out_features, int sms) {
  for (int waves = 1;; ++waves) {
    const int rows = round_up((out_features + sms * waves - 1) / (sms * waves), 16);
    if (rows <= kMaxRows) return rows;
  }
}

template <int kGroups>
Tiling tiling_for(const MatmulParams& p, int sms) {
  const bool whole = p.in_features % kChunk == 0;
  Tiling t{};
  t.rows = rows_for(p.out_features, sms);
  t.tiles = (p.out_features + t.rows - 1) / t.rows;
  t.x_rows = 8 * kGroups;
  t.chunks = !whole ? 1 : t.rows <= 64 ? 4 : 2;
  t.column_step = whole ? 0 : kChunk;
  t.chunk_step = whole ? t.chunks : 0;
  t.steps = (p.in_features + t.chunks * kChunk - 1) / (t.chunks * kChunk);
  const int stage_bytes = t.chunks * (t.rows + t.x_rows) * kRowBytes;
  const int half_stages = (kHalfSm - kHeaderBytes) / stage_bytes;
  t.stages =
      min(kMaxStages, half_stages >= kMinStages ? half_stages : (kWholeSm - kHeaderBytes) / stage_bytes);
  return t;
}

template <typename T, int kGroups>
cudaError_t launch_skinny(const MatmulParams& p, DType dtype, int sms, cudaStream_t stream) {
  const Tiling t = tiling_for<kGroups>(p, sms);
  CUtensorMap weight_map, x_map;
  const Matrix weight{p.weight, p.out_features, p.in_features, p.weight_stride};
  const Matrix x{p.x, p.tokens, p.in_features, p.x_stride};
  if (!encode_map(&weight_map, dtype, weight, p.is_gated ? t.rows / 2 : t.rows, t.chunks) ||
      !encode_map(&x_map, dtype, x, t.x_rows, t.chunks)) {
    return cudaErrorInvalidValue;
  }
  const auto kernel = skinny_matmul_kernel<T, kGroups>;
  if (const cudaError_t error =
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kWholeSm)) {
    return error;
  }
  const dim3 grid(static_cast<unsigned>(min(t.tiles, sms)),
                  static_cast<unsigned>((p.tokens + kBlockTokens - 1) / kBlockTokens));
  const int threads = 32 * (t.rows / 16 + 1);
  const int shared_bytes = kHeaderBytes + t.stages * t.chunks * (t.rows + t.x_rows) * kRowBytes;
  return launch(kernel, grid, threads, shared_bytes, stream, weight_map, x_map, p, t);
}

}  // namespace

cudaError_t skinny_matmul(const MatmulParams& p, DType dtype, cudaStream_t stream) {
  if (p.tokens == 0 || p.out_features == 0) return cudaSuccess;
  int device = 0, sms = 0;
  if (const cudaError_t error = cudaGetDevice(&device)) return error;
  if (const cudaError_t error = cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device))
    return error;
  return by_half_dtype(dtype, [&]<typename T>() {
    if (p.tokens <= 8) return launch_skinny<T, 1>(p, dtype, sms, stream);
    return launch_skinny<T, 2>(p, dtype, sms, stream);
  });
}

}  // namespace tgi
