// What decode does with a finished node: stores it, and merges the nodes that a cut separated. See
// decode.cuh.
#pragma once

#include "attention/decode_plan.cuh"
#include "common/mma.cuh"
#include "common/softmax.cuh"

namespace tgi {
namespace decode {

// A node, as far as a warp has it: its share of the head dims of O^T; sums, as if they were one dim more; and
// the maximum of query lane / 4 of each column tile. Values and sums are of queries 2t and 2t + 1.
template <int kDimTiles, int kColumns>
struct Node {
  float values[kDimTiles][kColumns][4];
  float sum[kColumns][2];
  float maximum[kColumns];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
      maximum[n] = negative_infinity();
      sum[n][0] = sum[n][1] = 0.f;
#pragma unroll
      for (int m = 0; m < kDimTiles; ++m)
        values[m][n][0] = values[m][n][1] = values[m][n][2] = values[m][n][3] = 0.f;
    }
  }

  // this ← this + right
  __device__ __forceinline__ void merge(const Node& right) {
    const int pair = threadIdx.x % 4 * 8;
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
      const MergeFactors by = merge_maximum(maximum[n], right.maximum[n]);
      // The factors of queries 2t and 2t + 1 are in lanes 8t and 8t + 4.
      const MergeFactors even{__shfl_sync(~0u, by.left, pair), __shfl_sync(~0u, by.right, pair)};
      const MergeFactors odd{__shfl_sync(~0u, by.left, pair + 4), __shfl_sync(~0u, by.right, pair + 4)};
      sum[n][0] = merge_value(sum[n][0], right.sum[n][0], even);
      sum[n][1] = merge_value(sum[n][1], right.sum[n][1], odd);
#pragma unroll
      for (int m = 0; m < kDimTiles; ++m) {
        values[m][n][0] = merge_value(values[m][n][0], right.values[m][n][0], even);
        values[m][n][1] = merge_value(values[m][n][1], right.values[m][n][1], odd);
        values[m][n][2] = merge_value(values[m][n][2], right.values[m][n][2], even);
        values[m][n][3] = merge_value(values[m][n][3], right.values[m][n][3], odd);
      }
    }
  }
};

// ---- store ----

// Where a row of a block is in out, in elements, and its head.
struct Place {
  int64_t at;
  int head;

  __device__ Place(const DecodeParams& p, const Item& item, int all_row) {
    head = item.kv_head * p.group + all_row % p.group;
    at = (static_cast<int64_t>(item.seq) * p.queries + all_row / p.group) * p.out_stride + head * p.head_dim;
  }

  __device__ float scale(const DecodeParams& p, float maximum, float sum) const {
    return normalizer(maximum, sum, p.sinks ? p.sinks[head] * kLog2e : negative_infinity()) * p.v_scale;
  }
};

// A node as the result of its rows where it is all of its sequence, else as a part to merge.
template <typename KV, int kDim, int kColumns>
__device__ __forceinline__ void store_node(const Node<kDim / 64, kColumns>& node, const DecodeParams& p,
                                           const Item& item, bool all, int slot) {
  constexpr int kRows = 8 * kColumns;
  constexpr int kOther = sizeof(KV) == 1 ? 1 : 8;  // between rows g and g + 8 of a dim tile
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int rows = p.queries * p.group - item.block * kRows;
  const int dim = warp * (kDim / kWarps) + (sizeof(KV) == 1 ? 2 * g : g);
#pragma unroll
  for (int n = 0; n < kColumns; ++n) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float maximum = __shfl_sync(~0u, node.maximum[n], 8 * t + 4 * i);
      const int row = n * 8 + 2 * t + i;
      if (row >= rows) continue;
      if (all) {
        const Place place(p, item, item.block * kRows + row);
        const float scale = place.scale(p, maximum, node.sum[n][i]);
#pragma unroll
        for (int m = 0; m < kDim / 64; ++m) {
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const int at = dim + m * 16 + h * kOther;
            const float value = node.values[m][n][2 * h + i] * scale;
            const uint32_t both =
                p.q_is_bf16 ? pack<__nv_bfloat16>(value, value) : pack<__half>(value, value);
            if (at < p.head_dim) static_cast<uint16_t*>(p.out)[place.at + at] = static_cast<uint16_t>(both);
          }
        }
      } else {
        const int64_t at = static_cast<int64_t>(slot) * kRows + row;
        if (warp == 0 && g == 0) reinterpret_cast<float2*>(p.sums)[at] = make_float2(maximum, node.sum[n][i]);
#pragma unroll
        for (int m = 0; m < kDim / 64; ++m) {
          p.values[at * kDim + dim + m * 16] = node.values[m][n][i];
          p.values[at * kDim + dim + m * 16 + kOther] = node.values[m][n][2 + i];
        }
      }
    }
  }
}

// A row's maximum and sum, and four of its values.
struct Quad {
  float4 value;
  float2 sums;

  __device__ __forceinline__ void merge(const Quad& right) {
    const MergeFactors by = merge_maximum(sums.x, right.sums.x);
    sums.y = merge_value(sums.y, right.sums.y, by);
    value.x = merge_value(value.x, right.value.x, by);
    value.y = merge_value(value.y, right.value.y, by);
    value.z = merge_value(value.z, right.value.z, by);
    value.w = merge_value(value.w, right.value.w, by);
  }
};

// Of what all threads wrote before the barrier that precedes it.
__device__ __forceinline__ int add_acquire_release(int* counter, int value) {
  int before;
  asm volatile("atom.add.acq_rel.gpu.global.s32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(counter), "r"(value)
               : "memory");
  return before;
}

// Merges parts `from` to `to` of up to 64, those of one node three levels above theirs: part i is in
// slot_of(i). The sum of all is the result, else a part again, in the place of the first.
template <int kDim, int kRows, int kAtOnce, typename F>
__device__ __forceinline__ void merge_parts(const DecodeParams& p, const Item& item, int level, int from,
                                            int to, F&& slot_of, bool all) {
  const int rows = min(kRows, p.queries * p.group - item.block * kRows);
  const float2* sums =
      reinterpret_cast<const float2*>(p.sums) + static_cast<int64_t>(level) * p.slots * kRows;
#pragma unroll 1
  for (int e = threadIdx.x; e < rows * (kDim / 4); e += kThreads) {
    const int row = e / (kDim / 4), dim = e % (kDim / 4) * 4;
    const Quad kEmpty{{}, {negative_infinity(), 0.f}};
    Quad sixteen = kEmpty, total = kEmpty;
#pragma unroll 1
    for (int base = from & ~(kAtOnce - 1); base <= to; base += kAtOnce) {
      Quad parts[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        parts[i] = kEmpty;
        if (base + i >= from && base + i <= to) {
          const int64_t at = static_cast<int64_t>(slot_of(base + i)) * kRows + row;
          parts[i] = {__ldcg(reinterpret_cast<const float4*>(p.values + at * kDim + dim)), __ldcg(sums + at)};
        }
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; i += 4) {
#pragma unroll
        for (int j = 1; j < 4; ++j) parts[i].merge(parts[i + j]);
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; i += 4) sixteen.merge(parts[i]);
      if ((base + kAtOnce) % 16 == 0) {
        total.merge(sixteen);
        sixteen = kEmpty;
      }
    }
    total.merge(sixteen);

    if (!all) {
      const int64_t at = static_cast<int64_t>(slot_of(from)) * kRows + row;
      *reinterpret_cast<float4*>(p.values + at * kDim + dim) = total.value;
      // Those of the level above lie apart: other threads still read these.
      if (dim == 0) const_cast<float2*>(sums)[static_cast<int64_t>(p.slots) * kRows + at] = total.sums;
    } else if (dim < p.head_dim) {
      const Place place(p, item, item.block * kRows + row);
      const float scale = place.scale(p, total.sums.x, total.sums.y);
      const float4 v = make_float4(total.value.x * scale, total.value.y * scale, total.value.z * scale,
                                   total.value.w * scale);
      const uint2 both = p.q_is_bf16
                             ? make_uint2(pack<__nv_bfloat16>(v.x, v.y), pack<__nv_bfloat16>(v.z, v.w))
                             : make_uint2(pack<__half>(v.x, v.y), pack<__half>(v.z, v.w));
      *reinterpret_cast<uint2*>(static_cast<uint16_t*>(p.out) + place.at + dim) = both;
    }
  }
}

// An item's parts are stored. The last CTA of each 64 merges those, the last of 64 such merges merges these,
// and so on.
template <int kDim, int kRows, int kAtOnce>
__device__ __forceinline__ void finish(const DecodeParams& p, const Item& item, int begin, int* flag) {
  const int first = (item.first / kTile) >> item.shift, last = ((item.len - 1) / kTile) >> item.shift;
  int node = begin >> item.shift, stop = ((item.end - 1) >> item.shift) + 1;  // not yet counted
  __syncthreads();
#pragma unroll 1
  while (node < stop) {
    int counted = min(stop, ((node >> kMergeBits) + 1) << kMergeBits) - node;
    int child = node;
    node += counted;
#pragma unroll 1
    for (int level = 0, bits = 0;; ++level, bits += kMergeBits) {
      const auto slot_of = [&](int part) { return item.head_slot + max(part << bits, first) - first; };
      const int parent = child >> kMergeBits;
      const int from = max(parent << kMergeBits, first >> bits),
                to = min(((parent + 1) << kMergeBits) - 1, last >> bits);
      if (threadIdx.x == 0) {
        int* counter = p.counters + static_cast<int64_t>(level) * p.slots + slot_of(from);
        const int after = add_acquire_release(counter, counted) + counted;
        if (after > to - from) *counter = 0;
        *flag = after > to - from;
      }
      __syncthreads();
      const bool complete = *flag;
      __syncthreads();
      if (!complete) break;
      const bool all = (first >> bits) == from && (last >> bits) == to;
      merge_parts<kDim, kRows, kAtOnce>(p, item, level, from, to, slot_of, all);
      if (all) break;
      __syncthreads();
      child = parent;
      counted = 1;
    }
  }
}

}  // namespace decode
}  // namespace tgi
