// The dense matrix of a weight of any kind.
#include "common/dispatch.cuh"
#include "common/pdl.cuh"
#include "quant/cuda.h"
#include "quant/kinds.cuh"
#include "quant/runs.h"

namespace tgi {
namespace {

// ---- device ----

constexpr int kThreads = 128;

__device__ float e4m3_value(uint32_t code) {
  // Its fields in those of fp32, whose exponent's bias is 120 more; subnormal numbers are, too.
  const float small = __uint_as_float((code & 0x80u) << 24 | (code & 0x7fu) << 20);
  return small * __uint_as_float(0x7b800000u);
}

// Code e of a slot.
template <Codes kCodes>
__device__ __forceinline__ float value_of(const uint32_t* words, int slot, int e, const float* table) {
  if constexpr (kCodes == Codes::table) {
    return table[words[slot / 4] >> (slot % 4 * 8 + 4 * e) & 15u];
  } else {
    const uint32_t code = fields<kBitsOf<kCodes>>(words, slot, 0) >> (16 * e) & 0xffu;
    return kCodes == Codes::e4m3 ? e4m3_value(code) : static_cast<float>(code);
  }
}

// What two rows of a group are scaled and shifted by.
struct Scales {
  float scale[2], shift[2];
};

__device__ __forceinline__ Scales scales_of(const uint32_t* words, Scaling scaling, int zero) {
  const float all = static_cast<float>(zero);
  switch (scaling) {
    case Scaling::half:
      return {{scale_of<__half>(words[0]), scale_of<__half>(words[0] >> 16)}, {all, all}};
    case Scaling::brain:
      return {{scale_of<__nv_bfloat16>(words[0]), scale_of<__nv_bfloat16>(words[0] >> 16)}, {all, all}};
    case Scaling::half_zeros:
      return {{scale_of<__half>(words[0]), scale_of<__half>(words[1])},
              {static_cast<float>(words[0] >> 16), static_cast<float>(words[1] >> 16)}};
    case Scaling::brain_zeros:
      return {{scale_of<__nv_bfloat16>(words[0]), scale_of<__nv_bfloat16>(words[1])},
              {static_cast<float>(words[0] >> 16), static_cast<float>(words[1] >> 16)}};
    case Scaling::single:
      return {{__uint_as_float(words[0]), __uint_as_float(words[1])}, {all, all}};
    default:
      return {{__uint_as_float(words[0]), __uint_as_float(words[1])},
              {__uint_as_float(words[2]), __uint_as_float(words[3])}};
  }
}

constexpr int kTileRow = kBlock + 8;  // elements; the rows of a store's lanes begin in banks of their own

// A block widens 128 columns of one strip, as the four warps of a product would, and stores rows of them at
// once.
template <typename T, Codes kCodes>
__global__ void dequantise_kernel(const __grid_constant__ QuantRuns w, int number,
                                  T* out /* [rows, columns] */) {
  using Two = typename TwoOf<T>::type;
  constexpr int kWords = 2 * kBitsOf<kCodes>, kLoads = kWords / 4;
  __shared__ __align__(16) T tile[kStrip * kTileRow];
  __shared__ float table[16];  // constant memory answers one address at a time
  if constexpr (kCodes == Codes::table) {
    if (threadIdx.x < 16) table[threadIdx.x] = w.table[threadIdx.x];
    __syncthreads();
  }
  const QuantRun& run = w.run[number];
  const int strip = blockIdx.y, block = blockIdx.x, lane = threadIdx.x % 32;
  const int row = threadIdx.x / 32 * 16 + lane / 4;
  wait_for_previous();
  const uint8_t* from =
      run.words + (static_cast<int64_t>(strip) * gridDim.x + block) * (1024 * kBitsOf<kCodes>);
  uint32_t words[kWords];
#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
    const uint4 four = *reinterpret_cast<const uint4*>(from + i * 2048 + threadIdx.x * 16);
    words[4 * i] = four.x, words[4 * i + 1] = four.y, words[4 * i + 2] = four.z, words[4 * i + 3] = four.w;
  }
  if constexpr (kWords % 4 != 0) {
    const uint2 two = *reinterpret_cast<const uint2*>(from + kLoads * 2048 + threadIdx.x * 8);
    words[4 * kLoads] = two.x, words[4 * kLoads + 1] = two.y;
  }
  const int pair_words = scale_words(w.scaling);
  const uint32_t* scales =
      run.scales + (static_cast<int64_t>(strip) * run.groups * (kStrip / 2) + threadIdx.x / 4) * pair_words;
  const bool has_offset = w.scaling == Scaling::offset;
#pragma unroll
  for (int step = 0; step < 8; ++step) {
    const int group = (block * kBlock + step * 16) / run.group_size;
    const Scales by = scales_of(scales + group * (kStrip / 2) * pair_words, w.scaling, run.zero);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int h = i % 2, c = i / 2;
      T weight[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float value = value_of<kCodes>(words, step * 4 + i, e, table);
        weight[e] = from_float<T>(has_offset ? fmaf(value, by.scale[h], by.shift[h])
                                             : (value - by.shift[h]) * by.scale[h]);
      }
      *reinterpret_cast<Two*>(tile + (row + 8 * h) * kTileRow + step * 16 + 8 * c + lane % 4 * 2) = {
          weight[0], weight[1]};
    }
  }
  __syncthreads();
  const int columns = min(kBlock, run.columns - block * kBlock);
  T* to = out + static_cast<int64_t>(strip) * kStrip * w.columns + run.x_column + block * kBlock;
  const int rows = min(kStrip, w.rows - strip * kStrip);
  if (columns == kBlock && w.columns % 8 == 0) {
    for (int i = threadIdx.x; i < rows * (kBlock / 8); i += kThreads) {
      const int line = i / (kBlock / 8), eight = i % (kBlock / 8) * 8;
      *reinterpret_cast<uint4*>(to + static_cast<int64_t>(line) * w.columns + eight) =
          *reinterpret_cast<const uint4*>(tile + line * kTileRow + eight);
    }
    return;
  }
  for (int i = threadIdx.x; i < rows * columns; i += kThreads) {
    const int line = i / columns, column = i % columns;
    to[static_cast<int64_t>(line) * w.columns + column] = tile[line * kTileRow + column];
  }
}

// ---- host ----

template <typename T>
cudaError_t dequantise_run(const QuantRuns& w, int number, T* out, cudaStream_t stream) {
  const QuantRun& run = w.run[number];
  const dim3 grid((run.columns + kBlock - 1) / kBlock, (w.rows + kStrip - 1) / kStrip);
  const auto with = [&]<Codes kCodes>() {
    return launch(dequantise_kernel<T, kCodes>, grid, kThreads, 0, stream, w, number, out);
  };
  switch (static_cast<Codes>(run.codes)) {
    case Codes::i2:
      return with.template operator()<Codes::i2>();
    case Codes::i3:
      return with.template operator()<Codes::i3>();
    case Codes::i4:
      return with.template operator()<Codes::i4>();
    case Codes::i5:
      return with.template operator()<Codes::i5>();
    case Codes::i6:
      return with.template operator()<Codes::i6>();
    case Codes::i8:
      return with.template operator()<Codes::i8>();
    case Codes::table:
      return with.template operator()<Codes::table>();
    case Codes::e4m3:
      return with.template operator()<Codes::e4m3>();
  }
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t runs_dequantise(const QuantRuns& w, void* out, DType dtype, cudaStream_t stream) {
  if (w.rows == 0) return cudaSuccess;
  return by_half_dtype(dtype, [&]<typename T>() {
    for (int i = 0; i < w.count; ++i) {
      if (const cudaError_t error = dequantise_run(w, i, static_cast<T*>(out), stream)) return error;
    }
    return settle(stream);
  });
}

}  // namespace tgi
