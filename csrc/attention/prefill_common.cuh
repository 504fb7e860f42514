// What every kernel of prefill shares: how rows are cut into blocks, who takes which, and how a row's sums
// are merged along the tree.
#pragma once

#include "attention/cuda.h"
#include "common/mma.cuh"
#include "common/pdl.cuh"
#include "common/softmax.cuh"

namespace tgi {
namespace prefill {

constexpr int kPageRows = 16;

// ---- blocks ----

// Some rows of one sequence and KV head. Row r is of query r / group and head r % group of the group.
struct Block {
  int seq, kv_head;
  int first_row, rows;  // of this block; rows of the sequence
  int first_token;      // row of q where the sequence begins
  int first_position;   // of the sequence's first query
  int len;
};

// The blocks of a batch are numbered from the last sequence's last, which has the most keys to see, to the
// first.
__device__ __forceinline__ bool find_block(Block& block, const PrefillParams& p, int number, int block_rows) {
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
    const int mine = (queries * group + block_rows - 1) / block_rows;
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
      block.first_row = index * block_rows;
      block.len = min(p.kv_lens[block.seq], p.max_pages * kPageRows);
      block.first_position = block.len - block.rows / group;
      return true;
    }
    before += __shfl_sync(~0u, upto, 31);
  }
  return false;
}

// Blocks are taken as CTAs come free: the first by their index, the others off a counter, which the last CTA
// to find none sets back to zero.
__device__ __forceinline__ int next_number(const PrefillParams& p) {
  return gridDim.x + atomicAdd(p.counters, 1);
}

__device__ __forceinline__ void leave(const PrefillParams& p) {
  if (atomicAdd(p.counters + 1, 1) != static_cast<int>(gridDim.x) - 1) return;
  p.counters[0] = 0;
  p.counters[1] = 0;
}

// ---- sums: of a thread's two rows, g and g + 8 of its warp's 16 ----

// What is known of the part of the tree under way: a node, or a chunk.
struct Rows {
  float maximum[2], sum[2];

  __device__ __forceinline__ void clear() {
    maximum[0] = maximum[1] = negative_infinity();
    sum[0] = sum[1] = 0.f;
  }
};

struct Factors {
  MergeFactors of[2];
};

// rows ← rows + right
__device__ __forceinline__ Factors merge_sums(Rows& rows, const float (&maximum)[2], const float (&sum)[2]) {
  Factors by;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    by.of[i] = merge_maximum(rows.maximum[i], maximum[i]);
    rows.sum[i] = merge_value(rows.sum[i], sum[i], by.of[i]);
  }
  return by;
}

// left ← left + right: a fragment of products, 8 head dims.
__device__ __forceinline__ void merge_values(float (&left)[4], const float (&right)[4], const Factors& by) {
#pragma unroll
  for (int i = 0; i < 4; ++i) left[i] = merge_value(left[i], right[i], by.of[i / 2]);
}

// Where a warp keeps sums that have no room in registers: each lane's own, and those of rows.
struct Place {
  float4* values;  // [head dims / 8][32 lanes]
  float4* rows;    // [8]: maxima of g and g + 8, sums of their weights
};

// The place of a warp of a CTA among the totals, in global memory.
template <int kDim>
__device__ __forceinline__ Place place_of_total(const PrefillParams& p, int warps, int warp) {
  constexpr int kLanes = kDim / 8 * 32;
  const int64_t number = static_cast<int64_t>(blockIdx.x) * warps + warp;
  float4* values = reinterpret_cast<float4*>(p.totals) + number * (kLanes + 8);
  return {values, values + kLanes};
}

// acc ← what is there + acc
template <int kCount>
__device__ __forceinline__ void take(float (&acc)[kCount][4], Rows& rows, Place place) {
  const int lane = threadIdx.x % 32;
  const float4 known = place.rows[lane / 4];
  const Rows right = rows;
  rows.maximum[0] = known.x, rows.maximum[1] = known.y;
  rows.sum[0] = known.z, rows.sum[1] = known.w;
  const Factors by = merge_sums(rows, right.maximum, right.sum);
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const float4 there = place.values[i * 32 + lane];
    float left[4] = {there.x, there.y, there.z, there.w};
    merge_values(left, acc[i], by);
#pragma unroll
    for (int j = 0; j < 4; ++j) acc[i][j] = left[j];
  }
  __syncwarp();
}

template <int kCount>
__device__ __forceinline__ void put(const float (&acc)[kCount][4], const Rows& rows, Place place) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < kCount; ++i)
    place.values[i * 32 + lane] = make_float4(acc[i][0], acc[i][1], acc[i][2], acc[i][3]);
  if (lane % 4 == 0)
    place.rows[lane / 4] = make_float4(rows.maximum[0], rows.maximum[1], rows.sum[0], rows.sum[1]);
  __syncwarp();
}

template <int kCount>
__device__ __forceinline__ void clear(float (&acc)[kCount][4]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) acc[i][0] = acc[i][1] = acc[i][2] = acc[i][3] = 0.f;
}

}  // namespace prefill
}  // namespace tgi
