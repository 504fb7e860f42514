// What decode does with a finished node: stores it, and merges the nodes that a cut separated. See
// decode.cuh.
#pragma once

#include "attention/decode_plan.cuh"
#include "common/mma.cuh"
#include "common/softmax.cuh"

namespace tgi {
namespace decode {

// A sum of tiles, as far as a warp has it: its share of the head dims of O^T, of queries 2t and 2t + 1, and
// the maximum and the weights' sum of query lane / 4, of each column tile.
template <int kDimTiles, int kColumns>
struct Node {
  float values[kDimTiles][kColumns][4];
  float maximum[kColumns], sum[kColumns];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
      maximum[n] = negative_infinity();
      sum[n] = 0.f;
#pragma unroll
      for (int m = 0; m < kDimTiles; ++m)
        values[m][n][0] = values[m][n][1] = values[m][n][2] = values[m][n][3] = 0.f;
    }
  }

  // this ← this + a part of that maximum and sum; returns the factors of queries 2t and 2t + 1 for its
  // values.
  struct Factors {
    MergeFactors of[2];
  };
  __device__ __forceinline__ Factors merge_sums(int n, float right_maximum, float right_sum) {
    const int pair = threadIdx.x % 4 * 8;  // of the lanes that have those queries
    const MergeFactors by = merge_maximum(maximum[n], right_maximum);
    sum[n] = merge_value(sum[n], right_sum, by);
    return {{{__shfl_sync(~0u, by.left, pair), __shfl_sync(~0u, by.right, pair)},
             {__shfl_sync(~0u, by.left, pair + 4), __shfl_sync(~0u, by.right, pair + 4)}}};
  }
  __device__ __forceinline__ void merge_values(int m, int n, const float (&right)[4], const Factors& by) {
#pragma unroll
    for (int i = 0; i < 4; ++i) values[m][n][i] = merge_value(values[m][n][i], right[i], by.of[i % 2]);
  }

  // this ← left + this
  __device__ __forceinline__ void follow(const Node& left) {
    Node both = left;
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
      const Factors by = both.merge_sums(n, maximum[n], sum[n]);
#pragma unroll
      for (int m = 0; m < kDimTiles; ++m) both.merge_values(m, n, values[m][n], by);
    }
    *this = both;
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

// A part as the result of its rows where it is all of its sequence, else as one to merge.
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
      const float sum = __shfl_sync(~0u, node.sum[n], 8 * t + 4 * i);
      const int row = n * 8 + 2 * t + i;
      if (row >= rows) continue;
      if (all) {
        const Place place(p, item, item.block * kRows + row);
        const float scale = place.scale(p, maximum, sum);
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
        if (warp == 0 && g == 0) reinterpret_cast<float2*>(p.sums)[at] = make_float2(maximum, sum);
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

// Merges parts `from` to `to`, part i in slot_of(i): one after the other or, where they are tiles, by nodes.
// The sum of all is the result, else a part of the level above, in the place of the first.
template <int kDim, int kRows, int kAtOnce, typename F>
__device__ __forceinline__ void merge_parts(const DecodeParams& p, const Item& item, int level, int from,
                                            int to, F&& slot_of, bool tiles, bool all) {
  const int rows = min(kRows, p.queries * p.group - item.block * kRows);
  const int node_mask = tiles ? Tree<kDim>::kNodeTiles - 1 : 0;
  const float2* sums =
      reinterpret_cast<const float2*>(p.sums) + static_cast<int64_t>(level) * p.slots * kRows;
#pragma unroll 1
  for (int e = threadIdx.x; e < rows * (kDim / 4); e += kThreads) {
    const int row = e / (kDim / 4), dim = e % (kDim / 4) * 4;
    const Quad kEmpty{{}, {negative_infinity(), 0.f}};
    Quad node = kEmpty, total = kEmpty;
#pragma unroll 1
    for (int base = from; base <= to; base += kAtOnce) {
      Quad parts[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        parts[i] = kEmpty;
        if (base + i <= to) {
          const int64_t at = static_cast<int64_t>(slot_of(base + i)) * kRows + row;
          parts[i] = {__ldcg(reinterpret_cast<const float4*>(p.values + at * kDim + dim)), __ldcg(sums + at)};
        }
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        node.merge(parts[i]);
        if ((~(base + i) & node_mask) == 0) {
          total.merge(node);
          node = kEmpty;
        }
      }
    }
    total.merge(node);

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

// Counts parts that are stored; true in all threads of the CTA that stored the last of `needed`.
__device__ __forceinline__ bool all_stored(int* counter, int parts, int needed, int* flag) {
  __syncthreads();
  if (threadIdx.x == 0) {
    const int after = add_acquire_release(counter, parts) + parts;
    if (after == needed) *counter = 0;
    *flag = after == needed;
  }
  __syncthreads();
  return *flag;
}

// An item's parts, from tile `begin` on, are stored. The last CTA of each chunk merges its parts, and the
// last of these the chunks.
template <int kDim, int kRows, int kAtOnce>
__device__ __forceinline__ void finish(const DecodeParams& p, const Item& item, int begin, int* flag) {
  constexpr int kTile = Tree<kDim>::kTile, kChunkShift = Tree<kDim>::kChunkShift;
  const int first_tile = item.first / kTile, last_tile = (item.len - 1) / kTile;
  const int first = first_tile >> item.shift, last = last_tile >> item.shift;
  const int bits = kChunkShift - item.shift;  // log2 of a chunk's parts
  const int first_chunk = first >> bits, chunks = (last >> bits) - first_chunk + 1;
  const auto slot_of_chunk = [&](int chunk) { return item.head_slot + max(chunk << bits, first) - first; };
  int part = begin >> item.shift;
  const int stop = ((item.end - 1) >> item.shift) + 1;
  int merged = bits > 0 ? 0 : stop - part;  // chunks
#pragma unroll 1
  while (bits > 0 && part < stop) {
    const int chunk = part >> bits, from = max(chunk << bits, first),
              to = min(((chunk + 1) << bits) - 1, last);
    const int counted = min(stop, to + 1) - part;
    part += counted;
    const auto slot_of = [&](int i) { return item.head_slot + i - first; };
    if (!all_stored(p.counters + slot_of(from), counted, to - from + 1, flag)) continue;
    merge_parts<kDim, kRows, kAtOnce>(p, item, 0, from, to, slot_of, item.shift == 0, chunks == 1);
    ++merged;
  }
  if (chunks == 1 || merged == 0) return;
  if (!all_stored(p.counters + p.slots + item.head_slot, merged, chunks, flag)) return;
  merge_parts<kDim, kRows, kAtOnce>(p, item, bits > 0, first_chunk, first_chunk + chunks - 1, slot_of_chunk,
                                    false, true);
}

}  // namespace decode
}  // namespace tgi
