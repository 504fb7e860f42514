// Skinny matrix product at the memory roof: few tokens, every weight read once, K walked in order.
//
// One accumulator per output takes the k16 steps in ascending order, whatever the number of tokens, so a token's
// bits depend on its own row alone; cuBLAS's kernels that do not split K give the same bits.
// docs/kernels/skinny_matmul.md.
//
//   producer warp:  | weights 0 … s-1 | wait for the previous kernel | x 0 … s-1 | both s, s+1, … as slots free |
//   each consumer:  | wait slot → ldmatrix one half chunk ahead → mma of its 16 or 32 rows | … | epilogue |
#include "activation/gated.cuh"
#include "common/dispatch.cuh"
#include "common/mma.cuh"
#include "common/pdl.cuh"
#include "matmul/cuda.h"
#include "matmul/hopper.cuh"

namespace tgi {
namespace {

// ---- device ----

constexpr int kMaxThreads = 512;
constexpr int kBlockTokens = 64;    // tokens that one CTA handles
constexpr int kChunk = 64;          // elements of K in one swizzled row of 128 bytes
constexpr int kRowBytes = 128;
constexpr int kMaxStages = 32;
constexpr int kHeaderBytes = 1024;  // the barriers; keeps what follows on the swizzle's 1024 bytes

// How one launch cuts its work. A tile is `rows` weight rows; row_warps × token_warps consumer warps share it.
struct Tiling {
  int rows, tiles;
  int row_warps, token_warps;
  int x_rows;   // tokens a chunk has room for, a multiple of 8
  int x_copied;  // tokens that are copied into it
  int chunks;   // of K in a stage
  int steps;    // stages that cover K
  int stages;   // slots of the ring
  bool reread;  // more than one block of tokens reads the weights
};

template <typename T>
struct Operands {
  uint32_t weight[4], x[4];
};

// What a lane of a warp knows of its outputs: accumulator 2h + e belongs to weight row g + 8h of its strip of 16
// and to token 2t + e of its group of 8, where g = lane / 4 and t = lane % 4.
template <typename T>
struct Epilogue {
  const SkinnyMatmulParams& p;
  int lane_row, first_token;  // of the warp's first strip, and of its first group plus 2t

  __device__ __forceinline__ float before(int token, int feature) const {
    if (p.residual == nullptr || token >= p.tokens || feature >= p.out_features) return 0.0f;
    return to_float(static_cast<const T*>(p.residual)[token * p.residual_stride + feature]);
  }

  __device__ __forceinline__ T rounded(float d, int feature) const {
    if (p.bias == nullptr || feature >= p.out_features) return from_float<T>(d);
    return from_float<T>(d + to_float(static_cast<const T*>(p.bias)[feature]));
  }

  __device__ __forceinline__ void store(int token, int feature, int features, T y) const {
    if (token < p.tokens && feature < features) static_cast<T*>(p.out)[token * p.out_stride + feature] = y;
  }
};

// A warp computes kStrips strips of 16 weight rows for kGroups groups of 8 tokens. With a gate, a strip is 8 gate
// rows and the 8 up rows that they gate, so that one thread holds both.
template <typename T, int kStrips, int kGroups>
__global__ void __launch_bounds__(kMaxThreads, 1)
    skinny_matmul_kernel(const __grid_constant__ CUtensorMap weight_map, const __grid_constant__ CUtensorMap x_map,
                         const SkinnyMatmulParams p, const Tiling t) {
  extern __shared__ __align__(1024) uint8_t shared[];
  uint64_t* full = reinterpret_cast<uint64_t*>(shared);
  uint64_t* empty = full + kMaxStages;
  const int chunk_bytes = t.rows * kRowBytes, x_chunk_bytes = t.x_rows * kRowBytes;
  uint8_t* weight_ring = shared + kHeaderBytes;
  uint8_t* x_ring = weight_ring + t.stages * t.chunks * chunk_bytes;
  const int consumers = t.row_warps * t.token_warps;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int block_token = blockIdx.y * kBlockTokens;
  const int own_tiles = (t.tiles - static_cast<int>(blockIdx.x) + static_cast<int>(gridDim.x) - 1) / gridDim.x;
  const int own_steps = own_tiles * t.steps;

  let_next_start();
  if (warp == consumers && lane == 0) {
    prefetch_map(&weight_map);
    prefetch_map(&x_map);
    for (int slot = 0; slot < t.stages; ++slot) {
      barrier_init(&full[slot], 1);
      barrier_init(&empty[slot], consumers);
    }
    barrier_init_done();
  }
  __syncthreads();

  if (warp == consumers) {
    // ---- producer ----
    if (lane == 0) {
      const uint64_t weight_policy = t.reread ? evict_normally() : evict_first(), x_policy = evict_normally();
      const int stage_bytes = t.chunks * (chunk_bytes + t.x_copied * kRowBytes);
      const auto load_weights = [&](int tile, int step, int slot) {
        barrier_arrive_expecting(&full[slot], stage_bytes);
        for (int c = 0; c < t.chunks; ++c) {
          uint8_t* to = weight_ring + (slot * t.chunks + c) * chunk_bytes;
          const int k = (step * t.chunks + c) * kChunk;
          if (p.is_gated) {
            const int gate = tile * (t.rows / 2), up = p.out_features / 2 + gate;
            copy_box(to, &weight_map, k, gate, &full[slot], weight_policy);
            copy_box(to + chunk_bytes / 2, &weight_map, k, up, &full[slot], weight_policy);
          } else {
            copy_box(to, &weight_map, k, tile * t.rows, &full[slot], weight_policy);
          }
        }
      };
      const auto load_x = [&](int step, int slot) {
        for (int c = 0; c < t.chunks; ++c) {
          copy_box(x_ring + (slot * t.chunks + c) * x_chunk_bytes, &x_map, (step * t.chunks + c) * kChunk,
                   block_token, &full[slot], x_policy);
        }
      };
      // The weights are older than this step: the first ring of them travels while the previous kernel ends.
      const int ahead = min(t.stages, own_steps);
      for (int i = 0; i < ahead; ++i) load_weights(blockIdx.x + i / t.steps * gridDim.x, i % t.steps, i);
      wait_for_previous();
      for (int i = 0; i < ahead; ++i) load_x(i % t.steps, i);

      int slot = 0, step = ahead % t.steps, tile = blockIdx.x + ahead / t.steps * gridDim.x;
      uint32_t parity = 0;
      for (int i = ahead; i < own_steps; ++i) {
        barrier_wait(&empty[slot], parity);
        load_weights(tile, step, slot);
        load_x(step, slot);
        if (++step == t.steps) step = 0, tile += gridDim.x;
        if (++slot == t.stages) slot = 0, parity ^= 1;
      }
    } else {
      wait_for_previous();
    }
    return;
  }

  // ---- consumer ----
  const int row_warp = warp % t.row_warps, token_warp = warp / t.row_warps;
  // Where in a chunk this lane's addresses for ldmatrix start; 16-byte column j of K is at start ^ (j << 4).
  int weight_start[kStrips], x_start[kGroups];
#pragma unroll
  for (int s = 0; s < kStrips; ++s) {
    const int strip = row_warp * kStrips + s, half = lane / 8 % 2;
    const int row = p.is_gated ? half * (t.rows / 2) + strip * 8 + lane % 8 : strip * 16 + lane % 16;
    weight_start[s] = row * kRowBytes + ((lane / 16 ^ row % 8) << 4);
  }
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
    const int token = (token_warp * kGroups + g) * 8 + lane % 8;
    x_start[g] = token * kRowBytes + ((lane / 8 ^ token % 8) << 4);
  }
  // Half a chunk, two k16 steps, of operands.
  struct Half {
    uint32_t weight[kStrips][2][4], x[kGroups][4];
  };
  const auto load_half = [&](Half& to, int slot, int chunk, int half) {
    const uint32_t weights = shared_address(weight_ring) + (slot * t.chunks + chunk) * chunk_bytes;
    const uint32_t xs = shared_address(x_ring) + (slot * t.chunks + chunk) * x_chunk_bytes;
#pragma unroll
    for (int s = 0; s < kStrips; ++s) {
      load_matrices(to.weight[s][0], weights + (weight_start[s] ^ half * 64));
      load_matrices(to.weight[s][1], weights + (weight_start[s] ^ (half * 64 + 32)));
    }
#pragma unroll
    for (int g = 0; g < kGroups; ++g) load_matrices(to.x[g], xs + (x_start[g] ^ half * 64));
  };
  float d[kStrips][kGroups][4] = {};
  const auto multiply = [&](const Half& half) {
#pragma unroll
    for (int k16 = 0; k16 < 2; ++k16) {
#pragma unroll
      for (int s = 0; s < kStrips; ++s) {
#pragma unroll
        for (int g = 0; g < kGroups; ++g) {
          mma<T>(d[s][g], half.weight[s][k16], half.x[g][2 * k16], half.x[g][2 * k16 + 1]);
        }
      }
    }
  };

  wait_for_previous();
  Half first, second;
  int slot = 0, step = 0, tile = blockIdx.x;
  uint32_t parity = 0;
  barrier_wait(&full[0], 0);
  load_half(first, 0, 0, 0);
  for (int i = 0; i < own_steps; ++i) {
    for (int c = 0; c < t.chunks - 1; ++c) {
      load_half(second, slot, c, 1);
      multiply(first);
      load_half(first, slot, c + 1, 0);
      multiply(second);
    }
    load_half(second, slot, t.chunks - 1, 1);
    multiply(first);
    const int filled = slot;
    if (++slot == t.stages) slot = 0, parity ^= 1;
    if (i + 1 < own_steps) {
      barrier_wait(&full[slot], parity);
      load_half(first, slot, 0, 0);
    }
    multiply(second);
    __syncwarp();
    if (lane == 0) barrier_arrive(&empty[filled]);
    if (++step < t.steps) continue;

    // ---- epilogue ----
    const Epilogue<T> end{p, 0, 0};
#pragma unroll
    for (int s = 0; s < kStrips; ++s) {
      const int strip = row_warp * kStrips + s;
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int token = block_token + (token_warp * kGroups + g) * 8 + lane % 4 * 2 + e;
          if (p.is_gated) {
            const int inner = p.out_features / 2, feature = tile * (t.rows / 2) + strip * 8 + lane / 4;
            const T gate = end.rounded(d[s][g][e], feature), up = end.rounded(d[s][g][2 + e], inner + feature);
            end.store(token, feature, inner, gated(p.activation, gate, up));
            continue;
          }
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const int feature = tile * t.rows + strip * 16 + h * 8 + lane / 4;
            T y = end.rounded(d[s][g][2 * h + e], feature);
            if (p.residual != nullptr) y = from_float<T>(end.before(token, feature) + to_float(y));
            end.store(token, feature, p.out_features, y);
          }
        }
#pragma unroll
        for (float& sum : d[s][g]) sum = 0.0f;
      }
    }
    step = 0;
    tile += gridDim.x;
  }
}

// ---- host ----

using EncodeMap = decltype(&cuTensorMapEncodeTiled);

// The driver's encoder, found at run time so that nothing links against libcuda.
EncodeMap find_encoder() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found{};
  if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found) ||
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

bool encode_map(CUtensorMap* map, DType dtype, const Matrix& matrix, int box_rows) {
  static const EncodeMap encode = find_encoder();
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(matrix.columns), static_cast<cuuint64_t>(matrix.rows)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(matrix.stride) * 2};
  const cuuint32_t box[2] = {kChunk, static_cast<cuuint32_t>(box_rows)}, steps[2] = {1, 1};
  const auto type = dtype == DType::f16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  return encode != nullptr &&
         encode(map, type, 2, const_cast<void*>(matrix.data), sizes, strides, box, steps,
                CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

// Two CTAs fit an SM, so that the next kernel's weights arrive while this one ends, unless half an SM then holds
// too few bytes of weights to keep the memory busy (about 32 KB an SM for the time of one read).
constexpr int kHalfSm = 112 * 1024, kWholeSm = 224 * 1024, kBusyBytes = 48 * 1024;
constexpr int kMaxRows = 128;

constexpr int round_up(int value, int to) { return (value + to - 1) / to * to; }

// Rows of a tile: every SM gets the same number of tiles, as few as the longest tile allows.
int rows_for(int out_features, int sms, int granule) {
  for (int waves = 1;; ++waves) {
    const int rows = round_up((out_features + sms * waves - 1) / (sms * waves), granule);
    if (rows <= kMaxRows) return rows;
  }
}

template <int kStrips, int kGroups>
Tiling tiling_for(const SkinnyMatmulParams& p, int token_warps, int sms) {
  Tiling t{};
  t.rows = rows_for(p.out_features, sms, 16 * kStrips);
  t.tiles = (p.out_features + t.rows - 1) / t.rows;
  t.row_warps = t.rows / (16 * kStrips);
  t.token_warps = token_warps;
  t.x_rows = 8 * kGroups * token_warps;
  t.x_copied = min(p.tokens, kBlockTokens);
  t.chunks = t.rows > 64 ? 1 : 2;
  t.steps = (p.in_features + t.chunks * kChunk - 1) / (t.chunks * kChunk);
  const int weight_bytes = t.chunks * t.rows * kRowBytes;
  const int stage_bytes = weight_bytes + t.chunks * t.x_rows * kRowBytes;
  const int half_stages = (kHalfSm - kHeaderBytes) / stage_bytes;
  const int budget = half_stages * weight_bytes >= kBusyBytes ? kHalfSm : kWholeSm;
  t.stages = min(kMaxStages, (budget - kHeaderBytes) / stage_bytes);
  t.reread = p.tokens > kBlockTokens;
  return t;
}

template <typename T, int kStrips, int kGroups>
cudaError_t launch_skinny(const SkinnyMatmulParams& p, DType dtype, int token_warps, int sms, cudaStream_t stream) {
  const Tiling t = tiling_for<kStrips, kGroups>(p, token_warps, sms);
  CUtensorMap weight_map, x_map;
  const Matrix weight{p.weight, p.out_features, p.in_features, p.weight_stride};
  const Matrix x{p.x, p.tokens, p.in_features, p.x_stride};
  if (!encode_map(&weight_map, dtype, weight, p.is_gated ? t.rows / 2 : t.rows) ||
      !encode_map(&x_map, dtype, x, t.x_copied)) {
    return cudaErrorInvalidValue;
  }
  const auto kernel = skinny_matmul_kernel<T, kStrips, kGroups>;
  if (const cudaError_t error =
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kWholeSm)) {
    return error;
  }
  const dim3 grid(static_cast<unsigned>(min(t.tiles, sms)),
                  static_cast<unsigned>((p.tokens + kBlockTokens - 1) / kBlockTokens));
  const int threads = 32 * (t.row_warps * t.token_warps + 1);
  const int shared_bytes = kHeaderBytes + t.stages * t.chunks * (t.rows + t.x_rows) * kRowBytes;
  return launch(kernel, grid, threads, shared_bytes, stream, weight_map, x_map, p, t);
}

}  // namespace

cudaError_t skinny_matmul(const SkinnyMatmulParams& p, DType dtype, cudaStream_t stream) {
  if (p.tokens == 0 || p.out_features == 0) return cudaSuccess;
  int device = 0, sms = 0;
  if (const cudaError_t error = cudaGetDevice(&device)) return error;
  if (const cudaError_t error = cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device)) return error;
  return by_half_dtype(dtype, [&]<typename T>() {
    if (p.tokens <= 8) return launch_skinny<T, 1, 1>(p, dtype, 1, sms, stream);
    if (p.tokens <= 16) return launch_skinny<T, 1, 2>(p, dtype, 1, sms, stream);
    if (p.tokens <= 32) return launch_skinny<T, 2, 2>(p, dtype, 2, sms, stream);
    // Tiles of one warp's height leave room for four warps side by side, one on each scheduler.
    if (rows_for(p.out_features, sms, 32) == 32) return launch_skinny<T, 2, 2>(p, dtype, 4, sms, stream);
    return launch_skinny<T, 2, 4>(p, dtype, 2, sms, stream);
  });
}

}  // namespace tgi
