// Attention of a few new tokens per sequence over a paged KV cache, in one launch.
//
// Dao et al. 2023, Flash-Decoding; here with one summation tree for every batch and for prefill, see tree.h.
// The parts of one level of it, of all sequences and KV heads one after the other, are shared out evenly
// among the CTAs. What a cut separates is merged along the same tree by the last CTA to finish. So the bits
// of a result depend on its own sequence alone.
//
// Keys are the rows of S^T = K·Q^T and head dims those of O^T = V^T·P^T: the tensor cores want 16 rows and 8
// columns, and there are always 16 keys but seldom 16 queries. Warps share a tile's keys for S and the head
// dims for O.
//
// Code is kept small on purpose: a launch starts with a cold instruction cache, and at one short sequence
// that costs more than the arithmetic.
#pragma once

#include "attention/bias.cuh"
#include "attention/decode_merge.cuh"
#include "attention/decode_plan.cuh"
#include "common/copy.cuh"
#include "common/mma.cuh"
#include "common/pdl.cuh"
#include "common/softmax.cuh"

namespace tgi {
namespace decode {

// ---- load ----

// Runs ahead of the arithmetic, half a tile an issue, keys before values, across items. Page numbers are read
// a tile before their use.
template <typename KV, int kDim, int kColumns>
struct Loader {
  using S = Shape<KV, kDim, kColumns>;
  static constexpr int kTile = S::kTile;
  static constexpr int kChunks = S::kRowBytes / 16;
  static constexpr int kStepRows = kThreads / kChunks;  // rows that all threads copy at once

  Item next;
  int slot, stop;  // where the item after it begins, and where this CTA's parts end
  bool fresh, values;
  int query_slot, item_slot;
  int page;  // each lane has the number of one of the tile's

  __device__ __forceinline__ void start(const DecodeParams& p, const Plan& plan) {
    const int share = (plan.total + gridDim.x - 1) / gridDim.x;
    slot = blockIdx.x * share;
    stop = min(slot + share, plan.total);
    query_slot = item_slot = 0;
    values = false;
    find_item(p, plan);
    find_pages(p);
  }

  __device__ __forceinline__ void find_item(const DecodeParams& p, const Plan& plan) {
    fresh = true;
    next = item_at<S>(p, plan, slot, stop);
    slot = min(stop, next.head_slot + parts_of<kTile>(next.first, next.len, plan.shift));
  }

  // Numbers of pages before the first key are read but not used.
  __device__ __forceinline__ void find_pages(const DecodeParams& p) {
    if (next.slot < 0) return;
    const int mine = next.tile * S::kTilePages + threadIdx.x % S::kTilePages;
    page = p.page_table[static_cast<int64_t>(next.seq) * p.max_pages + min(mine, (next.len - 1) / kPageRows)];
  }

  // The next half to its place in the ring.
  __device__ __forceinline__ void issue_half(const DecodeParams& p, uint32_t to) {
    if (next.slot >= 0) copy_half(p, to);
  }

  // With a tile's keys, its item to `items` and, with an item's first, the queries to a place of their own;
  // with its values, on to the tile after it.
  __device__ __forceinline__ void issue_rest(const DecodeParams& p, const Plan& plan, uint32_t queries,
                                             Item* items) {
    if (!values) {
      if (threadIdx.x == 0) items[item_slot] = next;
      item_slot = item_slot + 1 == S::kItems ? 0 : item_slot + 1;
      if (next.slot >= 0 && fresh) {
        copy_queries(p, queries + query_slot * S::kQueryBytes);
        query_slot = query_slot + 1 == S::kQuerySlots ? 0 : query_slot + 1;
        fresh = false;
      }
    } else if (next.slot >= 0) {
      if (++next.tile == next.end) find_item(p, plan);
      find_pages(p);
    }
    values = !values;
    commit_copies();
  }

  __device__ __forceinline__ void copy_half(const DecodeParams& p, uint32_t half) {
    const int row = threadIdx.x / kChunks, chunk = threadIdx.x % kChunks;
    const auto to = [&](int i) { return half + swizzled<S::kRowBytes>(row + i * kStepRows, chunk); };
    const uint32_t row_bytes = p.head_dim * static_cast<uint32_t>(sizeof(KV));
    const uint32_t half_page = p.kv_heads * kPageRows * row_bytes;
    const char* base = static_cast<const char*>(p.kv_pages) + (values ? half_page : 0) +
                       (next.kv_head * kPageRows + row % kPageRows) * row_bytes + chunk * 16;
    const auto row_at = [&](int i) {
      const uint32_t number = __shfl_sync(~0u, page, (row + i * kStepRows) / kPageRows);
      return base + static_cast<uint64_t>(number) * (2 * half_page) + i * kStepRows % kPageRows * row_bytes;
    };
    if (kDim == p.head_dim && next.tile * kTile >= next.first && (next.tile + 1) * kTile <= next.len) {
#pragma unroll
      for (int i = 0; i < kTile / kStepRows; ++i) copy_async(to(i), row_at(i));
      return;
    }
    // Rows of no key become zeros: what an unused row of a page holds, NaN perhaps, is not read.
#pragma unroll
    for (int i = 0; i < kTile / kStepRows; ++i) {
      const int key = next.tile * kTile + row + i * kStepRows;
      const bool valid = chunk * 16 < row_bytes && key >= next.first && key < next.len;
      const char* from = row_at(i);
      copy_async(to(i), valid ? from : static_cast<const char*>(p.kv_pages), valid);
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

// The queries of an item as B operands: kept in registers, or read where they are used. With an e4m3 cache
// they are fp16, and each row divided by the power of two that brings its largest number to [1, 2).
template <typename KV, int kDim, int kColumns>
struct Queries {
  static constexpr bool kKept = !Shape<KV, kDim, kColumns>::kReloadQueries;
  uint32_t fragments[kKept ? kColumns : 1][kKept ? kDim / 16 : 1][2];
  float power[kColumns];  // of query lane / 4
  const char* rows;

  __device__ __forceinline__ void load(const DecodeParams& p, const char* shared) {
    rows = shared;
    if constexpr (sizeof(KV) == 1) {
#pragma unroll
      for (int n = 0; n < kColumns; ++n) power[n] = power_of(p, n);
    }
    if constexpr (kKept) {
#pragma unroll
      for (int n = 0; n < kColumns; ++n) {
#pragma unroll
        for (int k = 0; k < kDim / 16; ++k) read(fragments[n][k], p, n, k);
      }
    }
  }

  // Columns of eight queries, head dims of a step k.
  __device__ __forceinline__ void get(uint32_t (&b)[2], const DecodeParams& p, int n, int k) const {
    if constexpr (kKept) {
      b[0] = fragments[n][k][0], b[1] = fragments[n][k][1];
    } else {
      read(b, p, n, k);
    }
  }

  // Of query lane / 4.
  __device__ __forceinline__ float gain(const DecodeParams& p, int n) const {
    return sizeof(KV) == 1 ? p.gain * power[n] : p.gain;
  }

 private:
  __device__ __forceinline__ void read_raw(uint32_t (&b)[2], int n, int k) const {
    const int lane = threadIdx.x % 32, row = n * 8 + lane / 4, t = lane % 4;
    if constexpr (sizeof(KV) == 2) {
      b[0] = *reinterpret_cast<const uint32_t*>(rows + swizzled<kDim * 2>(row, 2 * k) + 4 * t);
      b[1] = *reinterpret_cast<const uint32_t*>(rows + swizzled<kDim * 2>(row, 2 * k + 1) + 4 * t);
    } else {
      // ldmatrix gives a lane four neighbouring e4m3, so k runs through the dims in fours.
      const uint2 four =
          *reinterpret_cast<const uint2*>(rows + swizzled<kDim * 2>(row, 2 * k + t / 2) + t % 2 * 8);
      b[0] = four.x, b[1] = four.y;
    }
  }

  static __device__ __forceinline__ float2 unpacked(const DecodeParams& p, uint32_t both) {
    return p.q_is_bf16 ? unpack<__nv_bfloat16>(both) : unpack<__half>(both);
  }

  __device__ __forceinline__ void read(uint32_t (&b)[2], const DecodeParams& p, int n, int k) const {
    read_raw(b, n, k);
    if constexpr (sizeof(KV) == 1) {
      const float inverse = __int_as_float((254 << 23) - __float_as_int(power[n]));
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float2 both = unpacked(p, b[i]);
        b[i] = pack<__half>(both.x * inverse, both.y * inverse);
      }
    }
  }

  // Exponents from −100 to 100: the power and its inverse are normal numbers, and rows of zeros stay zero.
  __device__ __forceinline__ float power_of(const DecodeParams& p, int n) const {
    float largest = 0.f;
#pragma unroll
    for (int k = 0; k < kDim / 16; ++k) {
      uint32_t b[2];
      read_raw(b, n, k);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float2 both = unpacked(p, b[i]);
        largest = fmaxf(largest, fmaxf(fabsf(both.x), fabsf(both.y)));
      }
    }
    largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 1));
    largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 2));
    const int exponent = min(max(static_cast<int>(__float_as_uint(largest) >> 23), 27), 227);
    return __int_as_float(exponent << 23);
  }
};

// S^T of this warp's keys, kTile / 4 of them, and all queries.
template <typename KV, int kDim, int kColumns>
__device__ __forceinline__ void multiply_keys(
    float (&products)[Shape<KV, kDim, kColumns>::kKeyTiles][kColumns][4], uint32_t keys,
    const DecodeParams& p, const Queries<KV, kDim, kColumns>& queries) {
  using T = Operand<KV>;
  constexpr int kRowBytes = kDim * sizeof(KV), kKeyTiles = Shape<KV, kDim, kColumns>::kKeyTiles;
  const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * (16 * kKeyTiles) + lane % 16;
#pragma unroll
  for (int m = 0; m < kKeyTiles; ++m) {
#pragma unroll
    for (int n = 0; n < kColumns; ++n)
      products[m][n][0] = products[m][n][1] = products[m][n][2] = products[m][n][3] = 0.f;
  }
  // In order of k, one sum each: as every product of a query and a key is summed wherever it is.
  constexpr int kSteps = 2 / sizeof(KV);  // of 16 dims in 32 bytes
#pragma unroll
  for (int c = 0; c < kRowBytes / 32; ++c) {
    uint32_t b[kSteps][kColumns][2];
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
#pragma unroll
      for (int n = 0; n < kColumns; ++n) queries.get(b[step][n], p, n, kSteps * c + step);
    }
#pragma unroll
    for (int m = 0; m < kKeyTiles; ++m) {
      uint32_t raw[4];
      load_matrices(raw, keys + swizzled<kRowBytes>(row + 16 * m, 2 * c + lane / 16));
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        uint32_t a[4] = {raw[0], raw[1], raw[2], raw[3]};
        if constexpr (sizeof(KV) == 1) {
          widen(raw[2 * step], a[0], a[2]);
          widen(raw[2 * step + 1], a[1], a[3]);
        }
#pragma unroll
        for (int n = 0; n < kColumns; ++n) mma<T>(products[m][n], a, b[step][n][0], b[step][n][1]);
      }
    }
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

// What a row may not see, and, where there are caps or distance biases, scores in place of products.
template <typename KV, int kDim, int kColumns, typename Params>
__device__ __forceinline__ void score_tile(float (&scores)[Shape<KV, kDim, kColumns>::kKeyTiles][kColumns][4],
                                           const Queries<KV, kDim, kColumns>& queries, const Params& p,
                                           const Item& item, bool scored) {
  using S = Shape<KV, kDim, kColumns>;
  const int lane = threadIdx.x % 32;
  const int key = item.tile * S::kTile + threadIdx.x / 32 * (16 * S::kKeyTiles) + lane / 4;
  const int group = p.group;
#pragma unroll
  for (int n = 0; n < kColumns; ++n) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = (item.block * kColumns + n) * 8 + lane % 4 * 2 + i;
      const int position = item.len - p.queries + row / group;
      const float slope = p.alibi_slopes ? p.alibi_slopes[item.kv_head * group + row % group] * kLog2e : 0.f;
      const float gain = __shfl_sync(~0u, queries.gain(p, n), lane % 4 * 8 + 4 * i);
      const float* bias = nullptr;
      if constexpr (has_bias<Params>) {
        const int biased_row = min(row, p.queries * group - 1);
        bias = bias_of(p, static_cast<int64_t>(item.seq) * p.queries + biased_row / group,
                       item.kv_head * group + biased_row % group);
      }
#pragma unroll
      for (int m = 0; m < S::kKeyTiles; ++m) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int distance = key + 16 * m + 8 * h - position;
          float& score = scores[m][n][2 * h + i];
          if (scored) score = with_bias(score_of(score, gain, p.cap), slope, distance);
          if constexpr (has_bias<Params>) score = with_bias_of(p, bias, score, distance + position, distance);
          if (distance > 0 || (p.window > 0 && distance <= -p.window)) score = negative_infinity();
        }
      }
    }
  }
}

// By what the keys of a row of scores are exchanged: four neighbouring rows, and every other row of eight,
// lie in different banks.
__device__ __forceinline__ int score_swap(int row) { return ((row & 3) ^ (row >> 2 & 1)) * 8; }

// Adds a tile to a node: its scores, [query, key], which are products where there is a gain, and its values.
// Every warp takes all of the tile's softmax, and its own dims. Columns go by twos: registers are short.
template <typename KV, int kDim, int kColumns>
__device__ __forceinline__ void add_tile(Node<kDim / 64, kColumns>& node, const float* scores,
                                         uint32_t values, const float (&gain)[kColumns]) {
  using S = Shape<KV, kDim, kColumns>;
  using T = Operand<KV>;
  constexpr int kAtOnce = kColumns == 2 ? 2 : 1;
  const int lane = threadIdx.x % 32;
  const float* mine = scores + lane / 4 * S::kTile + lane % 4 * 2;
  const int swap = score_swap(lane / 4);
#pragma unroll
  for (int first = 0; first < kColumns; first += kAtOnce) {
    uint32_t weights[kAtOnce][S::kTile / 16][2];
    typename Node<kDim / 64, kColumns>::Factors by[kAtOnce];
#pragma unroll
    for (int n = 0; n < kAtOnce; ++n) {
      const float* of_row = mine + (first + n) * 8 * S::kTile;
      float2 score[S::kTile / 8];
      float top = negative_infinity();
#pragma unroll
      for (int i = 0; i < S::kTile / 8; ++i) {
        score[i] = *reinterpret_cast<const float2*>(of_row + (i * 8 ^ swap));
        top = fmaxf(top, fmaxf(score[i].x, score[i].y));
      }
      top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
      const float by_gain = gain[first + n];
      top = __fmul_rn(fmaxf(top, __shfl_xor_sync(~0u, top, 2)), by_gain);
      const float reference = finite_max(top);
      float even = 0.f, odd = 0.f;
#pragma unroll
      for (int i = 0; i < S::kTile / 8; ++i) {
        const float x = weight_of(score[i].x, by_gain, reference);
        const float y = weight_of(score[i].y, by_gain, reference);
        even += x, odd += y;
        weights[n][i / 2][i % 2] = pack<T>(x, y);
      }
      by[n] = node.merge_sums(first + n, top, sum_of_row(even, odd));
      asm volatile("" ::: "memory");  // scores of one column at a time: registers are short
    }
#pragma unroll
    for (int m = 0; m < S::kDimTiles; ++m) {
      float out[kAtOnce][4] = {};
#pragma unroll
      for (int k = 0; k < S::kTile / 16; ++k) {
        uint32_t a[4];
        load_values<KV, kDim>(a, values, m, k);
#pragma unroll
        for (int n = 0; n < kAtOnce; ++n) mma<T>(out[n], a, weights[n][k][0], weights[n][k][1]);
      }
#pragma unroll
      for (int n = 0; n < kAtOnce; ++n) node.merge_values(m, first + n, out[n], by[n]);
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

// The ring has a tile's keys and values apart, each with a barrier: after it they are there, and the place of
// the half before may be filled anew. Between the two the scores are made, which the second barrier shares.
template <typename KV, int kDim, int kColumns, typename Params>
__global__ void __launch_bounds__(kThreads, Shape<KV, kDim, kColumns>::kResident)
    kernel(const __grid_constant__ Params p, int halves, int sms) {
  using S = Shape<KV, kDim, kColumns>;
  constexpr int kTile = S::kTile;
  extern __shared__ __align__(128) char shared[];
  float* scores = reinterpret_cast<float*>(shared + S::kScoreAt);
  Item* items = reinterpret_cast<Item*>(shared + S::kItemAt);
  Plan plan;
  plan.header = reinterpret_cast<int*>(shared + S::plan_at(halves));
  plan.starts = plan.header + 4;
  plan.lens = plan.starts + p.seqs + 1;
  plan.row_blocks = (p.queries * p.group + S::kRows - 1) / S::kRows;

  wait_for_previous();
  make_plan<S>(plan, p, sms);
  zero_empty(p, plan);

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const bool scored = p.cap != 0.f || p.alibi_slopes != nullptr || has_bias<Params>;
  Loader<KV, kDim, kColumns> loader;
  loader.start(p, plan);
  Queries<KV, kDim, kColumns> queries;
  constexpr bool kHasChunk = S::kLargestShift > S::kNodeShift;
  Node<kDim / 64, kColumns> node, chunk;  // under way
  bool chunk_used = false;
  int previous = -1, query_slot = -1, begin = 0;  // of items
  int half = 1 - halves;                          // in the ring; negative: it is being filled
  int item_slot = 0;
  bool values = false;
#pragma unroll 1
  while (true) {
    if (halves == S::kHalves) {
      wait_copies<S::kHalves - 2>();
    } else {
      wait_copies<0>();
    }
    __syncthreads();
    const int filled = half <= 0 ? half + halves - 1 : half - 1;
    const Item item = items[item_slot];
    const uint32_t ring = shared_address(shared) + S::kRingAt;
    float products[S::kKeyTiles][kColumns][4];
    if (half >= 0 && !values) {
      if (item.slot < 0) break;
      if (item.slot != previous) {
        previous = item.slot;
        begin = item.tile;
        query_slot = query_slot + 1 == S::kQuerySlots ? 0 : query_slot + 1;
        queries.load(p, shared + query_slot * S::kQueryBytes);
        node.clear();
        chunk_used = false;
      }
      // The queries' place is filled anew no earlier than their item's last products are done.
      multiply_keys<KV, kDim, kColumns>(products, ring + half * S::kHalfBytes, p, queries);
    }
    loader.issue_half(p, ring + filled * S::kHalfBytes);  // while the products are under way
    loader.issue_rest(p, plan, shared_address(shared), items);
    if (half < 0) {
      ++half;
      continue;
    }
    const int now = half;
    half = half + 1 == halves ? 0 : half + 1;
    values = !values;
    if (values) {
      const int base = item.tile * kTile;
      const bool all_seen =
          base + kTile <= item.len - p.queries + 1 && (p.window <= 0 || base >= item.len - p.window);
      if (!all_seen || scored) score_tile<KV, kDim, kColumns, Params>(products, queries, p, item, scored);
      float* mine = scores + lane % 4 * 2 * kTile + lane / 4;
      const int first = warp * (16 * S::kKeyTiles);
      const int swap[2] = {score_swap(lane % 4 * 2), score_swap(lane % 4 * 2 + 1)};
#pragma unroll
      for (int m = 0; m < S::kKeyTiles; ++m) {
#pragma unroll
        for (int n = 0; n < kColumns; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i)
            mine[(n * 8 + i % 2) * kTile + (first + m * 16 + i / 2 * 8 ^ swap[i % 2])] = products[m][n][i];
        }
      }
      continue;
    }
    item_slot = item_slot + 1 == S::kItems ? 0 : item_slot + 1;
    float gain[kColumns];
#pragma unroll
    for (int n = 0; n < kColumns; ++n) gain[n] = scored ? 1.f : queries.gain(p, n);
    add_tile<KV, kDim, kColumns>(node, scores, ring + now * S::kHalfBytes, gain);

    // Full nodes go up; at the end of what is stored, others do as well.
    const int done = item.tile + 1;
    const bool last = done == item.end, stored = last || (done & ((1 << item.shift) - 1)) == 0;
    if (!stored && done % S::kNodeTiles != 0) continue;
    if (kHasChunk && chunk_used) node.follow(chunk);
    chunk_used = !stored;
    if (stored) {
      const int first = (item.first / kTile) >> item.shift;
      const bool all = first == (((item.len - 1) / kTile) >> item.shift);
      store_node<KV, kDim, kColumns>(node, p, item, all, item.head_slot + (item.tile >> item.shift) - first);
      if (last && !all) finish<kDim, S::kRows, S::kMergeLoads>(p, item, begin, plan.header + 2);
    } else {
      chunk = node;
    }
    node.clear();
  }
  let_next_start();  // not before: CTAs of the next kernel beside some of ours would put others behind
  wait_copies<0>();
}

// ---- host ----

template <typename KV, int kDim, int kColumns, typename Params>
cudaError_t launch_shape(const Params& p, cudaStream_t stream) {
  using S = Shape<KV, kDim, kColumns>;
  int device = 0, sms = 0, sm_bytes = 0, most_bytes = 0;
  if (const cudaError_t error = cudaGetDevice(&device)) return error;
  if (const cudaError_t error = cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device))
    return error;
  if (const cudaError_t error =
          cudaDeviceGetAttribute(&sm_bytes, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device))
    return error;
  if (const cudaError_t error =
          cudaDeviceGetAttribute(&most_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device))
    return error;
  // On cards with 99 KB a CTA, a ring of two halves where the usual one has no room.
  const int halves = S::shared_bytes(S::kHalves, p.seqs) <= most_bytes ? S::kHalves : 2;
  const int shared = S::shared_bytes(halves, p.seqs);
  if (const cudaError_t error = cudaFuncSetAttribute(kernel<KV, kDim, kColumns, Params>,
                                                     cudaFuncAttributeMaxDynamicSharedMemorySize, shared))
    return error;
  const int room = sm_bytes / (shared + 1024), resident = room < S::kResident ? room : S::kResident;
  const int64_t row_blocks = (p.queries * p.group + S::kRows - 1) / S::kRows;
  const int64_t tiles = (static_cast<int64_t>(p.max_pages) * kPageRows + S::kTile - 1) / S::kTile;
  const int64_t most = p.seqs * p.kv_heads * row_blocks * tiles;
  const int64_t grid = most < sms * resident ? most : sms * resident;
  return launch(kernel<KV, kDim, kColumns, Params>, dim3(static_cast<unsigned>(grid > 0 ? grid : 1)),
                kThreads, shared, stream, p, halves, sms);
}

template <typename KV, typename Params>
cudaError_t launch_type(const Params& p, cudaStream_t stream) {
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
