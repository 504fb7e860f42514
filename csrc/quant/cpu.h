// x · weightᵀ + bias with weights of 2 to 9 bits, which are widened to fp32 a block at a time.
//
// A weight is rounded once, to fp32: every output is the chain of fma along in_features that matmul's
// `linear` computes from the dequantised matrix, bit for bit, for any number of tokens.
#pragma once

#include "common/parallel.h"
#include "matmul/cpu.h"
#include "quant/cpu_codes.h"

namespace tgi::TGI_ISA {

constexpr int64_t kQuantBlock = 128;  // steps along in_features widened at once: 16 KB, half of the L1 cache
constexpr int64_t kWordsAhead = 16;   // words of one row of a panel that are asked for before their turn
constexpr int kRunOctets = kQuantRun / kOctet;

struct QuantPanel {
  const QuantWeight& weight;
  int64_t in_features, index;
};

template <typename Codes>
struct Unpacker {
  static constexpr int kBits = Codes::kBits;
  const int32_t* words;
  Codes codes;

  explicit Unpacker(const QuantPanel& panel)
      : words(panel.weight.words +
              panel.index * ((panel.in_features + kQuantRun - 1) / kQuantRun) * kBits * kPanel),
        codes(panel.weight) {}

  TGI_MEMBER const int32_t* run(int64_t index) const { return words + index * kBits * kPanel; }

  // Code kIndex of a run as a weight, of the features of vector v.
  template <int kIndex>
  TGI_MEMBER Vec weight(const int32_t* run, int v, const GroupScales& group) const {
    constexpr int kShift = kIndex * kBits % 32;
    if constexpr (kIndex % 2 == 1 && kShift >= kBits && kShift + kBits <= 32 &&
                  requires { &Codes::next_value; }) {
      // Two codes share a shift, the costliest of what there is to do: scaling by powers of two rounds
      // nothing.
      const VecUint both = code_at<kBits, kIndex - 1>(run + v * kLanes);
      return scaled(codes.next_value(both), group.next_scale[v], group.offset[v]);
    }
    return scaled(codes.value(code_at<kBits, kIndex>(run + v * kLanes)), group.scale[v], group.offset[v]);
  }
};

// Reads a group's scales when a walk along octets comes to its first.
struct GroupWalk {
  const QuantWeight& weight;
  int64_t octets, next, index;  // of a group; the octet that begins the next; where its scales are
  GroupScales scales{};

  TGI_MEMBER GroupWalk(const QuantPanel& panel, int64_t octet) : weight(panel.weight) {
    octets = weight.groups == 1 ? panel.in_features : weight.group_size / kOctet;
    const int64_t group = octet / octets;
    next = group * octets;
    index = (panel.index * weight.groups + group) * kPanel;
    if (next < octet) step(next);
  }

  TGI_MEMBER void step(int64_t octet) {
    if (octet != next) return;
    scales.read(weight, index);
    next += octets;
    index += kPanel;
  }
};

// Weights of steps [first, first + depth) along in_features, first a multiple of 32: to[depth, 32], up to a
// whole octet more.
template <typename Codes>
void widen_block(const QuantPanel& where, int64_t first, int64_t depth, float* to) {
  const Unpacker<Codes> panel(where);
  GroupWalk group(where, first / kOctet);
  const int64_t end = first + depth;
  for (int64_t start = first; start < end; start += kQuantRun) {
    const int32_t* run = panel.run(start / kQuantRun);
    unrolled<0, kRunOctets>([&]<int kRunOctet>() __attribute__((always_inline)) {
      if (start + kRunOctet * kOctet >= end) return;
      group.step(start / kOctet + kRunOctet);
      for (int v = 0; v < kPanelVecs; ++v) {
        unrolled<0, kOctet>([&]<int kCode>() __attribute__((always_inline)) {
          store(to + kCode * kPanel + v * kLanes,
                panel.template weight<kRunOctet * kOctet + kCode>(run, v, group.scales));
        });
      }
      to += kOctet * kPanel;
    });
  }
}

// sums[32] = x · weights of one row: weights go from the words to the fma without touching memory.
template <typename Codes>
void multiply_row(const QuantPanel& where, const float* x, float* sums) {
  const Unpacker<Codes> panel(where);
  GroupWalk group(where, 0);
  const int64_t runs = where.in_features / kQuantRun, rest = where.in_features % kQuantRun;
  Vec sum[kPanelVecs] = {};
  for (int64_t r = 0; r < runs; ++r, x += kQuantRun) {
    const int32_t* run = panel.run(r);
    for (int w = 0; w < Codes::kBits; ++w) {
      __builtin_prefetch(run + (kWordsAhead + w) * kPanel);
      __builtin_prefetch(run + (kWordsAhead + w) * kPanel + 16);
    }
    unrolled<0, kRunOctets>([&]<int kRunOctet>() __attribute__((always_inline)) {
      group.step(r * kRunOctets + kRunOctet);
      unrolled<0, kOctet>([&]<int kCode>() __attribute__((always_inline)) {
        constexpr int kIndex = kRunOctet * kOctet + kCode;
        const Vec factor = splat(x[kIndex]);
        for (int v = 0; v < kPanelVecs; ++v) {
          sum[v] = fma(factor, panel.template weight<kIndex>(run, v, group.scales), sum[v]);
        }
      });
    });
  }
  if (rest > 0) {
    alignas(64) float block[kQuantRun * kPanel];
    widen_block<Codes>(where, runs * kQuantRun, rest, block);
    for (int64_t k = 0; k < rest; ++k) {
      const Vec factor = splat(x[k]);
      for (int v = 0; v < kPanelVecs; ++v)
        sum[v] = fma(factor, load(block + k * kPanel + v * kLanes), sum[v]);
    }
  }
  for (int v = 0; v < kPanelVecs; ++v) store(sums + v * kLanes, sum[v]);
}

// What differs between kinds of codes.
struct CodeKernels {
  void (*widen)(const QuantPanel& panel, int64_t first, int64_t depth, float* to);
  void (*row)(const QuantPanel& panel, const float* x, float* sums);
};

template <int kBits = 2>
TGI_INLINE CodeKernels integer_kernels(int bits) {
  if constexpr (kBits < 9) {
    if (bits != kBits) return integer_kernels<kBits + 1>(bits);
  }
  return {widen_block<IntegerCodes<kBits>>, multiply_row<IntegerCodes<kBits>>};
}

TGI_INLINE CodeKernels kernels_of(const QuantWeight& weight) {
  switch (weight.values) {
    case CodeValues::table:
      return {widen_block<TableCodes>, multiply_row<TableCodes>};
    case CodeValues::e4m3:
      return {widen_block<Float8Codes>, multiply_row<Float8Codes>};
    default:
      return integer_kernels(weight.bits);
  }
}

// Tiles [first, last) of a block against one panel. sums: [rows of the tiles, 32].
TGI_INLINE void multiply_quant_panel(const CodeKernels& kernels, const QuantPanel& panel,
                                     const Tiling& tiling, const float* tiles, int64_t first, int64_t last,
                                     float* sums) {
  alignas(64) float block[kQuantBlock * kPanel];
  for (int64_t start = 0; start < panel.in_features; start += kQuantBlock) {
    const int64_t left = panel.in_features - start, depth = kQuantBlock < left ? kQuantBlock : left;
    kernels.widen(panel, start, depth, block);
    for (int64_t tile = first; tile < last; ++tile) {
      const int64_t rows = tiling.size(tile);
      const float* x = tiles + tiling.first(tile) * panel.in_features + start * rows;
      float* to = sums + (tiling.first(tile) - tiling.first(first)) * kPanel;
      with_rows(rows, [&]<int kRows>() { multiply_tile<kRows>(x, block, depth, to, start == 0); });
    }
  }
}

TGI_INLINE void quant_linear_block(const QuantLinearParams& p, int64_t token, int64_t rows) {
  const LinearParams& product = p.product;
  const CodeKernels kernels = kernels_of(p.weight);
  const Tiling tiling(rows);
  const int64_t panels = (product.out_features + kPanel - 1) / kPanel;
  if (rows == 1) {
    parallel_for_neighbours(panels, [&](int64_t index) {
      alignas(64) float sums[kPanel];
      kernels.row({p.weight, product.in_features, index}, product.x + token * product.x_stride, sums);
      finish_rows(product, index, token, 1, sums);
    });
    return;
  }
  parallel_for(tiling.tiles, [&](int64_t tile) {
    interleave(product.x + (token + tiling.first(tile)) * product.x_stride, product.x_stride,
               tiling.size(tile), product.in_features,
               product.tiles + tiling.first(tile) * product.in_features);
  });
  // A panel that is cut among threads is widened by each of them.
  const int64_t wanted = (4 * num_threads() + panels - 1) / panels;
  const int64_t groups = wanted < tiling.tiles ? wanted : tiling.tiles;
  parallel_for(panels * groups, [&](int64_t task) {
    const int64_t index = task / groups, group = task % groups;
    const int64_t first = tiling.tiles * group / groups, last = tiling.tiles * (group + 1) / groups;
    alignas(64) float sums[kRowBlock * kPanel];
    const QuantPanel panel{p.weight, product.in_features, index};
    multiply_quant_panel(kernels, panel, tiling, product.tiles, first, last, sums);
    finish_rows(product, index, token + tiling.first(first), tiling.first(last) - tiling.first(first), sums);
  });
}

void quant_linear(const QuantLinearParams& p) {
  const int64_t tokens = p.product.tokens;
  for (int64_t token = 0; token < tokens; token += kRowBlock) {
    quant_linear_block(p, token, kRowBlock < tokens - token ? kRowBlock : tokens - token);
  }
}

}  // namespace tgi::TGI_ISA
