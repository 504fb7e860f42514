// Causal attention of many new tokens per sequence over a paged KV cache: whole prompts, chunks of them,
// mixed batches.
//
// Dao 2023, FlashAttention-2, arXiv:2307.08691. A CTA takes kRows rows of one sequence and KV head:
// consecutive queries, each with all heads of its group, so that keys are read once a group and short queries
// waste fewer masked tiles. Tiles of 64 keys start at position 0 of the sequence and are summed in order,
// rows apart from each other: how a prompt is cut into chunks or which other sequences run beside it changes
// no bit.
#pragma once

#include "attention/cuda.h"
#include "common/copy.cuh"
#include "common/mma.cuh"
#include "common/pdl.cuh"
#include "common/softmax.cuh"

namespace tgi {
namespace prefill {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;
constexpr int kTile = 64;  // keys
constexpr int kPageRows = 16;
constexpr int kTilePages = kTile / kPageRows;

template <typename KV, int kDim>
struct Shape {
  static constexpr int kRowTiles = kDim == 256 ? 1 : 2;  // of 16 rows, of a warp
  static constexpr int kRows = kWarps * kRowTiles * 16;
  static constexpr int kRowBytes = kDim * sizeof(KV);                    // of a key
  static constexpr int kHalfBytes = kTile * kRowBytes;                   // the keys or the values of a tile
  static constexpr int kHalves = kDim == 256 ? 2 : kDim == 128 ? 3 : 4;  // in the ring
  static constexpr int kQueryAt = kHalves * kHalfBytes;
  static constexpr int kPowerAt = kQueryAt + kRows * kDim * 2;  // e4m3: what each row of Q was divided by
  static constexpr int kSharedBytes = kPowerAt + (sizeof(KV) == 1 ? kRows * 4 : 0);
};

// kRows rows of one sequence and KV head. Row r is of query r / group and head r % group of the group.
struct Block {
  int seq, kv_head;
  int first_row, rows;  // of this block; rows of the sequence
  int first_token;      // row of q where the sequence begins
  int first_position;   // of the sequence's first query
  int len;
};

// The blocks of a batch are numbered from the last sequence's last, which has the most keys to see, to the
// first.
template <int kRows>
__device__ __forceinline__ bool find_block(Block& block, const PrefillParams& p, int number) {
  const int group = p.group, lane = threadIdx.x % 32;
  block.kv_head = number % p.kv_heads;
  const int wanted = number / p.kv_heads;
  int before = 0;
  for (int base = 0; base < p.seqs; base += 32) {
    const int seq = p.seqs - 1 - base - lane;
    int first = 0, queries = 0;
    if (seq >= 0) {
      first = p.query_starts[seq];
      queries = p.query_starts[seq + 1] - first;
    }
    const int mine = (queries * group + kRows - 1) / kRows;
    int upto = mine;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int left = __shfl_up_sync(~0u, upto, step);
      if (lane >= step) upto += left;
    }
    const unsigned found = __ballot_sync(~0u, before + upto > wanted);
    if (found != 0) {
      const int from = __ffs(found) - 1;
      block.seq = __shfl_sync(~0u, seq, from);
      block.first_token = __shfl_sync(~0u, first, from);
      block.rows = __shfl_sync(~0u, queries, from) * group;
      const int index = __shfl_sync(~0u, mine - 1 - (wanted - before - (upto - mine)), from);
      block.first_row = index * kRows;
      block.len = min(p.kv_lens[block.seq], p.max_pages * kPageRows);
      block.first_position = block.len - block.rows / group;
      return true;
    }
    before += __shfl_sync(~0u, upto, 31);
  }
  return false;
}

// ---- load ----

template <typename KV, int kDim>
struct Loader {
  using S = Shape<KV, kDim>;
  static constexpr int kChunks = S::kRowBytes / 16;

  const PrefillParams& p;
  const Block& block;
  uint32_t shared;
  int first, len;  // keys some row may see
  int tile, end;
  int pages[kTilePages], next_pages[kTilePages];

  __device__ Loader(const PrefillParams& p, const Block& block, uint32_t shared, int first, int len)
      : p(p),
        block(block),
        shared(shared),
        first(first),
        len(len),
        tile(first / kTile - 1),
        end((len + kTile - 1) / kTile) {
    find_pages();
  }

  __device__ __forceinline__ void find_pages() {
    const int* row = p.page_table + static_cast<int64_t>(block.seq) * p.max_pages;
#pragma unroll
    for (int i = 0; i < kTilePages; ++i) {
      const int page = (tile + 1) * kTilePages + i;
      next_pages[i] = page * kPageRows < len && (page + 1) * kPageRows > first ? row[page] : 0;
    }
  }

  __device__ __forceinline__ void issue(bool values, int slot) {
    if (!values) {
      ++tile;
#pragma unroll
      for (int i = 0; i < kTilePages; ++i) pages[i] = next_pages[i];
      find_pages();
    }
    if (tile < end) copy_half(values, shared + slot * S::kHalfBytes);
    commit_copies();
  }

  // Rows of no key are zeros: what an unused row of a page holds, NaN perhaps, is not read.
  __device__ __forceinline__ void copy_half(bool values, uint32_t to) {
    const int chunk = threadIdx.x % kChunks;
    const int64_t page_head = static_cast<int64_t>(kPageRows) * p.head_dim;
    const KV* base =
        static_cast<const KV*>(p.kv_pages) + block.kv_head * page_head + chunk * (16 / sizeof(KV));
    const bool in_row = chunk * static_cast<int>(16 / sizeof(KV)) < p.head_dim;
    constexpr int kStepRows = kThreads / kChunks;
#pragma unroll
    for (int i = 0; i < kTile / kStepRows; ++i) {
      const int row = threadIdx.x / kChunks + i * kStepRows;
      int page = pages[i * kStepRows / kPageRows];
      if constexpr (kStepRows > kPageRows) page = row / kPageRows % 2 ? pages[2 * i + 1] : pages[2 * i];
      const int key = tile * kTile + row;
      const int64_t at =
          (static_cast<int64_t>(page) * 2 + values) * p.kv_heads * page_head + row % kPageRows * p.head_dim;
      const bool valid = in_row && key >= first && key < len;
      copy_async(to + swizzled<S::kRowBytes>(row, chunk),
                 valid ? base + at : static_cast<const KV*>(p.kv_pages), valid);
    }
  }

  __device__ __forceinline__ void copy_queries(uint32_t to) {
    const int group = p.group;
    const int chunk = threadIdx.x % (kDim / 8);
#pragma unroll
    for (int i = 0; i < S::kRows * kDim / 8 / kThreads; ++i) {
      const int row = threadIdx.x / (kDim / 8) + i * (kThreads / (kDim / 8));
      const int all_row = block.first_row + row;
      const bool valid = all_row < block.rows && chunk * 8 < p.head_dim;
      const int64_t token = block.first_token + all_row / group;
      const uint16_t* from = static_cast<const uint16_t*>(p.q) + token * p.q_stride +
                             (block.kv_head * group + all_row % group) * p.head_dim + chunk * 8;
      copy_async(to + swizzled<kDim * 2>(row, chunk), valid ? from : static_cast<const uint16_t*>(p.q),
                 valid);
    }
  }
};

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

// ---- compute ----

template <typename KV, int kDim>
__device__ __forceinline__ void multiply_keys(float (&s)[Shape<KV, kDim>::kRowTiles][kTile / 8][4],
                                              uint32_t queries, uint32_t keys) {
  using T = Operand<KV>;
  constexpr int kRowTiles = Shape<KV, kDim>::kRowTiles, kRowBytes = kDim * sizeof(KV);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int n = 0; n < kTile / 8; ++n) s[m][n][0] = s[m][n][1] = s[m][n][2] = s[m][n][3] = 0.f;
  }
#pragma unroll
  for (int k = 0; k < kDim / 16; ++k) {
    uint32_t a[kRowTiles][4];
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
      const int row = (warp * kRowTiles + m) * 16 + lane % 16;
      load_matrices(a[m], queries + swizzled<kDim * 2>(row, 2 * k + lane / 16));
    }
    if constexpr (sizeof(KV) == 2) {
#pragma unroll
      for (int pair = 0; pair < kTile / 16; ++pair) {
        uint32_t b[4];
        load_matrices(b,
                      keys + swizzled<kRowBytes>(pair * 16 + lane % 8 + lane / 16 * 8, 2 * k + lane / 8 % 2));
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
          mma<T>(s[m][2 * pair], a[m], b[0], b[1]);
          mma<T>(s[m][2 * pair + 1], a[m], b[2], b[3]);
        }
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
#pragma unroll
          for (int m = 0; m < kRowTiles; ++m) mma<T>(s[m][4 * four + i], a[m], b0, b1);
        }
      }
    }
  }
}

// For e4m3, columns g of a pair of dim tiles are dims 2g and 2g + 1.
template <typename KV, int kDim>
__device__ __forceinline__ void multiply_values(float (&out)[Shape<KV, kDim>::kRowTiles][kDim / 8][4],
                                                const float (&s)[Shape<KV, kDim>::kRowTiles][kTile / 8][4],
                                                uint32_t values) {
  using T = Operand<KV>;
  constexpr int kRowTiles = Shape<KV, kDim>::kRowTiles, kRowBytes = kDim * sizeof(KV);
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int k = 0; k < kTile / 16; ++k) {
    uint32_t a[kRowTiles][4];
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
      a[m][0] = pack<T>(s[m][2 * k][0], s[m][2 * k][1]);
      a[m][1] = pack<T>(s[m][2 * k][2], s[m][2 * k][3]);
      a[m][2] = pack<T>(s[m][2 * k + 1][0], s[m][2 * k + 1][1]);
      a[m][3] = pack<T>(s[m][2 * k + 1][2], s[m][2 * k + 1][3]);
    }
#pragma unroll
    for (int pair = 0; pair < kDim / 16; ++pair) {
      uint32_t b[4];
      if constexpr (sizeof(KV) == 2) {
        load_matrices_transposed(b, values + swizzled<kRowBytes>(k * 16 + lane % 16, 2 * pair + lane / 16));
      } else {
        uint32_t raw[2];
        load_matrices_transposed(raw, values + swizzled<kRowBytes>(k * 16 + lane % 16, pair));
        widen(__byte_perm(raw[0], 0, 0x3120), b[0], b[2]);
        widen(__byte_perm(raw[1], 0, 0x3120), b[1], b[3]);
      }
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        mma<T>(out[m][2 * pair], a[m], b[0], b[1]);
        mma<T>(out[m][2 * pair + 1], a[m], b[2], b[3]);
      }
    }
  }
}

// ---- kernel ----

// Keys and values of a tile go through one ring as two halves. A tile has two barriers: after the first its
// keys are there and the values of the tile before are done with; after the second its values are there and
// its keys done with.
template <typename KV, int kDim>
__global__ void __launch_bounds__(kThreads, kDim == 256 ? 1 : 2)
    kernel(const __grid_constant__ PrefillParams p) {
  using S = Shape<KV, kDim>;
  constexpr int kRowTiles = S::kRowTiles;
  extern __shared__ __align__(128) char shared[];
  const uint32_t ring = shared_address(shared), query_tile = ring + S::kQueryAt;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int group = p.group;

  let_next_start();
  wait_for_previous();
  Block block;
  if (!find_block<S::kRows>(block, p, blockIdx.x)) return;
  const int last_row = min(block.first_row + S::kRows, block.rows) - 1;
  const int first_query = block.first_position + block.first_row / group;
  const int first_key = p.window > 0 ? max(0, first_query - p.window + 1) : 0;
  const int seen = max(0, block.first_position + last_row / group + 1);  // keys that the last row sees
  const int end = (seen + kTile - 1) / kTile;

  Loader<KV, kDim> loader(p, block, ring, first_key, seen);
  loader.copy_queries(query_tile);
#pragma unroll
  for (int half = 0; half < S::kHalves - 1; ++half) loader.issue(half % 2, half);

  // Rows g and g + 8 of each row tile: [m][i].
  float maximum[kRowTiles][2], sum[kRowTiles][2];
  float power[kRowTiles][2];  // e4m3: what rows of Q were divided by
  float out[kRowTiles][kDim / 8][4] = {};
  const auto gain_of = [&](int m, int i) { return sizeof(KV) == 1 ? p.gain * power[m][i] : p.gain; };
  const auto row_of = [&](int m, int i) { return (warp * kRowTiles + m) * 16 + i * 8 + g; };
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int i = 0; i < 2; ++i) maximum[m][i] = negative_infinity(), sum[m][i] = 0.f;
  }
  if constexpr (sizeof(KV) == 1) {
    wait_copies<S::kHalves - 2>();
    __syncthreads();
    float* powers = reinterpret_cast<float*>(shared + S::kPowerAt);
    if (threadIdx.x < S::kRows)
      powers[threadIdx.x] = query_to_f16<kDim>(shared + S::kQueryAt, threadIdx.x, p.q_is_bf16);
    __syncthreads();
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int i = 0; i < 2; ++i) power[m][i] = powers[row_of(m, i)];
    }
  }

  int key_slot = 0;
  for (int tile = first_key / kTile; tile < end; ++tile) {
    const int value_slot = key_slot + 1 == S::kHalves ? 0 : key_slot + 1;
    const int free_slot = key_slot == 0 ? S::kHalves - 1 : key_slot - 1;
    wait_copies<S::kHalves - 2>();
    __syncthreads();
    loader.issue(S::kHalves % 2 == 0, free_slot);

    float s[kRowTiles][kTile / 8][4];
    multiply_keys<KV, kDim>(s, query_tile, ring + key_slot * S::kHalfBytes);

    // Which of a tile's keys a row sees changes none of the arithmetic on the others: how rows share a block
    // leaves no trace.
    const int base = tile * kTile;
    const bool all_seen = base + kTile <= first_query + 1 && (p.window <= 0 || base >= seen - p.window);
    const bool scored = p.cap != 0.f || p.alibi_slopes != nullptr;
    if (scored || !all_seen) {
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int all_row = block.first_row + row_of(m, i);
          const int query = block.first_position + all_row / group;
          const float slope =
              p.alibi_slopes ? p.alibi_slopes[block.kv_head * group + all_row % group] * kLog2e : 0.f;
#pragma unroll
          for (int n = 0; n < kTile / 8; ++n) {
#pragma unroll
            for (int j = 0; j < 2; ++j) {
              const int distance = base + n * 8 + 2 * t + j - query;
              float& score = s[m][n][2 * i + j];
              if (scored) score = score_of(score, gain_of(m, i), p.cap) + slope * distance;
              if (distance > 0 || (p.window > 0 && distance <= -p.window)) score = negative_infinity();
            }
          }
        }
      }
    }

#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
      float rescale[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float top = s[m][0][2 * i];
#pragma unroll
        for (int n = 0; n < kTile / 8; ++n) top = fmaxf(top, fmaxf(s[m][n][2 * i], s[m][n][2 * i + 1]));
        top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
        top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
        const float by = scored ? 1.f : gain_of(m, i);
        const float both = fmaxf(maximum[m][i], top * by);
        const float reference = finite_max(both);
        rescale[i] = exp2_fast(maximum[m][i] - reference);
        maximum[m][i] = both;
        float partial = 0.f;
#pragma unroll
        for (int n = 0; n < kTile / 8; ++n) {
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            s[m][n][2 * i + j] = exp2_fast(__fmaf_rn(s[m][n][2 * i + j], by, -reference));
            partial += s[m][n][2 * i + j];
          }
        }
        sum[m][i] = __fmaf_rn(sum[m][i], rescale[i], partial);
      }
      // Later tiles seldom raise a maximum; a product by 1 left out changes nothing.
      if (__any_sync(~0u, rescale[0] != 1.f || rescale[1] != 1.f)) {
#pragma unroll
        for (int n = 0; n < kDim / 8; ++n) {
          out[m][n][0] *= rescale[0], out[m][n][1] *= rescale[0];
          out[m][n][2] *= rescale[1], out[m][n][3] *= rescale[1];
        }
      }
    }

    wait_copies<S::kHalves - 2>();
    __syncthreads();
    loader.issue(S::kHalves % 2 == 1, key_slot);
    multiply_values<KV, kDim>(out, s, ring + value_slot * S::kHalfBytes);
    key_slot = value_slot + 1 == S::kHalves ? 0 : value_slot + 1;
  }
  wait_copies<0>();

  Block place;  // found again: registers are short above
  find_block<S::kRows>(place, p, blockIdx.x);
  // ---- store: a warp's rows go through its own rows of the query tile, so that they leave as 16 bytes a
  // lane ----
  __syncwarp();
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float total = sum[m][i] + __shfl_xor_sync(~0u, sum[m][i], 1);
      total += __shfl_xor_sync(~0u, total, 2);
      const int head = place.kv_head * group + (place.first_row + row_of(m, i)) % group;
      const float sink = p.sinks ? p.sinks[head] * kLog2e : negative_infinity();
      const float scale = normalizer(maximum[m][i], total, sink) * p.v_scale;
      char* row = shared + S::kQueryAt;
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n) {
        float low = out[m][n][2 * i] * scale, high = out[m][n][2 * i + 1] * scale;
        int chunk = n, place = 4 * t;
        if constexpr (sizeof(KV) == 1) {
          // Of dims 4t to 4t + 3 of 16, the even tile holds the first and third, the odd one the others.
          if (n % 2 == 0) {
            high = out[m][n + 1][2 * i] * scale;
          } else {
            low = out[m][n - 1][2 * i + 1] * scale;
          }
          chunk = n / 2 * 2 + t / 2;
          place = t % 2 * 8 + n % 2 * 4;
        }
        const uint32_t both = p.q_is_bf16 ? pack<__nv_bfloat16>(low, high) : pack<__half>(low, high);
        *reinterpret_cast<uint32_t*>(row + swizzled<kDim * 2>(row_of(m, i), chunk) + place) = both;
      }
    }
  }
  __syncwarp();
  constexpr int kChunks = kDim / 8;
  for (int i = lane; i < kRowTiles * 16 * kChunks; i += 32) {
    const int row = warp * kRowTiles * 16 + i / kChunks, chunk = i % kChunks;
    const int all_row = place.first_row + row;
    if (all_row >= place.rows || chunk * 8 >= p.head_dim) continue;
    const int64_t token = place.first_token + all_row / group;
    const int head = place.kv_head * group + all_row % group;
    const uint4 words =
        *reinterpret_cast<const uint4*>(shared + S::kQueryAt + swizzled<kDim * 2>(row, chunk));
    *reinterpret_cast<uint4*>(static_cast<uint16_t*>(p.out) + token * p.out_stride + head * p.head_dim +
                              chunk * 8) = words;
  }
}

// ---- host ----

template <typename KV, int kDim>
cudaError_t launch_shape(const PrefillParams& p, cudaStream_t stream) {
  using S = Shape<KV, kDim>;
  if (const cudaError_t error = cudaFuncSetAttribute(
          kernel<KV, kDim>, cudaFuncAttributeMaxDynamicSharedMemorySize, S::kSharedBytes))
    return error;
  // Every sequence may end in a block that is not full.
  const int64_t blocks = p.tokens * p.group / S::kRows + p.seqs;
  return launch(kernel<KV, kDim>, dim3(static_cast<unsigned>(blocks * p.kv_heads)), kThreads, S::kSharedBytes,
                stream, p);
}

template <typename KV>
cudaError_t launch_type(const PrefillParams& p, cudaStream_t stream) {
  if (p.head_dim <= 64) return launch_shape<KV, 64>(p, stream);
  if (p.head_dim <= 128) return launch_shape<KV, 128>(p, stream);
  return launch_shape<KV, 256>(p, stream);
}

}  // namespace prefill
}  // namespace tgi
