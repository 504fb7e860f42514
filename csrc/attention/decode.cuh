// Attention of a few new tokens per sequence over a paged KV cache, in one launch.
//
// Dao et al. 2023, Flash-Decoding; here with one summation tree for every batch, see
// docs/kernels/attention_decode.md: 64 keys are a tile, 4 tiles a node of level 1, 4 of those one of level 2
// and so on, from position 0 of the sequence. The nodes of one level, of all sequences and KV heads one after
// the other, are shared out evenly among the CTAs. What a cut separates is merged along the same tree by the
// last CTA to finish. So the bits of a result depend on its own sequence alone.
//
// Keys are the rows of S^T = K·Q^T and head dims those of O^T = V^T·P^T: the tensor cores want 16 rows and 8
// columns, and there are always 16 keys but seldom 16 queries. Warps share a tile's keys for S and the head
// dims for O.
//
// Code is kept small on purpose: a launch starts with a cold instruction cache, and at one short sequence
// that costs more than the arithmetic.
#pragma once

#include "attention/decode_merge.cuh"
#include "attention/decode_plan.cuh"
#include "common/copy.cuh"
#include "common/mma.cuh"
#include "common/pdl.cuh"
#include "common/softmax.cuh"

namespace tgi {
namespace decode {

// ---- load ----

// Runs ahead of the arithmetic, a tile an issue, across items. Page numbers are read a tile before their use.
template <typename KV, int kDim, int kColumns>
struct Loader {
  using S = Shape<KV, kDim, kColumns>;
  static constexpr int kChunks = S::kRowBytes / 16;
  static constexpr int kStepRows = kThreads / kChunks;  // rows that all threads copy at once

  Item next;
  int slot, stop;  // where the item after it begins, and where this CTA's nodes end
  bool fresh;
  int query_slot;
  int pages[kTilePages];

  __device__ __forceinline__ void start(const DecodeParams& p, const Plan& plan) {
    const int share = (plan.total + gridDim.x - 1) / gridDim.x;
    slot = blockIdx.x * share;
    stop = min(slot + share, plan.total);
    query_slot = 0;
    find_item(p, plan);
    find_pages(p);
  }

  __device__ __forceinline__ void find_item(const DecodeParams& p, const Plan& plan) {
    fresh = true;
    next = item_at<S::kLevels>(p, plan, slot, stop);
    slot = min(stop, next.head_slot + nodes_of(next.first, next.len, plan.shift));
  }

  // Numbers of pages beyond the last key, or before the first, are read but not used.
  __device__ __forceinline__ void find_pages(const DecodeParams& p) {
    if (next.slot < 0) return;
    const int* row = p.page_table + static_cast<int64_t>(next.seq) * p.max_pages;
    if (p.wide_page_table) {
      const int4 four = *reinterpret_cast<const int4*>(row + next.tile * kTilePages);
      pages[0] = four.x, pages[1] = four.y, pages[2] = four.z, pages[3] = four.w;
      return;
    }
    const int last = (next.len - 1) / kPageRows;
#pragma unroll
    for (int i = 0; i < kTilePages; ++i) pages[i] = row[min(next.tile * kTilePages + i, last)];
  }

  // The next tile to a stage.
  __device__ __forceinline__ void issue_tile(const DecodeParams& p, uint32_t stage) {
    if (next.slot >= 0) copy_tile(p, stage);
  }

  // Its item to `item` and, with an item's first tile, its queries to a place of their own; then on to the
  // tile after it.
  __device__ __forceinline__ void issue_rest(const DecodeParams& p, const Plan& plan, uint32_t queries,
                                             Item* item) {
    if (threadIdx.x == 0) *item = next;
    if (next.slot >= 0) {
      if (fresh) {
        copy_queries(p, queries + query_slot * S::kQueryBytes);
        query_slot = query_slot + 1 == S::kQuerySlots ? 0 : query_slot + 1;
      }
      fresh = false;
      if (++next.tile == next.end) find_item(p, plan);
      find_pages(p);
    }
    commit_copies();
  }

  __device__ __forceinline__ void copy_tile(const DecodeParams& p, uint32_t stage) {
    const int row = threadIdx.x / kChunks, chunk = threadIdx.x % kChunks;
    const auto to = [&](int i) { return stage + swizzled<S::kRowBytes>(row + i * kStepRows, chunk); };
    const uint32_t row_bytes = p.head_dim * static_cast<uint32_t>(sizeof(KV));
    const uint32_t half_page = p.kv_heads * kPageRows * row_bytes;
    const char* base = static_cast<const char*>(p.kv_pages) +
                       (next.kv_head * kPageRows + row % kPageRows) * row_bytes + chunk * 16;
    const auto row_at = [&](int i) {
      int page = pages[i * kStepRows / kPageRows];
      if constexpr (kStepRows > kPageRows) page = row < kPageRows ? pages[2 * i] : pages[2 * i + 1];
      return base + static_cast<uint64_t>(static_cast<uint32_t>(page)) * (2 * half_page) +
             i * kStepRows % kPageRows * row_bytes;
    };
    if (kDim == p.head_dim && next.tile * kTile >= next.first && (next.tile + 1) * kTile <= next.len) {
#pragma unroll
      for (int i = 0; i < kTile / kStepRows; ++i) {
        const char* from = row_at(i);
        copy_async(to(i), from);
        copy_async(to(i) + S::kHalfBytes, from + half_page);
      }
      return;
    }
    // Rows of no key become zeros: what an unused row of a page holds, NaN perhaps, is not read.
#pragma unroll
    for (int i = 0; i < kTile / kStepRows; ++i) {
      const int key = next.tile * kTile + row + i * kStepRows;
      const bool valid = chunk * 16 < row_bytes && key >= next.first && key < next.len;
      const char* from = valid ? row_at(i) : static_cast<const char*>(p.kv_pages);
      copy_async(to(i), from, valid);
      copy_async(to(i) + S::kHalfBytes, valid ? from + half_page : from, valid);
    }
  }

  __device__ __forceinline__ void copy_queries(const DecodeParams& p, uint32_t to) {
    const int group = p.group;
#pragma unroll 1
    for (int i = threadIdx.x; i < S::kRows * kDim / 8; i += kThreads) {
      const int row = i / (kDim / 8), chunk = i % (kDim / 8);
      const int all_row = next.block * S::kRows + row;
      const bool valid = all_row < p.queries * group && chunk * 8 < p.head_dim;
      const int64_t token = static_cast<int64_t>(next.seq) * p.queries + all_row / group;
      const uint16_t* from = static_cast<const uint16_t*>(p.q) + token * p.q_stride +
                             (next.kv_head * group + all_row % group) * p.head_dim + chunk * 8;
      copy_async(to + swizzled<kDim * 2>(row, chunk), valid ? from : static_cast<const uint16_t*>(p.q),
                 valid);
    }
  }
};

// ---- compute ----

// The queries of an item as B operands. With an e4m3 cache they are fp16 and each row has been divided by a
// power of two.
template <typename KV, int kDim, int kColumns>
struct Queries {
  uint32_t fragments[kColumns][kDim / 16][2];
  float power[kColumns][2];  // of queries 2t and 2t + 1

  __device__ __forceinline__ void load(const DecodeParams& p, const char* shared) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
      const int row = n * 8 + g;
#pragma unroll
      for (int k = 0; k < kDim / 16; ++k) {
        if constexpr (sizeof(KV) == 2) {
          fragments[n][k][0] =
              *reinterpret_cast<const uint32_t*>(shared + swizzled<kDim * 2>(row, 2 * k) + 4 * t);
          fragments[n][k][1] =
              *reinterpret_cast<const uint32_t*>(shared + swizzled<kDim * 2>(row, 2 * k + 1) + 4 * t);
        } else {
          // ldmatrix gives a lane four neighbouring e4m3, so k runs through the dims in fours.
          const uint2 four =
              *reinterpret_cast<const uint2*>(shared + swizzled<kDim * 2>(row, 2 * k + t / 2) + t % 2 * 8);
          fragments[n][k][0] = four.x, fragments[n][k][1] = four.y;
        }
      }
      if constexpr (sizeof(KV) == 1) {
        const float row_power = to_f16(fragments[n], p.q_is_bf16);
        power[n][0] = __shfl_sync(~0u, row_power, 8 * t);
        power[n][1] = __shfl_sync(~0u, row_power, 8 * t + 4);
      }
    }
  }

  __device__ __forceinline__ float gain(const DecodeParams& p, int n, int i) const {
    return sizeof(KV) == 1 ? p.gain * power[n][i] : p.gain;
  }

  // Converts a row to fp16, divided by the power of two that brings its largest number to [1, 2); returns
  // that power.
  static __device__ __forceinline__ float to_f16(uint32_t (&row)[kDim / 16][2], bool from_bf16) {
    float largest = 0.f;
#pragma unroll
    for (int k = 0; k < kDim / 16; ++k) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float2 both = from_bf16 ? unpack<__nv_bfloat16>(row[k][i]) : unpack<__half>(row[k][i]);
        largest = fmaxf(largest, fmaxf(fabsf(both.x), fabsf(both.y)));
      }
    }
    largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 1));
    largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 2));
    // Exponents from −100 to 100: the power and its inverse are normal numbers, and rows of zeros stay zero.
    const int exponent = min(max(static_cast<int>(__float_as_uint(largest) >> 23), 27), 227);
    const float inverse = __int_as_float((254 - exponent) << 23);
#pragma unroll
    for (int k = 0; k < kDim / 16; ++k) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float2 both = from_bf16 ? unpack<__nv_bfloat16>(row[k][i]) : unpack<__half>(row[k][i]);
        row[k][i] = pack<__half>(both.x * inverse, both.y * inverse);
      }
    }
    return __int_as_float(exponent << 23);
  }
};

// S^T of this warp's 16 keys and all queries.
template <typename KV, int kDim, int kColumns>
__device__ __forceinline__ void multiply_keys(float (&products)[kColumns][4], uint32_t keys,
                                              const Queries<KV, kDim, kColumns>& queries) {
  using T = Operand<KV>;
  constexpr int kRowBytes = kDim * sizeof(KV);
  const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane % 16;
  // Even and odd steps are summed apart: two chains of products take half the time of one.
  float odd[kColumns][4] = {};
#pragma unroll
  for (int n = 0; n < kColumns; ++n) products[n][0] = products[n][1] = products[n][2] = products[n][3] = 0.f;
#pragma unroll
  for (int c = 0; c < kRowBytes / 32; ++c) {
    uint32_t raw[4];
    load_matrices(raw, keys + swizzled<kRowBytes>(row, 2 * c + lane / 16));
    if constexpr (sizeof(KV) == 2) {
#pragma unroll
      for (int n = 0; n < kColumns; ++n)
        mma<T>(c % 2 ? odd[n] : products[n], raw, queries.fragments[n][c][0], queries.fragments[n][c][1]);
    } else {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t a[4];
        widen(raw[2 * half], a[0], a[2]);
        widen(raw[2 * half + 1], a[1], a[3]);
        const int k = 2 * c + half;
#pragma unroll
        for (int n = 0; n < kColumns; ++n)
          mma<T>(half ? odd[n] : products[n], a, queries.fragments[n][k][0], queries.fragments[n][k][1]);
      }
    }
  }
#pragma unroll
  for (int n = 0; n < kColumns; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) products[n][i] += odd[n][i];
  }
}

// Head dims m of this warp, keys k of the tile, of V^T. For e4m3, rows g and g + 8 are dims 2g and 2g + 1.
template <typename KV, int kDim>
__device__ __forceinline__ void load_values(uint32_t (&a)[4], uint32_t values, int m, int k) {
  constexpr int kRowBytes = kDim * sizeof(KV);
  const int lane = threadIdx.x % 32, dim = threadIdx.x / 32 * (kDim / kWarps) + m * 16;
  if constexpr (sizeof(KV) == 2) {
    const int row = lane % 8 + lane / 16 * 8;
    load_matrices_transposed(a,
                             values + k * 16 * kRowBytes + swizzled<kRowBytes>(row, dim / 8 + lane / 8 % 2));
  } else {
    uint32_t raw[2];
    load_matrices_transposed(raw, values + k * 16 * kRowBytes + swizzled<kRowBytes>(lane % 16, dim / 16));
    widen(__byte_perm(raw[0], 0, 0x3120), a[0], a[1]);
    widen(__byte_perm(raw[1], 0, 0x3120), a[2], a[3]);
  }
}

// What a row may not see, caps and distance biases: turns a product into a score where a product times gain
// is not one.
template <typename KV, int kDim, int kColumns>
__device__ __forceinline__ void score_tile(float (&scores)[kColumns][4],
                                           const Queries<KV, kDim, kColumns>& queries, const DecodeParams& p,
                                           const Item& item) {
  const int lane = threadIdx.x % 32, key = item.tile * kTile + threadIdx.x / 32 * 16 + lane / 4;
  const int group = p.group;
#pragma unroll
  for (int n = 0; n < kColumns; ++n) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = (item.block * kColumns + n) * 8 + lane % 4 * 2 + i;
      const int position = item.len - p.queries + row / group;
      const float slope = p.alibi_slopes ? p.alibi_slopes[item.kv_head * group + row % group] * kLog2e : 0.f;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int distance = key + 8 * h - position;
        const float score = score_of(scores[n][2 * h + i], queries.gain(p, n, i), p.cap) + slope * distance;
        const bool seen = distance <= 0 && (p.window <= 0 || distance > -p.window);
        scores[n][2 * h + i] = seen ? score : negative_infinity();
      }
    }
  }
}

// A tile's node from its scores, [query, key], and values. Every warp takes all of the tile's softmax, and
// its own dims.
template <typename KV, int kDim, int kColumns>
__device__ __forceinline__ void sum_tile(Node<kDim / 64, kColumns>& node, const float* scores,
                                         uint32_t values) {
  using T = Operand<KV>;
  const int lane = threadIdx.x % 32;
  const float* mine = scores + lane / 4 * kScorePitch + lane % 4 * 2;
  const int moved = lane / 16 * 8;  // see kScorePitch
  uint32_t weights[kColumns][4][2];
#pragma unroll
  for (int n = 0; n < kColumns; ++n) {
    float2 score[8];
    float top = negative_infinity();
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      score[i] =
          *reinterpret_cast<const float2*>(mine + n * 8 * kScorePitch + i * 8 + (i % 2 ? -moved : moved));
      top = fmaxf(top, fmaxf(score[i].x, score[i].y));
    }
    top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
    top = ceilf(fmaxf(top, __shfl_xor_sync(~0u, top, 2)));
    node.maximum[n] = top;
    const float reference = finite_max(top);
#pragma unroll
    for (int i = 0; i < 8; ++i)
      weights[n][i / 2][i % 2] =
          pack<T>(exp2_fast(score[i].x - reference), exp2_fast(score[i].y - reference));
  }
  // Weights are summed as rounded, by the tensor cores: what a weight lost, its sum has lost as well.
  const uint32_t one = pack<T>(1.f, 1.f);
#pragma unroll
  for (int m = 0; m <= kDim / 64; ++m) {
    float out[kColumns][4] = {};
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      uint32_t a[4] = {one, one, one, one};
      if (m < kDim / 64) load_values<KV, kDim>(a, values, m, k);
#pragma unroll
      for (int n = 0; n < kColumns; ++n) mma<T>(out[n], a, weights[n][k][0], weights[n][k][1]);
    }
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
      if (m == kDim / 64) {
        node.sum[n][0] = out[n][0], node.sum[n][1] = out[n][1];
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) node.values[m][n][i] = out[n][i];
      }
    }
  }
}

// ---- kernel ----

// A sequence without keys, such as a graph's padding: zeros.
__device__ __forceinline__ void zero_empty(const DecodeParams& p, const Plan& plan) {
  const int row = p.heads * p.head_dim;
#pragma unroll 1
  for (int seq = blockIdx.x; seq < p.seqs; seq += gridDim.x) {
    if (plan.lens[seq] > 0) continue;
#pragma unroll 1
    for (int i = threadIdx.x; i < p.queries * row; i += kThreads) {
      const int64_t token = static_cast<int64_t>(seq) * p.queries + i / row;
      static_cast<uint16_t*>(p.out)[token * p.out_stride + i % row] = 0;
    }
  }
}

// A tile has two barriers: after the first it is there, and the stage of the tile before may be filled anew;
// after the second its scores are there.
template <typename KV, int kDim, int kColumns>
__global__ void __launch_bounds__(kThreads, Shape<KV, kDim, kColumns>::kResident)
    kernel(const __grid_constant__ DecodeParams p) {
  using S = Shape<KV, kDim, kColumns>;
  extern __shared__ __align__(128) char shared[];
  float* scores = reinterpret_cast<float*>(shared + S::kScoreAt);
  Item* items = reinterpret_cast<Item*>(shared + S::kItemAt);
  Plan plan;
  plan.header = reinterpret_cast<int*>(shared + S::kPlanAt);
  plan.starts = plan.header + 4;
  plan.lens = plan.starts + p.seqs + 1;
  plan.row_blocks = (p.queries * p.group + S::kRows - 1) / S::kRows;

  wait_for_previous();
  make_plan<S::kLevels>(plan, p);
  zero_empty(p, plan);

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  Loader<KV, kDim, kColumns> loader;
  loader.start(p, plan);
  Queries<KV, kDim, kColumns> queries;
  Node<kDim / 64, kColumns> node, upper[S::kLevels - 1];  // under way: of level 1, and above
  int upper_used = 0;                                     // bits
  int previous = -1, query_slot = -1, begin = 0;          // of items
  int stage = 1 - S::kStages;                             // negative: the ring is being filled
#pragma unroll 1
  while (true) {
    wait_copies<S::kStages - 2>();
    __syncthreads();
    const int filled = stage <= 0 ? stage + S::kStages - 1 : stage - 1;
    const Item item = items[max(stage, 0)];
    const uint32_t place = shared_address(shared) + stage * S::kStageBytes;
    float products[kColumns][4];
    if (stage >= 0) {
      if (item.slot < 0) break;
      if (item.slot != previous) {
        previous = item.slot;
        begin = item.tile;
        query_slot = query_slot + 1 == S::kQuerySlots ? 0 : query_slot + 1;
        if (!S::kReloadQueries) queries.load(p, shared + S::kQueryAt + query_slot * S::kQueryBytes);
        node.clear();
        upper_used = 0;
      }
      // Their place is filled anew no earlier than this item's last products are done.
      if (S::kReloadQueries) queries.load(p, shared + S::kQueryAt + query_slot * S::kQueryBytes);
      multiply_keys<KV, kDim, kColumns>(products, place, queries);
    }
    loader.issue_tile(p,
                      shared_address(shared) + filled * S::kStageBytes);  // while the products are under way
    if (stage >= 0) {
      const int base = item.tile * kTile;
      const bool all_seen =
          base + kTile <= item.len - p.queries + 1 && (p.window <= 0 || base >= item.len - p.window);
      if (all_seen && p.cap == 0.f && p.alibi_slopes == nullptr) {
#pragma unroll
        for (int n = 0; n < kColumns; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) products[n][i] *= queries.gain(p, n, i % 2);
        }
      } else {
        score_tile<KV, kDim, kColumns>(products, queries, p, item);
      }
      float* mine = scores + lane % 4 * 2 * kScorePitch + warp * 16 + lane / 4;
      const int moved = lane % 4 / 2 * 8;  // see kScorePitch
#pragma unroll
      for (int n = 0; n < kColumns; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i)
          mine[(n * 8 + i % 2) * kScorePitch + (i / 2 ? 8 - moved : moved)] = products[n][i];
      }
      __syncthreads();
    }
    loader.issue_rest(p, plan, shared_address(shared) + S::kQueryAt, items + filled);
    if (stage < 0) {
      ++stage;
      continue;
    }
    {
      Node<kDim / 64, kColumns> tile;
      sum_tile<KV, kDim, kColumns>(tile, scores, place + S::kHalfBytes);
      node.merge(tile);
    }

    // Full nodes go up; at the end of the item, or of what it stores, the others do as well. A node's first
    // part is copied, not merged.
    const int done = item.tile + 1;
    const bool last = done == item.end, stored = last || (done & ((1 << item.shift) - 1)) == 0;
    if (stored || done % 4 == 0) {
      const auto raise = [&](Node<kDim / 64, kColumns>& above, int bit) {
        if (upper_used & bit) {
          above.merge(node);
          node = above;
        }
        upper_used &= ~bit;
      };
      raise(upper[0], 1);
      const bool twice = S::kLevels > 2 && (stored || done % 16 == 0);
      if (twice) raise(upper[S::kLevels - 2], 2);
      if (stored) {
        const int first = (item.first / kTile) >> item.shift;
        const bool all = first == (((item.len - 1) / kTile) >> item.shift);
        store_node<KV, kDim, kColumns>(node, p, item, all,
                                       item.head_slot + (item.tile >> item.shift) - first);
        if (last && !all) finish<kDim, S::kRows, S::kMergeLoads>(p, item, begin, plan.header + 2);
      } else {
        if (twice) {
          upper[S::kLevels - 2] = node;
        } else {
          upper[0] = node;
        }
        upper_used |= twice ? 2 : 1;
      }
      node.clear();
    }
    stage = stage + 1 == S::kStages ? 0 : stage + 1;
  }
  let_next_start();  // not before: CTAs of the next kernel beside some of ours would put others behind
  wait_copies<0>();
}

// ---- host ----

template <typename KV, int kDim, int kColumns>
cudaError_t launch_shape(const DecodeParams& p, cudaStream_t stream) {
  using S = Shape<KV, kDim, kColumns>;
  const int shared = S::shared_bytes(p.seqs);
  int device = 0, sms = 0, sm_bytes = 0;
  if (const cudaError_t error = cudaGetDevice(&device)) return error;
  if (const cudaError_t error = cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device))
    return error;
  if (const cudaError_t error =
          cudaDeviceGetAttribute(&sm_bytes, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device))
    return error;
  if (const cudaError_t error = cudaFuncSetAttribute(kernel<KV, kDim, kColumns>,
                                                     cudaFuncAttributeMaxDynamicSharedMemorySize, shared))
    return error;
  const int room = sm_bytes / (shared + 1024), resident = room < S::kResident ? room : S::kResident;
  const int64_t row_blocks = (p.queries * p.group + S::kRows - 1) / S::kRows;
  const int64_t tiles = (static_cast<int64_t>(p.max_pages) * kPageRows + kTile - 1) / kTile;
  const int64_t most = p.seqs * p.kv_heads * row_blocks * tiles;
  const int64_t grid = most < sms * resident ? most : sms * resident;
  return launch(kernel<KV, kDim, kColumns>, dim3(static_cast<unsigned>(grid > 0 ? grid : 1)), kThreads,
                shared, stream, p);
}

template <typename KV>
cudaError_t launch_type(const DecodeParams& p, cudaStream_t stream) {
  const int columns = decode_rows(p.queries * p.group, p.head_dim) / 8;
  const auto with_dim = [&]<int kDim>() {
    if (columns == 1) return launch_shape<KV, kDim, 1>(p, stream);
    if (columns == 2) return launch_shape<KV, kDim, 2>(p, stream);
    if constexpr (kDim < 256) return launch_shape<KV, kDim, 4>(p, stream);
    return cudaErrorInvalidValue;
  };
  if (p.head_dim <= 64) return with_dim.template operator()<64>();
  if (p.head_dim <= 128) return with_dim.template operator()<128>();
  return with_dim.template operator()<256>();
}

}  // namespace decode
}  // namespace tgi
