// Rotary embedding fused with the write to the KV pages. Su et al. 2021, arXiv:2104.09864.
#include <cuda_fp8.h>

#include "common/dispatch.cuh"
#include "common/pdl.cuh"
#include "common/reduce.cuh"
#include "common/vec.cuh"
#include "rope/cuda.h"

namespace tgi {
namespace {

// ---- device ----

constexpr int kThreads = 256;
constexpr int kMaxVectorHeadDim = 256;

// What a thread does: two runs of kWidth elements a unit, kUnits units in a head, kHeads heads at once. Runs
// of four leave registers for five CTAs an SM, and a head's lanes still touch whole 128-byte lines.
template <bool kVector>
struct Shape {
  static constexpr int kWidth = kVector ? 4 : 1;
  static constexpr int kUnits = kVector ? 1 : kRotaryMaxHeadDim / 64;
  static constexpr int kHeads = kVector ? 3 : 1;
};

template <typename T, int kWidth>
struct RunOf {
  using type = Vec<T, kWidth>;
};
template <typename T>
struct RunOf<T, 1> {
  using type = T;
};

template <typename T, int kWidth>
__device__ __forceinline__ float element_of(const typename RunOf<T, kWidth>::type& run, int i) {
  if constexpr (kWidth == 1)
    return to_float(run);
  else
    return element(run, i);
}

template <typename T, int kWidth>
__device__ __forceinline__ void store_run(T* to, const float (&x)[kWidth]) {
  if constexpr (__is_same(T, __nv_fp8_storage_t)) {
    uint32_t word = 0;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      word |= uint32_t{__nv_cvt_float_to_fp8(x[i], __NV_SATFINITE, __NV_E4M3)} << 8 * i;
    }
    if constexpr (kWidth == 1)
      *to = static_cast<T>(word);
    else
      *reinterpret_cast<uint32_t*>(to) = word;
  } else if constexpr (kWidth == 1) {
    *to = from_float<T>(x[0]);
  } else {
    store(to, pack<T>(x));
  }
}

// kWidth angles' cosines or sines.
template <int kWidth>
__device__ __forceinline__ void load_angles(const float* from, float (&to)[kWidth]) {
  if constexpr (kWidth == 4) {
    const float4 four = __ldg(reinterpret_cast<const float4*>(from));
    to[0] = four.x, to[1] = four.y, to[2] = four.z, to[3] = four.w;
  } else {
    to[0] = __ldg(from);
  }
}

// Two runs of a head that hold whole pairs.
struct Unit {
  int low, high;  // where they start within the head
  int pair;       // the first pair, or -1 past rot_dim
  bool exists;
};

template <int kWidth>
__device__ __forceinline__ Unit unit_at(int index, const RotaryParams& p) {
  const int turned = p.rot_dim / (2 * kWidth);
  const bool halves = index < turned && !p.interleaved;
  Unit unit;
  unit.exists = index < p.head_dim / (2 * kWidth);
  unit.pair = index < turned ? index * kWidth : -1;
  unit.low = halves ? index * kWidth : index * 2 * kWidth;
  unit.high = halves ? p.rot_dim / 2 + unit.low : unit.low + kWidth;
  return unit;
}

__device__ __forceinline__ void rotate_pair(float& a, float& b, float cosine, float sine) {
  const float was = a;
  a = was * cosine - b * sine;
  b = b * cosine + was * sine;
}

// Rotates the pairs of a unit's two runs: across the runs, or of neighbours in their concatenation.
template <int kWidth>
__device__ __forceinline__ void rotate(float (&low)[kWidth], float (&high)[kWidth],
                                       const float (&cosine)[kWidth], const float (&sine)[kWidth],
                                       bool interleaved) {
  if (!interleaved) {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) rotate_pair(low[i], high[i], cosine[i], sine[i]);
  } else if constexpr (kWidth == 1) {
    rotate_pair(low[0], high[0], cosine[0], sine[0]);
  } else {
#pragma unroll
    for (int i = 0; i < kWidth / 2; ++i) {
      rotate_pair(low[2 * i], low[2 * i + 1], cosine[i], sine[i]);
      rotate_pair(high[2 * i], high[2 * i + 1], cosine[kWidth / 2 + i], sine[kWidth / 2 + i]);
    }
  }
}

// One CTA a token, 2^log_lanes lanes a head; a thread keeps its sines and cosines for all its heads.
template <typename T, typename Cache, bool kVector, bool kNorm>
__global__ void __launch_bounds__(kThreads, kVector ? (kNorm || sizeof(T) == 4 ? 4 : 5) : 1)
    rotary_kv_write_kernel(const RotaryParams p, int log_lanes) {
  using S = Shape<kVector>;
  constexpr int kWidth = S::kWidth, kUnits = S::kUnits, kHeads = S::kHeads;
  using Run = typename RunOf<T, kWidth>::type;
  const int64_t token = blockIdx.x;
  const int lane = threadIdx.x & ((1 << log_lanes) - 1), group = threadIdx.x >> log_lanes;
  const int groups = kThreads >> log_lanes, all_heads = p.heads + 2 * p.kv_heads;
  Unit unit[kUnits];
#pragma unroll
  for (int u = 0; u < kUnits; ++u) unit[u] = unit_at<kWidth>(lane + u * 32, p);

  // Heads are numbered through q, k and v; each pointer is where its head 0 of that numbering would be.
  T* q = static_cast<T*>(p.q) + token * p.q_stride;
  const T* k = static_cast<const T*>(p.k) + token * p.k_stride - p.heads * p.head_dim;
  const T* v = static_cast<const T*>(p.v) + token * p.v_stride - (p.heads + p.kv_heads) * p.head_dim;
  Run loaded[kHeads][kUnits][2] = {};
  const auto load_heads = [&](int head) {
#pragma unroll
    for (int h = 0; h < kHeads; ++h, head += groups) {
      const T* from = (head < p.heads ? q : head < p.heads + p.kv_heads ? k : v) + head * p.head_dim;
#pragma unroll
      for (int u = 0; u < kUnits; ++u) {
        if (head >= all_heads || !unit[u].exists) continue;
        loaded[h][u][0] = *reinterpret_cast<const Run*>(from + unit[u].low);
        loaded[h][u][1] = *reinterpret_cast<const Run*>(from + unit[u].high);
      }
    }
  };

  let_next_start();
  wait_for_previous();
  const int64_t position = p.positions[token], slot = p.slots[token];
  load_heads(group);  // before the sines: their address waits for the position
  float cosine[kUnits][kWidth], sine[kUnits][kWidth];
#pragma unroll
  for (int u = 0; u < kUnits; ++u) {
    if (!unit[u].exists || unit[u].pair < 0) continue;
    const float* row = p.cos_sin + position * p.rot_dim + unit[u].pair;
    load_angles(row, cosine[u]);
    load_angles(row + p.rot_dim / 2, sine[u]);
  }
  // A page holds the heads of k, then those of v, one numbering again.
  const int head_elements = kPageTokens * p.head_dim;
  Cache* kv = static_cast<Cache*>(p.kv_pages) +
              (slot / kPageTokens * 2 * p.kv_heads - p.heads) * head_elements +
              slot % kPageTokens * p.head_dim;

  // Uniform over the warp, as the norm's shuffles need.
  for (int base = 0; base < all_heads; base += kHeads * groups) {
    if (base > 0) load_heads(base + group);
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      const int head = base + h * groups + group;
      const bool is_q = head < p.heads, is_v = head >= p.heads + p.kv_heads;
      float low[kUnits][kWidth], high[kUnits][kWidth], squares = 0.0f;
#pragma unroll
      for (int u = 0; u < kUnits; ++u) {
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
          low[u][i] = element_of<T, kWidth>(loaded[h][u][0], i);
          high[u][i] = element_of<T, kWidth>(loaded[h][u][1], i);
          squares = fmaf(low[u][i], low[u][i], fmaf(high[u][i], high[u][i], squares));
        }
      }
      if constexpr (kNorm) {
        for (int offset = 1 << log_lanes >> 1; offset > 0; offset /= 2) {
          squares += __shfl_xor_sync(kFullWarp, squares, offset);
        }
      }
      if (head >= all_heads || (slot < 0 && !is_q)) continue;
      const T* norm = static_cast<const T*>(is_v ? nullptr : is_q ? p.q_norm : p.k_norm);
      const float scale = kNorm ? rsqrtf(squares / p.head_dim + p.eps) : 1.0f;
      T* to_q = q + head * p.head_dim;
      Cache* to_kv = kv + static_cast<int64_t>(head) * head_elements;
#pragma unroll
      for (int u = 0; u < kUnits; ++u) {
        if (!unit[u].exists) continue;
        if (kNorm && norm != nullptr) {
#pragma unroll
          for (int i = 0; i < kWidth; ++i) {
            low[u][i] *= scale * to_float(norm[unit[u].low + i]);
            high[u][i] *= scale * to_float(norm[unit[u].high + i]);
          }
        }
        if (!is_v && unit[u].pair >= 0) rotate(low[u], high[u], cosine[u], sine[u], p.interleaved);
        if (is_q) {
          store_run(to_q + unit[u].low, low[u]);
          store_run(to_q + unit[u].high, high[u]);
        } else {
          store_run(to_kv + unit[u].low, low[u]);
          store_run(to_kv + unit[u].high, high[u]);
        }
      }
    }
  }
}

// ---- host ----

template <typename T, typename Cache, bool kVector>
cudaError_t launch_rotary(const RotaryParams& p, cudaStream_t stream) {
  const int units = p.head_dim / (2 * Shape<kVector>::kWidth);
  int log_lanes = 0;
  while (1 << log_lanes < units && log_lanes < 5) ++log_lanes;
  const auto kernel = p.q_norm || p.k_norm ? rotary_kv_write_kernel<T, Cache, kVector, true>
                                           : rotary_kv_write_kernel<T, Cache, kVector, false>;
  return launch(kernel, dim3(static_cast<unsigned>(p.tokens)), kThreads, 0, stream, p, log_lanes);
}

}  // namespace

cudaError_t rotary_kv_write(const RotaryParams& p, DType dtype, cudaStream_t stream) {
  if (p.tokens == 0) return cudaSuccess;
  if (p.head_dim > kRotaryMaxHeadDim || p.head_dim % 2 || p.rot_dim % 2) return cudaErrorInvalidValue;
  const bool whole_runs = p.rot_dim % 8 == 0 && p.head_dim % 8 == 0 && p.head_dim <= kMaxVectorHeadDim;
  const auto launch_for = [&]<typename T, typename Cache>() {
    return p.aligned && whole_runs ? launch_rotary<T, Cache, true>(p, stream)
                                   : launch_rotary<T, Cache, false>(p, stream);
  };
  if (p.e4m3) {
    return by_half_dtype(
        dtype, [&]<typename T>() { return launch_for.template operator()<T, __nv_fp8_storage_t>(); });
  }
  return by_dtype(dtype, [&]<typename T>() { return launch_for.template operator()<T, T>(); });
}

}  // namespace tgi
