// Prefill for Hopper: the tensor copy engine loads, warpgroup products multiply, and softmax runs under them.
//
// Shah et al. 2024, FlashAttention-3, arXiv:2407.08608; the order of additions is that of tree.h. A CTA, of
// which there is one an SM, takes blocks of 128 rows and is three warpgroups. One brings queries, keys and
// values. Two have 64 rows each and take turns at the tensor cores: while one multiplies, the other makes
// weights of its scores; and each has the next tile's scores under way while it sums this one's values. These
// come 64 head dims at a time from zero and are added to the node's sums: a tile's own sums never take more
// than half the registers of a node's. Chunks are in shared memory, what lies beyond 16384 keys in global.
#include "attention/sm90_prefill_load.cuh"
#include "common/tensor_map.h"
#include "common/wgmma.cuh"

namespace tgi {
namespace prefill90 {

using prefill::Factors;
using prefill::Place;
using prefill::Rows;

// ---- compute: a warpgroup ----

__device__ __forceinline__ void sync_warpgroup(int id) {
  asm volatile("bar.sync %0, 128;" ::"r"(id) : "memory");
}
// The turns of two warpgroups at the tensor cores: one waits for its turn, the other passes it on.
__device__ __forceinline__ void wait_turn(int id) { asm volatile("bar.sync %0, 256;" ::"r"(id) : "memory"); }
__device__ __forceinline__ void pass_turn(int id) {
  asm volatile("bar.arrive %0, 256;" ::"r"(id) : "memory");
}

// Rows of a page beyond the sequence's last key hold anything, NaN perhaps: their weights are 0, and so must
// they be.
template <int kDim>
__device__ __forceinline__ void clear_unused(char* values, int tile, int len) {
  const int first = len - tile * kTile, rows = -len & (kPageRows - 1);
  if (first <= 0 || first >= kTile) return;
  for (int i = threadIdx.x % 128; i < rows * (kDim / 8); i += 128) {
    const int row = first + i / (kDim / 8), chunk = i % (kDim / 8);
    *reinterpret_cast<uint4*>(values + chunk / 8 * kSliceBytes + row * 128 + chunk % 8 * 16) =
        make_uint4(0, 0, 0, 0);
  }
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Hides what a row may not see and, where there are caps or distance biases, makes scores of products.
__device__ __forceinline__ void score_tile(float (&s)[64], const PrefillParams& p, const Work& work,
                                           int warp_row, int base, bool scored) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const Row row(p, work, warp_row + g + 8 * i);
    const int first = base + 2 * t - work.position - row.query;  // distance of the thread's first key
    const auto each = [&](auto&& change) {
#pragma unroll
      for (int n = 0; n < 16; ++n) {
#pragma unroll
        for (int j = 0; j < 2; ++j) change(s[4 * n + 2 * i + j], n * 8 + j);
      }
    };
    if (scored) {
      const float slope = p.alibi_slopes ? p.alibi_slopes[row.head] * kLog2e : 0.f;
      if (p.cap != 0.f) each([&](float& score, int) { score = score_of(score, p.gain, p.cap); });
      if (p.cap == 0.f) each([&](float& score, int) { score = score_of(score, p.gain, 0.f); });
      each([&](float& score, int key) { score = with_bias(score, slope, first + key); });
    }
    each([&](float& score, int key) {
      if (key > -first) score = negative_infinity();
    });
    if (p.window > 0) {
      each([&](float& score, int key) {
        if (key <= -p.window - first) score = negative_infinity();
      });
    }
  }
}

__device__ __forceinline__ void find_tops(float (&top)[2], const float (&s)[64], float gain) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    top[i] = fmaxf(s[2 * i], s[2 * i + 1]);
#pragma unroll
    for (int n = 1; n < 16; ++n) top[i] = fmaxf(top[i], fmaxf(s[4 * n + 2 * i], s[4 * n + 2 * i + 1]));
    top[i] = fmaxf(top[i], __shfl_xor_sync(~0u, top[i], 1));
    top[i] = __fmul_rn(fmaxf(top[i], __shfl_xor_sync(~0u, top[i], 2)), gain);
  }
}

// Scores become weights relative to their tile's maximum; their sums.
__device__ __forceinline__ void weigh(float (&s)[64], float (&sum)[2], const float (&top)[2], float gain) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float reference = finite_max(top[i]);
    float even = 0.f, odd = 0.f;
#pragma unroll
    for (int n = 0; n < 16; ++n) {
      float &x = s[4 * n + 2 * i], &y = s[4 * n + 2 * i + 1];
      x = weight_of(x, gain, reference), y = weight_of(y, gain, reference);
      even += x, odd += y;
    }
    sum[i] = sum_of_row(even, odd);
  }
}

template <typename T>
__device__ __forceinline__ void round_weights(uint32_t (&weights)[8][4], const float (&s)[64]) {
#pragma unroll
  for (int k = 0; k < 8; ++k) {
#pragma unroll
    for (int i = 0; i < 4; ++i) weights[k][i] = pack<T>(s[8 * k + 2 * i], s[8 * k + 2 * i + 1]);
  }
}

template <typename T, int kDim>
__device__ __forceinline__ void multiply_keys(float (&s)[64], uint32_t queries, uint32_t keys) {
#pragma unroll
  for (int k = 0; k < kDim / 16; ++k) {
    const uint32_t at = k / 4 * kSliceBytes + k % 4 * 32;
    warpgroup_mma<T>(s, swizzled_operand(queries + at), swizzled_operand(keys + at), k > 0);
  }
}

// A tile's weighted values: 64 head dims or all, from zero or added.
template <typename T, int kCount>
__device__ __forceinline__ void multiply_values(float (&out)[kCount], const uint32_t (&weights)[8][4],
                                                uint32_t values, bool add = false) {
#pragma unroll
  for (int k = 0; k < 8; ++k)
    warpgroup_mma_across<T>(out, weights[k], swizzled_operand(values + k * 16 * 128, kSliceBytes),
                            add || k > 0);
}

template <int kCount>
__device__ __forceinline__ void add_slice(float (&node)[kCount][4], const float (&tile)[32], int slice,
                                          const Factors& by) {
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float part[4] = {tile[4 * i], tile[4 * i + 1], tile[4 * i + 2], tile[4 * i + 3]};
    prefill::merge_values(node[slice * 8 + i], part, by);
  }
}

// The chunk under way, in shared memory, and the sum of chunks before it, in global: of a warp's rows.
template <int kDim>
struct Sums {
  bool chunk_used, total_used;

  static constexpr int kWarpBytes = kDim / 8 * 32 * 16;
  static __device__ __forceinline__ int warp() { return threadIdx.x / 32 - 4; }
  static __device__ __forceinline__ char* values(char* shared) {
    return shared + Shape<kDim>::kChunkAt + warp() * kWarpBytes;
  }
  static __device__ __forceinline__ Place chunk(char* shared) {
    return {reinterpret_cast<float4*>(values(shared)),
            reinterpret_cast<float4*>(shared + Shape<kDim>::kStatsAt) + warp() * 8};
  }

  // A node that ends before `tile` goes into its chunk, or with it into the total.
  __device__ __forceinline__ void add(float (&node)[kDim / 8][4], Rows& rows, const PrefillParams& p,
                                      char* shared, int tile) {
    if (chunk_used) prefill::take(node, rows, chunk(shared));
    chunk_used = tile % Tree<kDim>::kChunkTiles != 0;
    if (chunk_used) {
      prefill::put(node, rows, chunk(shared));
    } else {
      const Place total = prefill::place_of_total<kDim>(p, 8, warp());
      if (total_used) prefill::take(node, rows, total);
      total_used = true;
      prefill::put(node, rows, total);
    }
    prefill::clear(node);
    rows.clear();
  }

  // node ← total + chunk + node
  __device__ __forceinline__ void finish(float (&node)[kDim / 8][4], Rows& rows, const PrefillParams& p,
                                         char* shared) {
    if (chunk_used) prefill::take(node, rows, chunk(shared));
    if (total_used) prefill::take(node, rows, prefill::place_of_total<kDim>(p, 8, warp()));
  }
};

// A consumer's place in the rings: its tile's number.
struct Ring {
  int tile;
  __device__ __forceinline__ int stage() const { return tile % kStages; }
  __device__ __forceinline__ uint32_t phase() const { return tile / kStages % 2; }
};

__device__ __forceinline__ void release(uint32_t barrier) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) barrier_arrive(barrier);
}

// What a warpgroup works on: 64 rows of a block, and the tile that comes next in the rings.
template <typename T, int kDim>
struct Consumer {
  using S = Shape<kDim>;
  const PrefillParams& p;
  const Work& work;
  char* shared;
  Barriers barriers;
  Ring& ring;
  int warpgroup;
  bool scored;
  float gain;    // of products; of scores 1
  int all_seen;  // tiles before it
  int end;

  __device__ __forceinline__ Consumer(const PrefillParams& p, const Work& work, char* shared,
                                      Barriers barriers, Ring& ring, int warpgroup)
      : p(p),
        work(work),
        shared(shared),
        barriers(barriers),
        ring(ring),
        warpgroup(warpgroup),
        scored(p.cap != 0.f || p.alibi_slopes != nullptr),
        gain(scored ? 1.f : p.gain),
        all_seen((work.position + Row(p, work, warpgroup * 64).query + 1) / kTile),
        end(work.end) {}

  __device__ __forceinline__ int my_turn() const { return 1 + warpgroup; }
  __device__ __forceinline__ int other_turn() const { return 2 - warpgroup; }
  __device__ __forceinline__ uint32_t values() const {
    return shared_address(shared) + S::kValueAt + ring.stage() * S::kTileBytes;
  }

  // Begins a tile's products of queries and keys.
  __device__ __forceinline__ void begin_keys(float (&s)[64], Ring at) const {
    const uint32_t base = shared_address(shared);
    barrier_wait(barriers.keys_full(at.stage()), at.phase());
    products_hold(s);
    products_begin();
    multiply_keys<T, kDim>(s, base + warpgroup * 64 * 128, base + S::kKeyAt + at.stage() * S::kTileBytes);
    products_commit();
  }

  // They are there: what they were made of may go.
  __device__ __forceinline__ void end_keys(float (&s)[64], Ring at, int tile) const {
    products_hold(s);
    release(barriers.keys_empty(at.stage()));
    if (tile + 1 == end) release(barriers.queries_empty());
    if (tile >= all_seen || scored || (p.window > 0 && tile * kTile < work.seen - p.window))
      score_tile(s, p, work, threadIdx.x / 32 * 16 - 64, tile * kTile, scored);
  }

  __device__ __forceinline__ void wait_last_values() const {
    barrier_wait(barriers.values_full(ring.stage()), ring.phase());
    clear_unused<kDim>(shared + S::kValueAt + ring.stage() * S::kTileBytes, end - 1, work.len);
    sync_warpgroup(3 + warpgroup);
  }

  // The weighted values of the rows, not yet divided by the sums.
  __device__ __forceinline__ void attend(float (&node)[kDim / 8][4], Rows& rows) const;

  // The same, summed tile after tile by the products themselves: faster, and not decode's order.
  __device__ __forceinline__ void attend_in_a_row(float (&out)[kDim / 8][4], Rows& rows) const;
};

template <typename T, int kDim>
__device__ __forceinline__ void Consumer<T, kDim>::attend(float (&node)[kDim / 8][4], Rows& rows) const {
  Sums<kDim> sums{};
  float s[64], slice[32], top[2], sum[2];
  uint32_t weights[8][4];
  int tile = work.tile;
  wait_turn(my_turn());
  begin_keys(s, ring);
  pass_turn(other_turn());
  products_wait<0>();
  end_keys(s, ring, tile);
  find_tops(top, s, gain);
  weigh(s, sum, top, gain);
  round_weights<T>(weights, s);
  Factors by = prefill::merge_sums(rows, top, sum);

  // A turn is one run of products: half of the values, the next scores under which these are merged, and the
  // other half, under which the softmax begins.
#pragma unroll 1
  for (++tile; tile < end; ++tile, ++ring.tile) {
    const Ring next{ring.tile + 1};
    barrier_wait(barriers.values_full(ring.stage()), ring.phase());
    wait_turn(my_turn());
    products_hold(slice);
    products_begin();
    multiply_values<T>(slice, weights, values());
    products_commit();
    begin_keys(s, next);
    products_wait<1>();
    products_hold(slice);
    add_slice(node, slice, 0, by);
    if constexpr (S::kSlices == 2) {
      products_hold(slice);
      products_begin();
      multiply_values<T>(slice, weights, values() + kSliceBytes);
      products_commit();
    }
    pass_turn(other_turn());

    products_wait<S::kSlices - 1>();
    end_keys(s, next, tile);
    find_tops(top, s, gain);
    weigh(s, sum, top, gain);
    if constexpr (S::kSlices == 2) {
      products_wait<0>();
      products_hold(slice);
      add_slice(node, slice, 1, by);
    }
    release(barriers.values_empty(ring.stage()));
    round_weights<T>(weights, s);
    if (tile % Tree<kDim>::kNodeTiles == 0) sums.add(node, rows, p, shared, tile);
    by = prefill::merge_sums(rows, top, sum);
  }

  wait_last_values();
#pragma unroll
  for (int i = 0; i < S::kSlices; ++i) {
    products_hold(slice);
    products_begin();
    multiply_values<T>(slice, weights, values() + i * kSliceBytes);
    products_commit();
    products_wait<0>();
    products_hold(slice);
    add_slice(node, slice, i, by);
  }
  release(barriers.values_empty(ring.stage()));
  ++ring.tile;
  sums.finish(node, rows, p, shared);
}

template <typename T, int kDim>
__device__ __forceinline__ void Consumer<T, kDim>::attend_in_a_row(float (&out)[kDim / 8][4],
                                                                   Rows& rows) const {
  float s[64], sums[kDim / 2] = {}, top[2], sum[2], rescale[2];
  uint32_t weights[8][4];
  int tile = work.tile;
  const auto make_weights = [&] {
    find_tops(top, s, gain);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      top[i] = fmaxf(top[i], rows.maximum[i]);
      rescale[i] = exp2_fast(__fsub_rn(rows.maximum[i], finite_max(top[i])));
      rows.maximum[i] = top[i];
    }
    weigh(s, sum, top, gain);
#pragma unroll
    for (int i = 0; i < 2; ++i) rows.sum[i] = __fmaf_rn(rows.sum[i], rescale[i], sum[i]);
  };
  wait_turn(my_turn());
  begin_keys(s, ring);
  pass_turn(other_turn());
  products_wait<0>();
  end_keys(s, ring, tile);
  make_weights();
  round_weights<T>(weights, s);

#pragma unroll 1
  for (++tile; tile < end; ++tile, ++ring.tile) {
    const Ring next{ring.tile + 1};
    wait_turn(my_turn());
    begin_keys(s, next);
    barrier_wait(barriers.values_full(ring.stage()), ring.phase());
    multiply_values<T>(sums, weights, values(), true);
    products_commit();
    pass_turn(other_turn());

    products_wait<1>();
    end_keys(s, next, tile);
    make_weights();
    products_wait<0>();
    products_hold(sums);
    release(barriers.values_empty(ring.stage()));
    // Later tiles seldom raise a maximum; a product by 1 left out changes nothing.
    if (__any_sync(~0u, rescale[0] != 1.f || rescale[1] != 1.f)) {
#pragma unroll
      for (int i = 0; i < kDim / 2; ++i) sums[i] *= rescale[i % 4 / 2];
    }
    round_weights<T>(weights, s);
  }

  wait_last_values();
  products_hold(sums);
  products_begin();
  multiply_values<T>(sums, weights, values(), true);
  products_commit();
  products_wait<0>();
  products_hold(sums);
  release(barriers.values_empty(ring.stage()));
  ++ring.tile;
#pragma unroll
  for (int i = 0; i < kDim / 2; ++i) out[i / 4][i % 4] = sums[i];
}

// A warp's rows leave through its own part of shared memory, as 16 bytes a lane.
template <typename T, int kDim>
__device__ __forceinline__ void store(const float (&out)[kDim / 8][4], const Rows& rows,
                                      const PrefillParams& p, const Work& work, char* staged, int warp_row) {
  constexpr int kHalfBytes = 16 * 128;  // 64 head dims
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int head = Row(p, work, warp_row + g + 8 * i).head;
    const float sink = p.sinks ? p.sinks[head] * kLog2e : negative_infinity();
    const float scale = normalizer(rows.maximum[i], rows.sum[i], sink) * p.v_scale;
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n) {
      *reinterpret_cast<uint32_t*>(staged + n / 8 * kHalfBytes + swizzled<128>(g + 8 * i, n % 8) + 4 * t) =
          pack<T>(out[n][2 * i] * scale, out[n][2 * i + 1] * scale);
    }
  }
  __syncwarp();
  constexpr int kChunks = kDim / 8;
#pragma unroll 2
  for (int i = lane; i < 16 * kChunks; i += 32) {
    const int row = i / kChunks, chunk = i % kChunks;
    if (warp_row + row >= work.rows || chunk * 8 >= p.head_dim) continue;
    const Row at(p, work, warp_row + row);
    uint16_t* to = static_cast<uint16_t*>(p.out) +
                   static_cast<int64_t>(work.token + at.query) * p.out_stride + at.head * p.head_dim +
                   chunk * 8;
    *reinterpret_cast<uint4*>(to) =
        *reinterpret_cast<const uint4*>(staged + chunk / 8 * kHalfBytes + swizzled<128>(row, chunk % 8));
  }
  __syncwarp();
}

template <typename T, int kDim, bool kAnchored>
__device__ __forceinline__ void consume_blocks(const PrefillParams& p, char* shared, Barriers barriers,
                                               int warpgroup) {
  using S = Shape<kDim>;
  Ring ring{0};
  if (warpgroup == 1) pass_turn(1);
#pragma unroll 1
  for (int round = 0;; ++round) {
    barrier_wait(barriers.queries_full(), round % 2);
    const Work& work = reinterpret_cast<const Work*>(shared + S::kWorkAt)[round % kWorks];
    if (work.is_last) break;
    Rows rows;
    rows.clear();
    float node[kDim / 8][4] = {};
    if (work.tile < work.end) {
      const Consumer<T, kDim> consumer(p, work, shared, barriers, ring, warpgroup);
      if constexpr (kAnchored) {
        consumer.attend(node, rows);
      } else {
        consumer.attend_in_a_row(node, rows);
      }
    } else {
      release(barriers.queries_empty());
    }
    store<T, kDim>(node, rows, p, work, Sums<kDim>::values(shared), threadIdx.x / 32 * 16 - 64);
  }
  if (warpgroup == 0) wait_turn(1);  // the last that was passed
}

// ---- kernel ----

template <typename T, int kDim, bool kAnchored>
__global__ void __launch_bounds__(kThreads, 1)
    kernel(const __grid_constant__ CUtensorMap map, const __grid_constant__ CUtensorMap query_map,
           const __grid_constant__ PrefillParams p, int block_rows) {
  extern __shared__ char unaligned[];
  char* shared = unaligned + (-shared_address(unaligned) & 1023);
  const Barriers barriers{shared_address(shared) + Shape<kDim>::kBarrierAt};
  if (threadIdx.x == 0) {
    prefetch_map(&map);
    barriers.init();
  }
  let_next_start();
  wait_for_previous();
  __syncthreads();
  if (threadIdx.x < 128) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    load_tiles<kDim>(&map, &query_map, p, block_rows, shared, barriers);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    consume_blocks<T, kDim, kAnchored>(p, shared, barriers, threadIdx.x / 128 - 1);
  }
}

// ---- host ----

template <typename T, int kDim, bool kAnchored>
cudaError_t launch_shape(const PrefillParams& p, cudaStream_t stream) {
  using S = Shape<kDim>;
  // [pages · 2 · kv_heads][16][head_dim]; a box is 64 dims of a page's 16 rows.
  const cuuint64_t sizes[3] = {static_cast<cuuint64_t>(p.head_dim), kPageRows,
                               static_cast<cuuint64_t>(p.pages) * 2 * p.kv_heads};
  const cuuint64_t strides[2] = {static_cast<cuuint64_t>(p.head_dim) * 2,
                                 static_cast<cuuint64_t>(p.head_dim) * 2 * kPageRows};
  const cuuint32_t box[3] = {64, kPageRows, 1};
  CUtensorMap map, query_map;
  if (!encode_swizzled_map(&map, __is_same(T, __half), p.kv_pages, sizes, strides, box))
    return cudaErrorInvalidValue;
  // [tokens][heads][head_dim]; a box is 64 dims of the rows of a block: the heads of a group of as many
  // queries as fit.
  const int queries = kRows / p.group, block_rows = queries * p.group;
  const cuuint64_t query_sizes[3] = {static_cast<cuuint64_t>(p.head_dim), static_cast<cuuint64_t>(p.heads),
                                     static_cast<cuuint64_t>(p.tokens)};
  const cuuint64_t query_strides[2] = {static_cast<cuuint64_t>(p.head_dim) * 2,
                                       static_cast<cuuint64_t>(p.q_stride) * 2};
  const cuuint32_t query_box[3] = {64, static_cast<cuuint32_t>(p.group), static_cast<cuuint32_t>(queries)};
  if (!encode_swizzled_map(&query_map, __is_same(T, __half), p.q, query_sizes, query_strides, query_box))
    return cudaErrorInvalidValue;
  if (const cudaError_t error = cudaFuncSetAttribute(
          kernel<T, kDim, kAnchored>, cudaFuncAttributeMaxDynamicSharedMemorySize, S::kSharedBytes))
    return error;
  // Every sequence may end in a block that is not full.
  const int64_t blocks = (p.tokens / queries + p.seqs) * p.kv_heads;
  int device = 0, sms = 0;
  if (const cudaError_t error = cudaGetDevice(&device)) return error;
  if (const cudaError_t error = cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device))
    return error;
  const int64_t grid = blocks < sms ? blocks : sms;
  return launch(kernel<T, kDim, kAnchored>, dim3(static_cast<unsigned>(grid)), kThreads, S::kSharedBytes,
                stream, map, query_map, p, block_rows);
}

}  // namespace prefill90

bool attention_prefill_sm90_takes(const PrefillParams& p, CacheType type) {
  return type != CacheType::e4m3 && p.head_dim <= 128 && p.group <= prefill90::kRows;
}

cudaError_t attention_prefill_sm90(const PrefillParams& p, CacheType type, cudaStream_t stream) {
  if (p.seqs == 0 || p.tokens == 0) return cudaSuccess;
  const auto with_type = [&]<typename T>(T) {
    const auto with_order = [&]<bool kAnchored>() {
      return p.head_dim <= 64 ? prefill90::launch_shape<T, 64, kAnchored>(p, stream)
                              : prefill90::launch_shape<T, 128, kAnchored>(p, stream);
    };
    return p.anchored ? with_order.template operator()<true>() : with_order.template operator()<false>();
  };
  return type == CacheType::f16 ? with_type(__half{}) : with_type(__nv_bfloat16{});
}

}  // namespace tgi
