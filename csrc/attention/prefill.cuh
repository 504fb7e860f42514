// Causal attention of many new tokens per sequence over a paged KV cache: whole prompts, chunks of them,
// mixed batches.
//
// Dao 2023, FlashAttention-2, arXiv:2307.08691; the order of additions is that of tree.h. A CTA takes blocks
// of kRows rows of one sequence and KV head: consecutive queries, each with all heads of its group, so that
// keys are read once a group and short queries waste fewer masked tiles. Rows do not see each other: how a
// prompt is cut into chunks or which other sequences run beside it changes no bit.
//
// A warp has 16 rows, and in registers their scores of a tile and the sums of a node. A tile's values are
// summed 32 head dims at a time.
#pragma once

#include "attention/bias.cuh"
#include "attention/prefill_common.cuh"
#include "common/copy.cuh"

namespace tgi {
namespace prefill {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * 32;
constexpr int kRows = kWarps * 16;
static_assert(kRows == kPrefillRows / 2);

// In shared memory: the block under way, and the number of that after it.
struct Next {
  Block block;
  bool found;
  int number;
};

template <typename KV, int kDim>
struct Shape : Tree<kDim> {
  using Tree<kDim>::kTile;
  static constexpr int kTilePages = kTile / kPageRows;
  static constexpr int kRowBytes = kDim * sizeof(KV);   // of a key
  static constexpr int kHalfBytes = kTile * kRowBytes;  // the keys or the values of a tile
  static constexpr int kPowerAt = kRows * kDim * 2;  // behind Q; e4m3: what each of its rows was divided by
  static constexpr int kBlockAt = kPowerAt + kRows * 4;
  static constexpr int kKeyAt = (kBlockAt + static_cast<int>(sizeof(Next)) + 127) / 128 * 128;
  static constexpr int kValueAt = kKeyAt + kHalfBytes;
  static constexpr int kSharedBytes = kValueAt + kHalfBytes;
  static constexpr int kResident = kDim == 256 ? 1 : 2;
};

// ---- load ----

// Brings a block's keys and values, tile by tile. Numbers of pages are read a tile before their use.
template <typename KV, int kDim>
struct Loader {
  using S = Shape<KV, kDim>;
  static constexpr int kChunks = S::kRowBytes / 16;
  static constexpr int kStepRows = kThreads / kChunks;

  int seq, kv_head;
  int first, len;  // keys some row may see
  int tile, end;
  int page;  // each lane has the number of one of the tile's

  __device__ __forceinline__ void start(const PrefillParams& p, const Block& block, int first_key, int seen) {
    seq = block.seq, kv_head = block.kv_head, first = first_key, len = seen;
    tile = first / S::kTile, end = (len + S::kTile - 1) / S::kTile;
    find_pages(p);
  }

  __device__ __forceinline__ void find_pages(const PrefillParams& p) {
    const int mine = tile * S::kTilePages + threadIdx.x % S::kTilePages;
    const bool used = mine * kPageRows < len && (mine + 1) * kPageRows > first;
    page = used ? p.page_table[static_cast<int64_t>(seq) * p.max_pages + mine] : 0;
  }

  __device__ __forceinline__ void issue(const PrefillParams& p, bool values, uint32_t to) {
    if (tile < end) {
      copy_half(p, values, to);
      if (values) {
        ++tile;
        find_pages(p);
      }
    }
    commit_copies();
  }

  // Rows of no key are zeros: what an unused row of a page holds, NaN perhaps, is not read.
  __device__ __forceinline__ void copy_half(const PrefillParams& p, bool values, uint32_t to) {
    const int row = threadIdx.x / kChunks, chunk = threadIdx.x % kChunks;
    const uint32_t row_bytes = p.head_dim * static_cast<uint32_t>(sizeof(KV));
    const uint32_t half_page = p.kv_heads * kPageRows * row_bytes;
    const char* base = static_cast<const char*>(p.kv_pages) + (values ? half_page : 0) +
                       (kv_head * kPageRows + row % kPageRows) * row_bytes + chunk * 16;
    const auto to_row = [&](int i) { return to + swizzled<S::kRowBytes>(row + i * kStepRows, chunk); };
    uint32_t number = 0;
    const auto from_row = [&](int i) {
      if (kStepRows > kPageRows || i * kStepRows % kPageRows == 0)
        number = __shfl_sync(~0u, page, (row + i * kStepRows) / kPageRows);
      return base + static_cast<uint64_t>(number) * (2 * half_page) + i * kStepRows % kPageRows * row_bytes;
    };
    if (kDim == p.head_dim && tile * S::kTile >= first && (tile + 1) * S::kTile <= len) {
#pragma unroll
      for (int i = 0; i < S::kTile / kStepRows; ++i) copy_async(to_row(i), from_row(i));
      return;
    }
#pragma unroll
    for (int i = 0; i < S::kTile / kStepRows; ++i) {
      const int key = tile * S::kTile + row + i * kStepRows;
      const bool valid = chunk * 16 < row_bytes && key >= first && key < len;
      const char* from = from_row(i);
      copy_async(to_row(i), valid ? from : static_cast<const char*>(p.kv_pages), valid);
    }
  }
};

template <int kDim>
__device__ __forceinline__ void copy_queries(const PrefillParams& p, const Block& block, uint32_t to) {
  const int chunk = threadIdx.x % (kDim / 8);
#pragma unroll 2
  for (int row = threadIdx.x / (kDim / 8); row < kRows; row += kThreads / (kDim / 8)) {
    const int all_row = block.first_row + row;
    const bool valid = all_row < block.rows && chunk * 8 < p.head_dim;
    const int64_t token = block.first_token + all_row / p.group;
    const uint16_t* from = static_cast<const uint16_t*>(p.q) + token * p.q_stride +
                           (block.kv_head * p.group + all_row % p.group) * p.head_dim + chunk * 8;
    copy_async(to + swizzled<kDim * 2>(row, chunk), valid ? from : static_cast<const uint16_t*>(p.q), valid);
  }
}

// Turns a row of Q in shared memory into fp16, divided by the power of two that brings its largest number to
// [1, 2), its dims in the order in which a lane gets those of e4m3 keys; returns the power. One thread a row.
template <int kDim>
__device__ __forceinline__ float query_to_f16(char* shared, int row, bool from_bf16) {
  const auto at = [&](int dim) {  // of a pair
    return reinterpret_cast<uint32_t*>(shared + swizzled<kDim * 2>(row, dim / 8) + dim % 8 * 2);
  };
  const auto read = [&](int dim) {
    return from_bf16 ? unpack<__nv_bfloat16>(*at(dim)) : unpack<__half>(*at(dim));
  };
  float largest = 0.f;
  for (int dim = 0; dim < kDim; dim += 2)
    largest = fmaxf(largest, fmaxf(fabsf(read(dim).x), fabsf(read(dim).y)));
  const int exponent = min(max(static_cast<int>(__float_as_uint(largest) >> 23), 27), 227);
  const float inverse = __int_as_float((254 - exponent) << 23);
  for (int base = 0; base < kDim; base += 16) {
    uint32_t pairs[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float2 both = read(base + 2 * i);
      pairs[i] = pack<__half>(both.x * inverse, both.y * inverse);
    }
    // Columns 2t, 2t+1 and 2t+8, 2t+9 of a step of 16 are dims 4t to 4t+3.
#pragma unroll
    for (int t = 0; t < 4; ++t) {
      *at(base + 2 * t) = pairs[2 * t];
      *at(base + 8 + 2 * t) = pairs[2 * t + 1];
    }
  }
  return __int_as_float(exponent << 23);
}

// ---- compute: a warp's 16 rows ----

template <typename KV, int kDim>
__device__ __forceinline__ void multiply_keys(float (&s)[Tree<kDim>::kTile / 8][4], uint32_t queries,
                                              uint32_t keys) {
  using T = Operand<KV>;
  constexpr int kRowBytes = kDim * sizeof(KV), kTile = Tree<kDim>::kTile;
  const int lane = threadIdx.x % 32;
  clear(s);
#pragma unroll
  for (int k = 0; k < kDim / 16; ++k) {
    uint32_t a[4];
    load_matrices(a, queries + swizzled<kDim * 2>(threadIdx.x / 32 * 16 + lane % 16, 2 * k + lane / 16));
    if constexpr (sizeof(KV) == 2) {
#pragma unroll
      for (int pair = 0; pair < kTile / 16; ++pair) {
        uint32_t b[4];
        load_matrices(b,
                      keys + swizzled<kRowBytes>(pair * 16 + lane % 8 + lane / 16 * 8, 2 * k + lane / 8 % 2));
        mma<T>(s[2 * pair], a, b[0], b[1]);
        mma<T>(s[2 * pair + 1], a, b[2], b[3]);
      }
    } else {
#pragma unroll
      for (int four = 0; four < kTile / 32; ++four) {
        uint32_t raw[4];
        load_matrices(raw, keys + swizzled<kRowBytes>(four * 32 + lane, k));
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          uint32_t b0, b1;
          widen(raw[i], b0, b1);
          mma<T>(s[4 * four + i], a, b0, b1);
        }
      }
    }
  }
}

// Hides what a row may not see and, where there are caps or distance biases, makes scores of products.
template <int kTile, typename Params>
__device__ __forceinline__ void score_tile(float (&s)[kTile / 8][4], const Params& p, const Block& block,
                                           int base, const float (&gain)[2], bool scored) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = block.first_row + threadIdx.x / 32 * 16 + i * 8 + lane / 4;
    const int first = base + lane % 4 * 2 - block.first_position - row / p.group;
    const float slope =
        p.alibi_slopes ? p.alibi_slopes[block.kv_head * p.group + row % p.group] * kLog2e : 0.f;
    const float* bias = nullptr;
    if constexpr (has_bias<Params>) {
      const int biased_row = min(row, block.rows - 1);
      bias = bias_of(p, static_cast<int64_t>(block.first_token) + biased_row / p.group,
                     block.kv_head * p.group + biased_row % p.group);
    }
#pragma unroll
    for (int n = 0; n < kTile / 8; ++n) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int distance = first + n * 8 + j;
        float& score = s[n][2 * i + j];
        if (scored) score = with_bias(score_of(score, gain[i], p.cap), slope, distance);
        score = with_bias_of(p, bias, score, base + lane % 4 * 2 + n * 8 + j, distance);
        if (distance > 0 || (p.window > 0 && distance <= -p.window)) score = negative_infinity();
      }
    }
  }
}

// Scores become weights, relative to the tile's maximum; what they are merged by.
template <typename T, int kTile>
__device__ __forceinline__ Factors weigh(uint32_t (&weights)[kTile / 16][4], float (&s)[kTile / 8][4],
                                         Rows& rows, const float (&gain)[2]) {
  float top[2], sum[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    top[i] = s[0][2 * i];
#pragma unroll
    for (int n = 0; n < kTile / 8; ++n) top[i] = fmaxf(top[i], fmaxf(s[n][2 * i], s[n][2 * i + 1]));
    top[i] = fmaxf(top[i], __shfl_xor_sync(~0u, top[i], 1));
    top[i] = __fmul_rn(fmaxf(top[i], __shfl_xor_sync(~0u, top[i], 2)), gain[i]);
    const float reference = finite_max(top[i]);
    float even = 0.f, odd = 0.f;
#pragma unroll
    for (int n = 0; n < kTile / 8; ++n) {
      const float x = weight_of(s[n][2 * i], gain[i], reference);
      const float y = weight_of(s[n][2 * i + 1], gain[i], reference);
      even += x, odd += y;
      weights[n / 2][n % 2 * 2 + i] = pack<T>(x, y);
    }
    sum[i] = sum_of_row(even, odd);
  }
  return merge_sums(rows, top, sum);
}

// Adds a tile's weighted values to its node's. For e4m3, columns g of a pair of dim tiles are dims 2g, 2g
// + 1.
template <typename KV, int kDim>
__device__ __forceinline__ void add_tile(float (&node)[kDim / 8][4],
                                         const uint32_t (&weights)[Tree<kDim>::kTile / 16][4],
                                         const Factors& by, uint32_t values) {
  using T = Operand<KV>;
  constexpr int kRowBytes = kDim * sizeof(KV), kAtOnce = 4;  // tiles of 8 head dims
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int first = 0; first < kDim / 8; first += kAtOnce) {
    float part[kAtOnce][4] = {};
#pragma unroll
    for (int k = 0; k < Tree<kDim>::kTile / 16; ++k) {
#pragma unroll
      for (int pair = 0; pair < kAtOnce / 2; ++pair) {
        const int chunk = first / 2 + pair, row = k * 16 + lane % 16;
        uint32_t b[4];
        if constexpr (sizeof(KV) == 2) {
          load_matrices_transposed(b, values + swizzled<kRowBytes>(row, 2 * chunk + lane / 16));
        } else {
          uint32_t raw[2];
          load_matrices_transposed(raw, values + swizzled<kRowBytes>(row, chunk));
          widen(__byte_perm(raw[0], 0, 0x3120), b[0], b[2]);
          widen(__byte_perm(raw[1], 0, 0x3120), b[1], b[3]);
        }
        mma<T>(part[2 * pair], weights[k], b[0], b[1]);
        mma<T>(part[2 * pair + 1], weights[k], b[2], b[3]);
      }
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) merge_values(node[first + i], part[i], by);
  }
}

// A warp's rows go through their own rows of the queries, so that they leave as 16 bytes a lane.
template <typename KV, int kDim>
__device__ __forceinline__ void store(const float (&out)[kDim / 8][4], const Rows& rows,
                                      const PrefillParams& p, const Block& block, char* queries) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, warp_row = threadIdx.x / 32 * 16;
  __syncwarp();
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = warp_row + i * 8 + g;
    const int head = block.kv_head * p.group + (block.first_row + row) % p.group;
    const float sink = p.sinks ? p.sinks[head] * kLog2e : negative_infinity();
    const float scale = normalizer(rows.maximum[i], rows.sum[i], sink) * p.v_scale;
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n) {
      float low = out[n][2 * i] * scale, high = out[n][2 * i + 1] * scale;
      int chunk = n, place = 4 * t;
      if constexpr (sizeof(KV) == 1) {
        // Of dims 4t to 4t + 3 of 16, the even tile holds the first and third, the odd one the others.
        if (n % 2 == 0) {
          high = out[n + 1][2 * i] * scale;
        } else {
          low = out[n - 1][2 * i + 1] * scale;
        }
        chunk = n / 2 * 2 + t / 2;
        place = t % 2 * 8 + n % 2 * 4;
      }
      const uint32_t both = p.q_is_bf16 ? pack<__nv_bfloat16>(low, high) : pack<__half>(low, high);
      *reinterpret_cast<uint32_t*>(queries + swizzled<kDim * 2>(row, chunk) + place) = both;
    }
  }
  __syncwarp();
  constexpr int kChunks = kDim / 8;
#pragma unroll 2
  for (int i = lane; i < 16 * kChunks; i += 32) {
    const int row = warp_row + i / kChunks, chunk = i % kChunks, all_row = block.first_row + row;
    if (all_row >= block.rows || chunk * 8 >= p.head_dim) continue;
    const int64_t token = block.first_token + all_row / p.group;
    const int head = block.kv_head * p.group + all_row % p.group;
    *reinterpret_cast<uint4*>(static_cast<uint16_t*>(p.out) + token * p.out_stride + head * p.head_dim +
                              chunk * 8) =
        *reinterpret_cast<const uint4*>(queries + swizzled<kDim * 2>(row, chunk));
  }
}

// ---- kernel ----

// What lies above a node. Chunks, where they are not nodes as for heads of 256, are in local memory: seldom
// used, they would take a quarter of the registers. What is beyond them is in global memory.
template <int kDim>
struct Sums {
  static constexpr bool kHasChunk = kDim < 256;
  float4 chunk[kHasChunk ? kDim / 8 + 1 : 1];  // the last: of rows
  bool total_used;

  __device__ __forceinline__ void start() {
    total_used = false;
    if constexpr (kHasChunk) {
      const float nothing[kDim / 8][4] = {};
      Rows rows;
      rows.clear();
      put_chunk(nothing, rows);
    }
  }

  // The node that ends before `tile` goes up; a new one begins.
  __device__ __forceinline__ void add(float (&node)[kDim / 8][4], Rows& rows, const PrefillParams& p,
                                      int tile) {
    if constexpr (kHasChunk) take_chunk(node, rows);
    if (tile % Tree<kDim>::kChunkTiles == 0) {
      const Place total = place_of_total<kDim>(p, kWarps, threadIdx.x / 32);
      if (total_used) take(node, rows, total);
      total_used = true;
      put(node, rows, total);
      clear(node);
      rows.clear();
    }
    if constexpr (kHasChunk) {
      put_chunk(node, rows);
      clear(node);
      rows.clear();
    }
  }

  // node ← total + chunk + node
  __device__ __forceinline__ void finish(float (&node)[kDim / 8][4], Rows& rows, const PrefillParams& p) {
    if constexpr (kHasChunk) take_chunk(node, rows);
    if (total_used) take(node, rows, place_of_total<kDim>(p, kWarps, threadIdx.x / 32));
  }

 private:
  // An index that the compiler does not know, and so cannot put the array into registers.
  static __device__ __forceinline__ int opaque_zero() {
    int zero = 0;
    asm volatile("" : "+r"(zero));
    return zero;
  }

  __device__ __forceinline__ void put_chunk(const float (&acc)[kDim / 8][4], const Rows& rows) {
    float4* to = chunk + opaque_zero();
#pragma unroll
    for (int i = 0; i < kDim / 8; ++i) to[i] = make_float4(acc[i][0], acc[i][1], acc[i][2], acc[i][3]);
    to[kDim / 8] = make_float4(rows.maximum[0], rows.maximum[1], rows.sum[0], rows.sum[1]);
  }

  // acc ← chunk + acc
  __device__ __forceinline__ void take_chunk(float (&acc)[kDim / 8][4], Rows& rows) const {
    const float4* from = chunk + opaque_zero();
    const float4 known = from[kDim / 8];
    Rows both{{known.x, known.y}, {known.z, known.w}};
    const Factors by = merge_sums(both, rows.maximum, rows.sum);
    rows = both;
#pragma unroll
    for (int i = 0; i < kDim / 8; ++i) {
      const float4 there = from[i];
      float left[4] = {there.x, there.y, there.z, there.w};
      merge_values(left, acc[i], by);
#pragma unroll
      for (int j = 0; j < 4; ++j) acc[i][j] = left[j];
    }
  }
};

// Keys and values have one place each: the next tile's keys arrive while this one's values are summed, and
// its values while the next scores are made.
template <typename KV, int kDim, typename Params>
__device__ __forceinline__ void attend_block(const Params& p, const Block& block, char* shared) {
  using S = Shape<KV, kDim>;
  constexpr int kTile = S::kTile;
  const uint32_t queries = shared_address(shared), keys = queries + S::kKeyAt, values = queries + S::kValueAt;
  const int last_row = min(block.first_row + kRows, block.rows) - 1;
  const int first_query = block.first_position + block.first_row / p.group;
  const int first_key = p.window > 0 ? max(0, first_query - p.window + 1) : 0;
  const int seen = max(0, block.first_position + last_row / p.group + 1);  // keys that the last row sees
  const bool scored = p.cap != 0.f || p.alibi_slopes != nullptr || has_bias<Params>;

  Loader<KV, kDim> loader;
  loader.start(p, block, first_key, seen);
  copy_queries<kDim>(p, block, queries);
  loader.issue(p, false, keys);
  loader.issue(p, true, values);
  float score_gain[2] = {p.gain, p.gain};
  if constexpr (sizeof(KV) == 1) {
    wait_copies<1>();
    __syncthreads();
    float* powers = reinterpret_cast<float*>(shared + S::kPowerAt);
    if (threadIdx.x < kRows) powers[threadIdx.x] = query_to_f16<kDim>(shared, threadIdx.x, p.q_is_bf16);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 2; ++i) score_gain[i] *= powers[threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4 + 8 * i];
  }

  Rows rows;
  rows.clear();
  Sums<kDim> sums;
  sums.start();
  float node[kDim / 8][4] = {};
#pragma unroll 1
  for (int tile = first_key / kTile; tile * kTile < seen; ++tile) {
    wait_copies<1>();
    __syncthreads();
    float s[kTile / 8][4];
    multiply_keys<KV, kDim>(s, queries, keys);
    __syncthreads();
    loader.issue(p, false, keys);
    if (tile > first_key / kTile && tile % S::kNodeTiles == 0) sums.add(node, rows, p, tile);

    // Which of a tile's keys a row sees changes none of the arithmetic on the others: how rows share a block
    // leaves no trace.
    const int base = tile * kTile;
    const bool all_seen = base + kTile <= first_query + 1 && (p.window <= 0 || base >= seen - p.window);
    if (scored || !all_seen) score_tile<kTile, Params>(s, p, block, base, score_gain, scored);
    const float gain[2] = {scored ? 1.f : score_gain[0], scored ? 1.f : score_gain[1]};
    uint32_t weights[kTile / 16][4];
    const Factors by = weigh<Operand<KV>, kTile>(weights, s, rows, gain);
    wait_copies<1>();
    __syncthreads();
    add_tile<KV, kDim>(node, weights, by, values);
    __syncthreads();
    loader.issue(p, true, values);
  }
  wait_copies<0>();
  sums.finish(node, rows, p);
  store<KV, kDim>(node, rows, p, block, shared);
}

template <typename KV, int kDim, typename Params>
__global__ void __launch_bounds__(kThreads, Shape<KV, kDim>::kResident)
    kernel(const __grid_constant__ Params p) {
  using S = Shape<KV, kDim>;
  extern __shared__ __align__(128) char shared[];
  Next& next = *reinterpret_cast<Next*>(shared + S::kBlockAt);
  let_next_start();
  wait_for_previous();
  if (threadIdx.x == 0) next.number = blockIdx.x;
#pragma unroll 1
  while (true) {
    __syncthreads();
    if (threadIdx.x < 32) {
      Block block;
      const bool found = find_block(block, p, next.number, kRows);
      __syncwarp();
      if (threadIdx.x == 0) {
        next.block = block;
        next.found = found;
        if (found) {
          next.number = next_number(p);
        } else {
          leave(p);
        }
      }
    }
    __syncthreads();
    if (!next.found) return;
    attend_block<KV, kDim, Params>(p, next.block, shared);
  }
}

// ---- host ----

template <typename KV, int kDim, typename Params>
cudaError_t launch_shape(const Params& p, cudaStream_t stream) {
  using S = Shape<KV, kDim>;
  if (const cudaError_t error = cudaFuncSetAttribute(
          kernel<KV, kDim, Params>, cudaFuncAttributeMaxDynamicSharedMemorySize, S::kSharedBytes))
    return error;
  int device = 0, sms = 0, sm_bytes = 0;
  if (const cudaError_t error = cudaGetDevice(&device)) return error;
  if (const cudaError_t error = cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device))
    return error;
  if (const cudaError_t error =
          cudaDeviceGetAttribute(&sm_bytes, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device))
    return error;
  const int room = sm_bytes / (S::kSharedBytes + 1024), resident = room < S::kResident ? room : S::kResident;
  // Every sequence may end in a block that is not full.
  const int64_t blocks = (p.tokens * p.group / kRows + p.seqs) * p.kv_heads, most = sms * resident;
  const int64_t grid = blocks < most ? blocks : most;
  return launch(kernel<KV, kDim, Params>, dim3(static_cast<unsigned>(grid)), kThreads, S::kSharedBytes,
                stream, p);
}

template <typename KV, typename Params>
cudaError_t launch_type(const Params& p, cudaStream_t stream) {
  if (p.head_dim <= 64) return launch_shape<KV, 64>(p, stream);
  if (p.head_dim <= 128) return launch_shape<KV, 128>(p, stream);
  return launch_shape<KV, 256>(p, stream);
}

}  // namespace prefill
}  // namespace tgi
