// x · weightᵀ + bias with weights of 4 or 8 bits, which are widened to fp32 a block at a time.
//
// A scale has at most 11 bits and a code less its zero at most 9, so weights are exact in fp32: every output
// is the chain of fma along in_features that matmul's `linear` computes from the dequantised matrix, bit for
// bit, for any number of tokens.
#pragma once

#include "common/parallel.h"
#include "common/vec.h"
#include "matmul/cpu.h"
#include "quant/cpu_params.h"

namespace tgi::TGI_ISA {

constexpr int64_t kQuantBlock = 128;  // steps along in_features widened at once: 16 KB, half of the L1 cache
constexpr int64_t kWordsAhead = 16;   // words of one row of a panel that are asked for before their turn
constexpr int kPanelVecs = kPanel / kLanes;

// One panel of a QuantWeight.
template <int kBits>
struct QuantPanel {
  static constexpr int kCodes = 32 / kBits;  // in a word
  const int32_t* words;
  const float *scales, *offsets;
  int64_t in_features, group_words;

  [[gnu::always_inline]] static QuantPanel at(const QuantWeight& weight, int64_t in_features, int64_t panel) {
    const int64_t words = (in_features + kCodes - 1) / kCodes;
    return {.words = weight.words + panel * words * kPanel,
            .scales = weight.scales + panel * weight.groups * kPanel,
            .offsets = weight.offsets + panel * weight.groups * kPanel,
            .in_features = in_features,
            .group_words = weight.groups == 1 ? words : weight.group_size / kCodes};
  }
};

TGI_INLINE VecInt load_words(const int32_t* from) {
  VecInt to;
  std::memcpy(&to, from, sizeof(to));
  return to;
}

// The lowest code of each word as a weight. −zero · scale is exact, and so is the sum: one rounding, of none.
template <int kBits>
TGI_INLINE Vec widen(VecInt words, Vec scale, Vec offset) {
  return fma(__builtin_convertvector(words & ((1 << kBits) - 1), Vec), scale, offset);
}

// Weights of steps [first, first + depth) along in_features: to[depth, 32], up to a whole word more.
template <int kBits>
TGI_INLINE void widen_block(const QuantPanel<kBits>& panel, int64_t first, int64_t depth, float* to) {
  constexpr int kCodes = QuantPanel<kBits>::kCodes;
  const int64_t start = first / kCodes, words = (depth + kCodes - 1) / kCodes;
  for (int64_t w = start; w < start + words; ++w, to += kCodes * kPanel) {
    const int64_t group = w / panel.group_words * kPanel;
    for (int v = 0; v < kPanelVecs; ++v) {
      const Vec scale = load(panel.scales + group + v * kLanes);
      const Vec offset = load(panel.offsets + group + v * kLanes);
      VecInt word = load_words(panel.words + w * kPanel + v * kLanes);
      for (int j = 0; j < kCodes; ++j, word >>= kBits) {
        store(to + j * kPanel + v * kLanes, widen<kBits>(word, scale, offset));
      }
    }
  }
}

// sums[32] = x · weights of one row: weights go from the words to the fma without touching memory.
template <int kBits>
TGI_INLINE void multiply_row(const QuantPanel<kBits>& panel, const float* x, float* sums) {
  constexpr int kCodes = QuantPanel<kBits>::kCodes;
  const int64_t whole = panel.in_features / kCodes, rest = panel.in_features % kCodes;
  Vec sum[kPanelVecs] = {};
  const auto add_words = [&](int64_t w, int64_t codes, const Vec* scale, const Vec* offset) {
    VecInt word[kPanelVecs];
    for (int v = 0; v < kPanelVecs; ++v) word[v] = load_words(panel.words + w * kPanel + v * kLanes);
    for (int64_t j = 0; j < codes; ++j) {
      const Vec factor = splat(x[w * kCodes + j]);
      for (int v = 0; v < kPanelVecs; ++v) {
        sum[v] = fma(factor, widen<kBits>(word[v], scale[v], offset[v]), sum[v]);
        word[v] >>= kBits;
      }
    }
  };
  for (int64_t first = 0, group = 0; first * kCodes < panel.in_features;
       first += panel.group_words, ++group) {
    Vec scale[kPanelVecs], offset[kPanelVecs];
    for (int v = 0; v < kPanelVecs; ++v) {
      scale[v] = load(panel.scales + group * kPanel + v * kLanes);
      offset[v] = load(panel.offsets + group * kPanel + v * kLanes);
    }
    const int64_t last = first + panel.group_words < whole ? first + panel.group_words : whole;
    for (int64_t w = first; w < last; ++w) {
      __builtin_prefetch(panel.words + (w + kWordsAhead) * kPanel);
      __builtin_prefetch(panel.words + (w + kWordsAhead) * kPanel + 16);
      add_words(w, kCodes, scale, offset);
    }
    if (rest > 0 && first + panel.group_words > whole) add_words(whole, rest, scale, offset);
  }
  for (int v = 0; v < kPanelVecs; ++v) store(sums + v * kLanes, sum[v]);
}

// Tiles [first, last) of a block against one panel. sums: [rows of the tiles, 32].
template <int kBits>
TGI_INLINE void multiply_quant_panel(const QuantPanel<kBits>& panel, const Tiling& tiling, const float* tiles,
                                     int64_t first, int64_t last, float* sums) {
  alignas(64) float block[kQuantBlock * kPanel];
  for (int64_t start = 0; start < panel.in_features; start += kQuantBlock) {
    const int64_t left = panel.in_features - start, depth = kQuantBlock < left ? kQuantBlock : left;
    widen_block<kBits>(panel, start, depth, block);
    for (int64_t tile = first; tile < last; ++tile) {
      const int64_t rows = tiling.size(tile);
      const float* x = tiles + tiling.first(tile) * panel.in_features + start * rows;
      float* to = sums + (tiling.first(tile) - tiling.first(first)) * kPanel;
      with_rows(rows, [&]<int kRows>() { multiply_tile<kRows>(x, block, depth, to, start == 0); });
    }
  }
}

template <int kBits>
TGI_INLINE void quant_linear_block(const QuantLinearParams& p, int64_t token, int64_t rows) {
  const LinearParams& product = p.product;
  const Tiling tiling(rows);
  const float* tiles = product.tiles;
  if (rows == 1) {
    tiles = product.x + token * product.x_stride;
  } else {
    parallel_for(tiling.tiles, [&](int64_t tile) {
      interleave(product.x + (token + tiling.first(tile)) * product.x_stride, product.x_stride,
                 tiling.size(tile), product.in_features,
                 product.tiles + tiling.first(tile) * product.in_features);
    });
  }
  const int64_t panels = (product.out_features + kPanel - 1) / kPanel;
  // A panel that is cut among threads is widened by each of them.
  const int64_t wanted = (4 * num_threads() + panels - 1) / panels;
  const int64_t groups = wanted < tiling.tiles ? wanted : tiling.tiles;
  parallel_for(panels * groups, [&](int64_t task) {
    const int64_t panel = task / groups, group = task % groups;
    const int64_t first = tiling.tiles * group / groups, last = tiling.tiles * (group + 1) / groups;
    alignas(64) float sums[kRowBlock * kPanel];
    const auto weights = QuantPanel<kBits>::at(p.weight, product.in_features, panel);
    if (rows == 1) {
      multiply_row<kBits>(weights, tiles, sums);
    } else {
      multiply_quant_panel<kBits>(weights, tiling, tiles, first, last, sums);
    }
    finish_rows(product, panel, token + tiling.first(first), tiling.first(last) - tiling.first(first), sums);
  });
}

void quant_linear(const QuantLinearParams& p) {
  const int64_t tokens = p.product.tokens;
  for (int64_t token = 0; token < tokens; token += kRowBlock) {
    const int64_t rows = kRowBlock < tokens - token ? kRowBlock : tokens - token;
    if (p.weight.bits == 4) {
      quant_linear_block<4>(p, token, rows);
    } else {
      quant_linear_block<8>(p, token, rows);
    }
  }
}

}  // namespace tgi::TGI_ISA
