// Rotary embedding fused with the write to the KV pages. Su et al. 2021, arXiv:2104.09864.
#include "common/dispatch.cuh"
#include "common/pdl.cuh"
#include "common/reduce.cuh"
#include "common/vec.cuh"
#include "rope/cuda.h"

namespace tgi {
namespace {

// ---- device ----

constexpr int kThreads = 128;

// Elements of half a unit, units a lane has in a head, and heads a thread has in flight.
template <typename T, bool kVector>
struct Shape {
  static constexpr int kWidth = kVector ? kVec<T> : 1;
  static constexpr int kUnits = kRotaryMaxHeadDim / (2 * kWidth * 32) > 1 ? kRotaryMaxHeadDim / (2 * kWidth * 32) : 1;
  static constexpr int kHeads = kVector ? 4 / kUnits : 1;
};

// kWidth elements as they lie in memory.
template <typename T, int kWidth>
struct alignas(sizeof(T) * kWidth) Run {
  T at[kWidth];
};

template <typename T, int kWidth>
__device__ __forceinline__ Run<T, kWidth> load_run(const T* from) {
  using Loaded = Run<T, kWidth>;
  if constexpr (kWidth == kVec<T>) return __builtin_bit_cast(Loaded, load_streaming(from));
  return {*from};
}

template <typename T, int kWidth>
__device__ __forceinline__ void store_run(T* to, const float* from) {
  Run<T, kWidth> run;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) run.at[i] = from_float<T>(from[i]);
  *reinterpret_cast<Run<T, kWidth>*>(to) = run;
}

// kWidth angles' cosines or sines.
template <int kWidth>
__device__ __forceinline__ void load_angles(const float* from, float* to) {
  if constexpr (kWidth % 4 == 0) {
#pragma unroll
    for (int i = 0; i < kWidth; i += 4) {
      const float4 four = __ldg(reinterpret_cast<const float4*>(from + i));
      to[i] = four.x, to[i + 1] = four.y, to[i + 2] = four.z, to[i + 3] = four.w;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) to[i] = __ldg(from + i);
  }
}

// What a lane does in every head: two runs of kWidth elements that hold whole pairs.
struct Unit {
  int low, high;  // where its runs start within the head
  int pair;       // its first pair, or -1 past rot_dim
  bool exists;
};

template <int kWidth>
__device__ __forceinline__ Unit unit_at(int index, const RotaryParams& p) {
  const int rotated = p.rot_dim / (2 * kWidth);
  Unit unit;
  unit.exists = index < p.head_dim / (2 * kWidth);
  unit.pair = index < rotated ? index * kWidth : -1;
  const bool halves = index < rotated && !p.interleaved;
  unit.low = halves ? index * kWidth : index * 2 * kWidth;
  unit.high = halves ? p.rot_dim / 2 + unit.low : unit.low + kWidth;
  return unit;
}

template <int kWidth>
__device__ __forceinline__ void rotate(float* x, const float* cosine, const float* sine, bool interleaved) {
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    if (interleaved) {
      const float even = x[2 * i], odd = x[2 * i + 1];
      x[2 * i] = even * cosine[i] - odd * sine[i];
      x[2 * i + 1] = odd * cosine[i] + even * sine[i];
    } else {
      const float low = x[i], high = x[kWidth + i];
      x[i] = low * cosine[i] - high * sine[i];
      x[kWidth + i] = high * cosine[i] + low * sine[i];
    }
  }
}

// One CTA a token, `lanes` (a power of two) lanes a head; a thread keeps its sines and cosines for all its heads.
template <typename T, bool kVector>
__global__ void __launch_bounds__(kThreads) rotary_kv_write_kernel(const RotaryParams p, int lanes) {
  using S = Shape<T, kVector>;
  constexpr int kWidth = S::kWidth, kUnits = S::kUnits, kHeads = S::kHeads;
  const int64_t token = blockIdx.x;
  const int lane = threadIdx.x % lanes, group = threadIdx.x / lanes, groups = kThreads / lanes;
  const int all_heads = p.heads + 2 * p.kv_heads;
  Unit unit[kUnits];
#pragma unroll
  for (int u = 0; u < kUnits; ++u) unit[u] = unit_at<kWidth>(lane + u * 32, p);

  const auto source = [&](int head) -> const T* {
    if (head < p.heads) return static_cast<const T*>(p.q) + token * p.q_stride + head * p.head_dim;
    head -= p.heads;
    if (head < p.kv_heads) return static_cast<const T*>(p.k) + token * p.k_stride + head * p.head_dim;
    return static_cast<const T*>(p.v) + token * p.v_stride + (head - p.kv_heads) * p.head_dim;
  };
  Run<T, kWidth> loaded[kHeads][kUnits][2] = {};
  const auto load_heads = [&](int head) {
#pragma unroll
    for (int h = 0; h < kHeads; ++h, head += groups) {
#pragma unroll
      for (int u = 0; u < kUnits; ++u) {
        if (head >= all_heads || !unit[u].exists) continue;
        loaded[h][u][0] = load_run<T, kWidth>(source(head) + unit[u].low);
        loaded[h][u][1] = load_run<T, kWidth>(source(head) + unit[u].high);
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
    load_angles<kWidth>(row, cosine[u]);
    load_angles<kWidth>(row + p.rot_dim / 2, sine[u]);
  }

  // Uniform over the warp, as the norm's shuffles need.
  for (int base = 0; base < all_heads; base += kHeads * groups) {
    if (base > 0) load_heads(base + group);
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      const int head = base + h * groups + group;
      const bool is_q = head < p.heads, is_v = head >= p.heads + p.kv_heads;
      const T* norm = static_cast<const T*>(is_v ? nullptr : is_q ? p.q_norm : p.k_norm);
      float x[kUnits][2 * kWidth];
#pragma unroll
      for (int u = 0; u < kUnits; ++u) {
#pragma unroll
        for (int i = 0; i < 2 * kWidth; ++i) x[u][i] = to_float(loaded[h][u][i / kWidth].at[i % kWidth]);
      }
      float scale = 1.0f;
      if (p.q_norm || p.k_norm) {
        float squares = 0.0f;
#pragma unroll
        for (int u = 0; u < kUnits; ++u) {
#pragma unroll
          for (int i = 0; i < 2 * kWidth; ++i) squares = fmaf(x[u][i], x[u][i], squares);
        }
        for (int offset = lanes / 2; offset > 0; offset /= 2) {
          squares += __shfl_xor_sync(kFullWarp, squares, offset);
        }
        scale = rsqrtf(squares / p.head_dim + p.eps);
      }
      if (head >= all_heads) continue;

      T* to;
      if (is_q) {
        to = static_cast<T*>(p.q) + token * p.q_stride + head * p.head_dim;
      } else {
        const int kv_head = head - p.heads - (is_v ? p.kv_heads : 0);
        const int64_t page = slot / kPageTokens, row = slot % kPageTokens;
        const int64_t plane = (page * 2 + is_v) * p.kv_heads + kv_head;
        to = static_cast<T*>(p.kv_pages) + (plane * kPageTokens + row) * p.head_dim;
        if (slot < 0) continue;
      }
#pragma unroll
      for (int u = 0; u < kUnits; ++u) {
        if (!unit[u].exists) continue;
        if (norm) {
#pragma unroll
          for (int i = 0; i < kWidth; ++i) {
            x[u][i] *= scale * to_float(norm[unit[u].low + i]);
            x[u][kWidth + i] *= scale * to_float(norm[unit[u].high + i]);
          }
        }
        if (!is_v && unit[u].pair >= 0) rotate<kWidth>(x[u], cosine[u], sine[u], p.interleaved);
        store_run<T, kWidth>(to + unit[u].low, x[u]);
        store_run<T, kWidth>(to + unit[u].high, x[u] + kWidth);
      }
    }
  }
}

// ---- host ----

template <typename T, bool kVector>
cudaError_t launch_rotary(const RotaryParams& p, cudaStream_t stream) {
  const int units = p.head_dim / (2 * Shape<T, kVector>::kWidth);
  int lanes = 1;
  while (lanes < units && lanes < 32) lanes *= 2;
  return launch(rotary_kv_write_kernel<T, kVector>, dim3(static_cast<unsigned>(p.tokens)), kThreads, 0, stream, p,
                lanes);
}

}  // namespace

cudaError_t rotary_kv_write(const RotaryParams& p, DType dtype, cudaStream_t stream) {
  if (p.tokens == 0) return cudaSuccess;
  if (p.head_dim > kRotaryMaxHeadDim || p.head_dim % 2 || p.rot_dim % 2) return cudaErrorInvalidValue;
  return by_dtype(dtype, [&]<typename T>() {
    const bool whole_vectors = p.rot_dim % (2 * kVec<T>) == 0 && p.head_dim % (2 * kVec<T>) == 0;
    return p.aligned && whole_vectors ? launch_rotary<T, true>(p, stream) : launch_rotary<T, false>(p, stream);
  });
}

}  // namespace tgi
