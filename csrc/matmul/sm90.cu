// Skinny matrix product at the memory roof: few tokens, every weight read once, K walked in order.
//
// One accumulator per output takes the k16 steps in ascending order, whatever the number of tokens, so a token's bits
// depend on its own row alone; cuBLAS's kernels that do not split K give the same bits. docs/kernels/skinny_matmul.md.
//
//   producer warp:      | weights 0 … s-1 | wait for the previous kernel | x 0 … s-1 | (weights, x) s, s+1, … as slots free
//   consumer warpgroup: | wait slot → wgmma D[64 tokens, rows] += x · weightᵀ → free the slot before | … | epilogue |
#include "activation/gated.cuh"
#include "common/dispatch.cuh"
#include "common/pdl.cuh"
#include "matmul/cuda.h"
#include "matmul/hopper.cuh"

namespace tgi {
namespace {

// ---- device ----

constexpr int kConsumers = 128;
constexpr int kThreads = kConsumers + 32;
constexpr int kTokens = 64;         // rows of the wgmma tile; those past the last token compute what nobody stores
constexpr int kChunk = 64;          // elements of K in one swizzled row of 128 bytes
constexpr int kRowBytes = 128;
constexpr int kMaxStages = 16;
constexpr int kHeaderBytes = 1024;  // the barriers; keeps what follows on the swizzle's 1024 bytes

// Chunks of K in a stage: stages of at least 4 KB of weights, of at most 32.
constexpr int chunks_of(int rows) { return rows > 64 ? 1 : 2; }
// Columns of one wgmma: every tile is a whole number of them.
constexpr int columns_of(int rows) { return rows % 56 == 0 ? 56 : rows % 32 == 0 ? 32 : rows % 24 == 0 ? 24 : 16; }

struct Tiling {
  int tiles;       // along the weight's rows
  int steps;       // stages that cover K
  int stages;      // slots of the ring
  int x_rows;      // tokens in a slot, a multiple of 8
  bool reuse;      // more than one block of tokens reads the weights
};

template <typename T>
struct Pair {
  T low, high;
};

template <typename T>
__device__ __forceinline__ Pair<T> load_pair(const T* from, int left) {
  Pair<T> pair{};
  if (left > 0) pair.low = from[0];
  if (left > 1) pair.high = from[1];
  return pair;
}

// Where a thread's outputs lie: accumulator 4j + 2h + e belongs to token row + 8h and tile column 8j + column + e.
template <typename T, int kRows>
struct Epilogue {
  static constexpr int kGroups = kRows / 8;
  const SkinnyMatmulParams& p;
  int row, column;

  __device__ __forceinline__ T finished(const float* d, int index, const T* bias, int feature) const {
    if (bias == nullptr || feature >= p.out_features) return from_float<T>(d[index]);
    return from_float<T>(d[index] + to_float(bias[feature]));
  }

  __device__ __forceinline__ void store_pair(int token, int feature, int features, Pair<T> y) const {
    if (token >= p.tokens || feature >= features) return;
    T* to = static_cast<T*>(p.out) + token * p.out_stride + feature;
    if (feature + 1 < features && reinterpret_cast<uintptr_t>(to) % sizeof(Pair<T>) == 0) {
      *reinterpret_cast<uint32_t*>(to) = __builtin_bit_cast(uint32_t, y);
      return;
    }
    to[0] = y.low;
    if (feature + 1 < features) to[1] = y.high;
  }

  __device__ __forceinline__ void plain(const float* d, int tile) const {
    const T* bias = static_cast<const T*>(p.bias);
    const T* residual = static_cast<const T*>(p.residual);
#pragma unroll
    for (int j = 0; j < kGroups; ++j) {
      const int feature = tile * kRows + 8 * j + column;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int token = row + 8 * h, left = token < p.tokens ? p.out_features - feature : 0;
        Pair<T> y{finished(d, 4 * j + 2 * h, bias, feature), finished(d, 4 * j + 2 * h + 1, bias, feature + 1)};
        if (residual != nullptr) {
          const Pair<T> before = load_pair(residual + token * p.residual_stride + feature, left);
          y.low = from_float<T>(to_float(before.low) + to_float(y.low));
          y.high = from_float<T>(to_float(before.high) + to_float(y.high));
        }
        store_pair(token, feature, p.out_features, y);
      }
    }
  }

  // The tile's first half of columns are gates, the second half the ups beside them: a thread holds both.
  __device__ __forceinline__ void gated_halves(const float* d, int tile) const {
    const T* bias = static_cast<const T*>(p.bias);
    const int inner = p.out_features / 2;
#pragma unroll
    for (int j = 0; j < kGroups / 2; ++j) {
      const int feature = tile * (kRows / 2) + 8 * j + column;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int gate = 4 * j + 2 * h, up = gate + 2 * kGroups;
        Pair<T> y;
        y.low = gated(p.activation, finished(d, gate, bias, feature), finished(d, up, bias, inner + feature));
        y.high = gated(p.activation, finished(d, gate + 1, bias, feature + 1),
                       finished(d, up + 1, bias, inner + feature + 1));
        store_pair(row + 8 * h, feature, inner, y);
      }
    }
  }
};

template <typename T, int kRows>
__global__ void __launch_bounds__(kThreads, 1)
    skinny_matmul_kernel(const __grid_constant__ CUtensorMap weight_map, const __grid_constant__ CUtensorMap x_map,
                         const SkinnyMatmulParams p, const Tiling t) {
  constexpr int kChunks = chunks_of(kRows), kColumns = columns_of(kRows);
  constexpr int kWeightBytes = kChunks * kRows * kRowBytes;
  extern __shared__ __align__(1024) uint8_t shared[];
  uint64_t* full = reinterpret_cast<uint64_t*>(shared);
  uint64_t* empty = full + kMaxStages;
  const int x_bytes = kChunks * t.x_rows * kRowBytes;
  // x lies first: the tile's 64 rows may reach past a slot's tokens, into other slots and the weights, never outside.
  uint8_t* x_ring = shared + kHeaderBytes;
  uint8_t* weight_ring = x_ring + t.stages * x_bytes;
  const int first_token = blockIdx.y * kTokens;
  const int own_tiles = (t.tiles - static_cast<int>(blockIdx.x) + static_cast<int>(gridDim.x) - 1) / gridDim.x;

  let_next_start();
  if (threadIdx.x >= kConsumers) {
    if (threadIdx.x == kConsumers) {
      prefetch_map(&weight_map);
      prefetch_map(&x_map);
      for (int slot = 0; slot < t.stages; ++slot) {
        barrier_init(&full[slot], 1);
        barrier_init(&empty[slot], kConsumers / 32);
      }
      barrier_init_done();
    }
  }
  __syncthreads();

  if (threadIdx.x >= kConsumers) {
    // ---- producer ----
    if (threadIdx.x == kConsumers) {
      const uint64_t weight_policy = t.reuse ? evict_normally() : evict_first(), x_policy = evict_normally();
      const auto load_weights = [&](int tile, int step, int slot) {
        barrier_arrive_expecting(&full[slot], kWeightBytes + x_bytes);
#pragma unroll
        for (int c = 0; c < kChunks; ++c) {
          uint8_t* to = weight_ring + slot * kWeightBytes + c * kRows * kRowBytes;
          const int k = (step * kChunks + c) * kChunk;
          if (p.is_gated) {
            copy_box(to, &weight_map, k, tile * (kRows / 2), &full[slot], weight_policy);
            copy_box(to + kRows / 2 * kRowBytes, &weight_map, k, p.out_features / 2 + tile * (kRows / 2), &full[slot],
                     weight_policy);
          } else {
            copy_box(to, &weight_map, k, tile * kRows, &full[slot], weight_policy);
          }
        }
      };
      const auto load_x = [&](int step, int slot) {
#pragma unroll
        for (int c = 0; c < kChunks; ++c) {
          copy_box(x_ring + slot * x_bytes + c * t.x_rows * kRowBytes, &x_map, (step * kChunks + c) * kChunk,
                   first_token, &full[slot], x_policy);
        }
      };
      // The weights are older than this step: the first ring of them travels while the previous kernel ends.
      const int ahead = min(t.stages, own_tiles * t.steps);
      for (int i = 0; i < ahead; ++i) load_weights(blockIdx.x + i / t.steps * gridDim.x, i % t.steps, i);
      wait_for_previous();
      for (int i = 0; i < ahead; ++i) load_x(i % t.steps, i);

      int slot = 0, step = ahead % t.steps, tile = blockIdx.x + ahead / t.steps * gridDim.x;
      uint32_t parity = 0;
      for (int i = ahead; i < own_tiles * t.steps; ++i) {
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
  wait_for_previous();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const Epilogue<T, kRows> epilogue{p, first_token + warp * 16 + lane / 4, lane % 4 * 2};
  int slot = 0;
  uint32_t parity = 0;
  for (int tile = blockIdx.x; tile < t.tiles; tile += gridDim.x) {
    float d[kRows / 2];
    int before = -1;
    for (int step = 0; step < t.steps; ++step) {
      barrier_wait(&full[slot], parity);
      wgmma_fence();
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        const uint64_t x_desc = swizzled_operand(x_ring + slot * x_bytes + c * t.x_rows * kRowBytes);
        const uint64_t weight_desc = swizzled_operand(weight_ring + slot * kWeightBytes + c * kRows * kRowBytes);
#pragma unroll
        for (int k16 = 0; k16 < kChunk / 16; ++k16) {
          const bool keep = step > 0 || c > 0 || k16 > 0;
#pragma unroll
          for (int n = 0; n < kRows; n += kColumns) {
            wgmma<kColumns>(d + n / 2, x_desc + k16 * 2, weight_desc + n * kRowBytes / 16 + k16 * 2, keep, T{});
          }
        }
      }
      wgmma_commit();
      wgmma_wait<1>();  // the stage before is read: its slot can be filled
      if (before >= 0 && lane == 0) barrier_arrive(&empty[before]);
      before = slot;
      if (++slot == t.stages) slot = 0, parity ^= 1;
    }
    wgmma_wait<0>();
    if (lane == 0) barrier_arrive(&empty[before]);
    if (p.is_gated) {
      epilogue.gated_halves(d, tile);
    } else {
      epilogue.plain(d, tile);
    }
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

bool encode_map(CUtensorMap* map, DType dtype, const void* data, int columns, int rows, int64_t stride, int box_rows) {
  static const EncodeMap encode = find_encoder();
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(stride) * 2};
  const cuuint32_t box[2] = {kChunk, static_cast<cuuint32_t>(box_rows)}, steps[2] = {1, 1};
  const auto type = dtype == DType::f16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  return encode != nullptr &&
         encode(map, type, 2, const_cast<void*>(data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

// Rows of weights in a tile. An SM's share of the traffic is (rows + x rows) for each of its tiles; the largest share
// sets the time. 4096 → 32 (one tile on each of 128 SMs), 6144 → 48, 14336 → 112, 28672 → 224.
int rows_for(int out_features, int x_rows, int sms) {
  int best = 0, best_share = INT32_MAX;
  for (const int rows : {224, 112, 64, 48, 32, 16}) {
    const int tiles = (out_features + rows - 1) / rows;
    const int share = (tiles + sms - 1) / sms * (rows + x_rows);
    if (share < best_share) best = rows, best_share = share;
  }
  return best;
}

// Two CTAs fit an SM, so that the next kernel's weights arrive while this one ends, unless half an SM then holds too few
// bytes of weights to keep the memory busy (about 32 KB an SM for the time of one read).
constexpr int kHalfSm = 112 * 1024, kWholeSm = 224 * 1024, kBusyBytes = 48 * 1024;

template <typename T, int kRows>
cudaError_t launch_skinny(const SkinnyMatmulParams& p, DType dtype, int x_rows, int sms, cudaStream_t stream) {
  constexpr int kChunks = chunks_of(kRows);
  const int stage_bytes = kChunks * (kRows + x_rows) * kRowBytes;
  const int half_stages = (kHalfSm - kHeaderBytes) / stage_bytes;
  const int budget = half_stages * kChunks * kRows * kRowBytes >= kBusyBytes ? kHalfSm : kWholeSm;
  Tiling t{};
  t.tiles = (p.out_features + kRows - 1) / kRows;
  t.steps = (p.in_features + kChunks * kChunk - 1) / (kChunks * kChunk);
  t.stages = min(kMaxStages, (budget - kHeaderBytes) / stage_bytes);
  t.x_rows = x_rows;
  t.reuse = p.tokens > kTokens;
  CUtensorMap weight_map, x_map;
  const int box_rows = p.is_gated ? kRows / 2 : kRows;
  if (!encode_map(&weight_map, dtype, p.weight, p.in_features, p.out_features, p.weight_stride, box_rows) ||
      !encode_map(&x_map, dtype, p.x, p.in_features, p.tokens, p.x_stride, x_rows)) {
    return cudaErrorInvalidValue;
  }
  const auto kernel = skinny_matmul_kernel<T, kRows>;
  if (const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kWholeSm)) {
    return error;
  }
  const dim3 grid(static_cast<unsigned>(min(t.tiles, sms)),
                  static_cast<unsigned>((p.tokens + kTokens - 1) / kTokens));
  return launch(kernel, grid, kThreads, kHeaderBytes + t.stages * stage_bytes, stream, weight_map, x_map, p, t);
}

}  // namespace

cudaError_t skinny_matmul(const SkinnyMatmulParams& p, DType dtype, cudaStream_t stream) {
  if (p.tokens == 0 || p.out_features == 0) return cudaSuccess;
  int device = 0, sms = 0;
  if (const cudaError_t error = cudaGetDevice(&device)) return error;
  if (const cudaError_t error = cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device)) return error;
  const int x_rows = min(kTokens, (p.tokens + 7) / 8 * 8);
  const int rows = rows_for(p.out_features, x_rows, sms);
  return by_half_dtype(dtype, [&]<typename T>() {
    return by_at_least<16, 32, 48, 64, 112, 224>(rows, [&]<int kRows>() {
      return launch_skinny<T, kRows>(p, dtype, x_rows, sms, stream);
    });
  });
}

}  // namespace tgi
