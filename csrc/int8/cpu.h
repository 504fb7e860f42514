// x · weightᵀ with both sides in int8: x is rounded just before, a scale a token.
//
// Sums are whole numbers, which no order, instruction set, number of tokens or threads changes; what is
// rounded afterwards is rounded for each output alone, in the same steps everywhere. So are all bits.
#pragma once

#include "common/parallel.h"
#include "int8/cpu_params.h"
#include "matmul/cpu.h"

namespace tgi::TGI_ISA {

using VecShort [[gnu::vector_size(2 * kLanes)]] = int16_t;
using VecByte [[gnu::vector_size(kLanes)]] = int8_t;
using VecPairs [[gnu::vector_size(4 * kLanes)]] = uint16_t;

constexpr int64_t kQuadBlock = 128;   // quads whose codes, 16 KB, stay in the L1 cache
constexpr int64_t kQuadsAhead = 32;   // that are asked for before their turn
constexpr float kHalfRange = 127.5f;  // steps that the largest number becomes, as compressed-tensors has it
constexpr float kLeastScale = 0x1p-23f;  // of a token of zeros, there as well

// Vectors of a panel that `rows` rows of pairs take at once: sums, two halves of each vector of weights, x.
#if defined(TGI_ISA_IS_avx512)
constexpr int pair_vecs_for(int) { return 2; }
#else
constexpr int pair_vecs_for(int rows) { return rows <= 2 ? 4 : 1; }
#endif

template <typename To>
TGI_INLINE To load_as(const void* from) {
  To to;
  std::memcpy(&to, from, sizeof(to));
  return to;
}

// acc + a0·b0 + a1·b1 of the int16 in each word, exactly.
TGI_INLINE VecInt add_pairs(VecInt acc, VecPairs a, VecInt b) {
#if defined(TGI_ISA_IS_avx512)
  return reinterpret_cast<VecInt>(
      _mm512_add_epi32(reinterpret_cast<__m512i>(acc),
                       _mm512_madd_epi16(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b))));
#elif defined(TGI_ISA_IS_avx2)
  return acc + reinterpret_cast<VecInt>(
                   _mm256_madd_epi16(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
#elif defined(__SSE2__)
  return acc +
         reinterpret_cast<VecInt>(_mm_madd_epi16(reinterpret_cast<__m128i>(a), reinterpret_cast<__m128i>(b)));
#else
  const VecInt words = reinterpret_cast<VecInt>(a);
  return acc + (words << 16 >> 16) * (b << 16 >> 16) + (words >> 16) * (b >> 16);
#endif
}

// |x| of the largest number; NaN if there is one, whose bits are above those of all numbers.
TGI_INLINE float largest_magnitude(const float* x, int64_t count) {
  VecInt most{};
  const auto add = [&](Vec values) __attribute__((always_inline)) {
    const VecInt bits = reinterpret_cast<VecInt>(values) & 0x7fffffff;
    most = bits > most ? bits : most;
  };
  int64_t k = 0;
  for (; k + kLanes <= count; k += kLanes) add(load(x + k));
  if (k < count) add(load_first(x + k, count - k));
  int32_t largest = 0;
  for (int lane = 0; lane < kLanes; ++lane) largest = most[lane] > largest ? most[lane] : largest;
  return __builtin_bit_cast(float, largest);
}

// Rounds one row: its words to `to`, those of the next quad `step` words on; its scale; the sum of its codes.
template <bool kVnni>
TGI_INLINE void quantise_row(const float* x, int64_t count, float fixed, int32_t* to, int64_t step,
                             float* scale_out, int32_t* sum_out) {
  constexpr int kWords = kVnni ? 1 : 2;  // of a quad: four bytes, or two pairs of int16
  constexpr int kQuads = kLanes / static_cast<int>(kQuad);
  constexpr float kRound = 12582912.0f;  // 1.5·2^23: in a sum with it the lowest bits are a whole number
  const float largest = largest_magnitude(x, count);
  float scale = fixed > 0 ? fixed : largest / kHalfRange;
  if (scale == 0) scale = kLeastScale;
  VecInt sum{};
  for (int64_t k = 0; k < count; k += kLanes) {
    const bool is_whole = k + kLanes <= count;
    Vec steps = (is_whole ? load(x + k) : load_first(x + k, count - k)) / scale;
    steps = steps < 127.0f ? steps : splat(127.0f);
    steps = steps > -128.0f ? steps : splat(-128.0f);
    const VecInt codes = reinterpret_cast<VecInt>(steps + kRound) - __builtin_bit_cast(int32_t, kRound);
    sum += codes;
    int32_t words[kQuads * kWords];
    if constexpr (kVnni) {
#if defined(TGI_ISA_IS_avx512)
      const VecByte bytes = __builtin_convertvector(codes, VecByte);
      const VecByte ordered =
          __builtin_shufflevector(bytes, bytes, 0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15);
      std::memcpy(words, &ordered, sizeof(words));
#endif
    } else {
      const VecShort pairs = __builtin_convertvector(codes, VecShort);
      std::memcpy(words, &pairs, sizeof(words));
    }
    const int64_t quads = is_whole ? kQuads : (count - k + kQuad - 1) / kQuad;
    for (int64_t quad = 0; quad < quads; ++quad, to += step) {
      for (int word = 0; word < kWords; ++word) to[word] = words[quad * kWords + word];
    }
  }
  int32_t total = 0;
  for (int lane = 0; lane < kLanes; ++lane) total += sum[lane];
  *scale_out = largest == largest ? scale : largest;  // a NaN makes its token NaN, no other
  *sum_out = total;
}

// Loops over a tile's rows are unrolled by order: left to itself GCC 12 keeps large tiles in memory.
#define TGI_UNROLL_ROWS _Pragma("GCC unroll 12")

// sums[kRows, 32] = codes of x · codes of weights, for words of pairs.
template <int kRows>
TGI_INLINE void multiply_pairs(const int32_t* x, const uint8_t* codes, int64_t quads, int32_t* sums) {
  constexpr int kVecs = pair_vecs_for(kRows);
  for (int column = 0; column < kPanel; column += kVecs * kLanes) {
    VecInt tile[kRows][kVecs];
    TGI_UNROLL_ROWS
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < kVecs; ++v) tile[r][v] = VecInt{};
    }
    const uint8_t* from = codes + column * kQuad;
    for (int64_t k = 0; k < quads; ++k) {
      __builtin_prefetch(from + (k + kQuadsAhead) * kPanel * kQuad);
      VecPairs even[kVecs], odd[kVecs];
      for (int v = 0; v < kVecs; ++v) {
        const VecPairs both = load_as<VecPairs>(from + (k * kPanel + v * kLanes) * kQuad);
        even[v] = both & 255;
        odd[v] = both >> 8;
      }
      TGI_UNROLL_ROWS
      for (int r = 0; r < kRows; ++r) {
        const VecInt first = VecInt{} + x[(k * kRows + r) * 2];
        const VecInt second = VecInt{} + x[(k * kRows + r) * 2 + 1];
        for (int v = 0; v < kVecs; ++v) {
          tile[r][v] = add_pairs(add_pairs(tile[r][v], even[v], first), odd[v], second);
        }
      }
    }
    TGI_UNROLL_ROWS
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < kVecs; ++v)
        std::memcpy(sums + r * kPanel + column + v * kLanes, &tile[r][v], sizeof(VecInt));
    }
  }
}

#if defined(TGI_ISA_IS_avx512)
// The same for words of four bytes. Not inline: a function that may use vpdpbusd in one that may not.
template <int kRows>
[[gnu::noinline, gnu::target("avx512vnni")]] void multiply_quads(const int32_t* x, const uint8_t* codes,
                                                                 int64_t quads, int32_t* sums) {
  __m512i tile[kRows][2];
  TGI_UNROLL_ROWS
  for (int r = 0; r < kRows; ++r) tile[r][0] = tile[r][1] = _mm512_setzero_si512();
  for (int64_t k = 0; k < quads; ++k, codes += kPanel * kQuad, x += kRows) {
    __builtin_prefetch(codes + kQuadsAhead * kPanel * kQuad);
    __builtin_prefetch(codes + kQuadsAhead * kPanel * kQuad + 64);
    const __m512i low = _mm512_loadu_si512(codes), high = _mm512_loadu_si512(codes + 64);
    TGI_UNROLL_ROWS
    for (int r = 0; r < kRows; ++r) {
      const __m512i factor = _mm512_set1_epi32(x[r]);
      tile[r][0] = _mm512_dpbusd_epi32(tile[r][0], low, factor);
      tile[r][1] = _mm512_dpbusd_epi32(tile[r][1], high, factor);
    }
  }
  TGI_UNROLL_ROWS
  for (int r = 0; r < kRows; ++r) {
    _mm512_storeu_si512(sums + r * kPanel, tile[r][0]);
    _mm512_storeu_si512(sums + r * kPanel + kLanes, tile[r][1]);
  }
}
#endif

template <bool kVnni, int kRows>
TGI_INLINE void multiply_words(const int32_t* x, const uint8_t* codes, int64_t quads, int32_t* sums) {
#if defined(TGI_ISA_IS_avx512)
  if constexpr (kVnni) return multiply_quads<kRows>(x, codes, quads, sums);
#endif
  multiply_pairs<kRows>(x, codes, quads, sums);
}

// Asks for the lines that `finish_rows` will write, while there is something else to do: they lie pages
// apart, which neither prefetcher nor store buffer hides (576 x 3072, 240 tokens, one core of EPYC 9004: 362
// → 385 GFLOP/s).
TGI_INLINE void ask_for_rows(const LinearParams& p, int64_t panel, int64_t token, int64_t rows) {
  for (int64_t row = token; row < token + rows; ++row) {
    const float* at = p.out + row * p.out_features + panel * kPanel;
    __builtin_prefetch(at, 1);
    __builtin_prefetch(at + kPanel / 2, 1);
  }
}

// y[rows, 32] of sums of codes, still without bias. row: the first of them in its block.
TGI_INLINE void scale_sums(const Int8LinearParams& p, int64_t panel, int64_t row, int64_t rows,
                           const int32_t* sums, float* y) {
  const float* scales = p.scales + panel * kPanel;
  for (int64_t r = 0; r < rows; ++r) {
    for (int column = 0; column < kPanel; column += kLanes) {
      const int64_t at = r * kPanel + column;
      const VecInt whole = load_as<VecInt>(sums + at) - 128 * p.row_sums[row + r];
      store(y + at, __builtin_convertvector(whole, Vec) * p.row_scales[row + r] * load(scales + column));
    }
  }
}

// Tiles [first, last) of a block of rows, the first of which is `token`, against one panel, which is small
// enough to stay in the L2 cache.
template <bool kVnni>
TGI_INLINE void multiply_int8_panel(const Int8LinearParams& p, const Tiling& tiling, int64_t token,
                                    int64_t panel, int64_t first, int64_t last) {
  constexpr int kWords = kVnni ? 1 : 2;
  const int64_t quads = (p.product.in_features + kQuad - 1) / kQuad;
  const uint8_t* codes = p.codes + panel * quads * kPanel * kQuad;
  alignas(64) int32_t sums[kMaxRows * kPanel];
  alignas(64) float y[kMaxRows * kPanel];
  for (int64_t tile = first; tile < last; ++tile) {
    const int64_t row = tiling.first(tile), rows = tiling.size(tile);
    ask_for_rows(p.product, panel, token + row, rows);
    with_rows(rows, [&]<int kRows>() __attribute__((always_inline)) {
      multiply_words<kVnni, kRows>(p.words + row * quads * kWords, codes, quads, sums);
    });
    scale_sums(p, panel, row, rows, sums, y);
    finish_rows(p.product, panel, token + row, rows, y);
  }
}

template <bool kVnni>
TGI_INLINE void int8_linear_block(const Int8LinearParams& p, int64_t token, int64_t rows) {
  constexpr int kWords = kVnni ? 1 : 2;
  const Tiling tiling(rows);
  const int64_t panels = (p.product.out_features + kPanel - 1) / kPanel;
  const int64_t quads = (p.product.in_features + kQuad - 1) / kQuad;
  parallel_for(tiling.tiles, [&](int64_t tile) {
    const int64_t begin = tiling.first(tile), size = tiling.size(tile);
    for (int64_t row = begin; row < begin + size; ++row) {
      quantise_row<kVnni>(p.product.x + (token + row) * p.product.x_stride, p.product.in_features,
                          p.input_scale, p.words + (begin * quads + row - begin) * kWords, size * kWords,
                          p.row_scales + row, p.row_sums + row);
    }
  });
  if (rows == 1) {
    parallel_for_neighbours(
        panels, [&](int64_t panel) { multiply_int8_panel<kVnni>(p, tiling, token, panel, 0, 1); });
    return;
  }
  const int64_t wanted = (4 * num_threads() + panels - 1) / panels;
  const int64_t groups = wanted < tiling.tiles ? wanted : tiling.tiles;
  parallel_for(panels * groups, [&](int64_t task) {
    const int64_t panel = task / groups, group = task % groups;
    multiply_int8_panel<kVnni>(p, tiling, token, panel, tiling.tiles * group / groups,
                               tiling.tiles * (group + 1) / groups);
  });
}

void int8_linear(const Int8LinearParams& p) {
  const int64_t tokens = p.product.tokens;
  for (int64_t token = 0; token < tokens; token += kRowBlock) {
    const int64_t rows = kRowBlock < tokens - token ? kRowBlock : tokens - token;
#if defined(TGI_ISA_IS_avx512)
    if (p.use_vnni) {
      int8_linear_block<true>(p, token, rows);
      continue;
    }
#endif
    int8_linear_block<false>(p, token, rows);
  }
}

}  // namespace tgi::TGI_ISA
