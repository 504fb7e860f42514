// residual + (x · weightᵀ + bias). Every output is one chain of fma along in_features, whatever the number of
// tokens and threads, so a token's bits depend on that token alone. Blocking as in Goto and van de Geijn
// 2008, doi:10.1145/1356052.1356053.
#pragma once

#include "common/parallel.h"
#include "common/vec.h"
#include "matmul/cpu_params.h"

namespace tgi::TGI_ISA {

// Rows of a register tile, and vectors of a panel that it takes at once: the accumulators, a broadcast x and
// a weight fill the registers (32 in AVX-512, 16 else). Few rows take more vectors, to have enough
// independent chains.
#if defined(TGI_ISA_IS_avx512)
constexpr int kMaxRows = 12;
constexpr int vecs_for(int) { return 2; }
#elif defined(TGI_ISA_IS_avx2)
constexpr int kMaxRows = 6;
constexpr int vecs_for(int rows) { return rows <= 2 ? 4 : 2; }
#else
constexpr int kMaxRows = 4;
constexpr int vecs_for(int rows) { return rows == 1 ? 8 : 2; }
#endif

constexpr int64_t kDepthBlock =
    256;  // steps along in_features whose weights (16 KB as bfloat16) stay in the L1 cache

// Weights are asked for this many steps before their turn: with several tiles the hardware's own prefetcher
// sees them too late (EPYC 9004, 1536 × 576, 16 tokens, one AVX2 core: 77 → 86 GFLOP/s; 32 steps 83).
constexpr int64_t kStepsAhead = 96;

// sums[kRows, 32] += x[depth, kRows]ᵀ · weights[depth, 32]; from zero when `fresh`.
template <int kRows, typename Weight>
TGI_INLINE void multiply_tile(const float* x, const Weight* weights, int64_t depth, float* sums, bool fresh) {
  constexpr int kVecs = vecs_for(kRows);
  for (int column = 0; column < kPanel; column += kVecs * kLanes) {
    Vec tile[kRows][kVecs];
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < kVecs; ++v) {
        tile[r][v] = fresh ? Vec{} : load(sums + r * kPanel + column + v * kLanes);
      }
    }
    const Weight* w = weights + column;
    for (int64_t k = 0; k < depth; ++k) {
      __builtin_prefetch(w + (k + kStepsAhead) * kPanel);
      Vec weight[kVecs];
      for (int v = 0; v < kVecs; ++v) weight[v] = load(w + k * kPanel + v * kLanes);
      for (int r = 0; r < kRows; ++r) {
        const Vec factor = splat(x[k * kRows + r]);
        for (int v = 0; v < kVecs; ++v) tile[r][v] = fma(factor, weight[v], tile[r][v]);
      }
    }
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < kVecs; ++v) store(sums + r * kPanel + column + v * kLanes, tile[r][v]);
    }
  }
}

// Calls body.operator()<rows>() for rows in 1 … kMaxRows.
template <int kRows = kMaxRows, typename Body>
TGI_INLINE void with_rows(int64_t rows, Body&& body) {
  if (rows == kRows) return body.template operator()<kRows>();
  if constexpr (kRows > 1) with_rows<kRows - 1>(rows, body);
}

// A block's rows in tiles of nearly one size: 16 rows are 6 + 5 + 5, not 6 + 6 + 4.
struct Tiling {
  int64_t rows, tiles;
  explicit Tiling(int64_t all) : rows(all), tiles((all + kMaxRows - 1) / kMaxRows) {}
  int64_t first(int64_t tile) const { return rows * tile / tiles; }
  int64_t size(int64_t tile) const { return first(tile + 1) - first(tile); }
};

// [rows, in_features] → [in_features, rows], so that a tile's step along in_features reads neighbours.
TGI_INLINE void interleave(const float* x, int64_t x_stride, int64_t rows, int64_t in_features, float* to) {
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t k = 0; k < in_features; ++k) to[k * rows + row] = x[row * x_stride + k];
  }
}

// Tiles [first, last) of a block against one panel. sums: [rows of the tiles, 32].
template <typename Weight>
TGI_INLINE void multiply_panel(const LinearParams& p, const Tiling& tiling, const float* tiles,
                               const Weight* panel, int64_t first, int64_t last, float* sums) {
  const int64_t block = last - first == 1 ? p.in_features : kDepthBlock;
  for (int64_t start = 0; start < p.in_features; start += block) {
    const int64_t depth = block < p.in_features - start ? block : p.in_features - start;
    for (int64_t tile = first; tile < last; ++tile) {
      const int64_t rows = tiling.size(tile);
      const float* x = tiles + tiling.first(tile) * p.in_features + start * rows;
      float* to = sums + (tiling.first(tile) - tiling.first(first)) * kPanel;
      with_rows(rows,
                [&]<int kRows>() { multiply_tile<kRows>(x, panel + start * kPanel, depth, to, start == 0); });
    }
  }
}

TGI_INLINE void finish_rows(const LinearParams& p, int64_t panel, int64_t token, int64_t rows,
                            const float* sums) {
  const int64_t column = panel * kPanel;
  const int64_t columns = kPanel < p.out_features - column ? kPanel : p.out_features - column;
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t first = (token + row) * p.out_features + column;
    for (int64_t i = 0; i < columns; ++i) {
      float y = sums[row * kPanel + i];
      if (p.bias != nullptr) y += p.bias[column + i];
      p.out[first + i] = p.residual == nullptr ? y : p.residual[first + i] + y;
    }
  }
}

template <typename Weight>
TGI_INLINE void linear_block(const LinearParams& p, int64_t token, int64_t rows) {
  const Tiling tiling(rows);
  const int64_t panels = (p.out_features + kPanel - 1) / kPanel;
  const auto weights = [&](int64_t panel) {
    return static_cast<const Weight*>(p.packed) + panel * p.in_features * kPanel;
  };
  if (rows == 1) {
    parallel_for_neighbours(panels, [&](int64_t panel) {
      alignas(64) float sums[kPanel];
      multiply_panel(p, tiling, p.x + token * p.x_stride, weights(panel), 0, 1, sums);
      finish_rows(p, panel, token, 1, sums);
    });
    return;
  }
  parallel_for(tiling.tiles, [&](int64_t tile) {
    interleave(p.x + (token + tiling.first(tile)) * p.x_stride, p.x_stride, tiling.size(tile), p.in_features,
               p.tiles + tiling.first(tile) * p.in_features);
  });
  // Enough tasks that threads end together, but a panel is cut among them only when there are few panels.
  const int64_t wanted = (4 * num_threads() + panels - 1) / panels;
  const int64_t groups = wanted < tiling.tiles ? wanted : tiling.tiles;
  parallel_for(panels * groups, [&](int64_t task) {
    const int64_t panel = task / groups, group = task % groups;
    const int64_t first = tiling.tiles * group / groups, last = tiling.tiles * (group + 1) / groups;
    alignas(64) float sums[kRowBlock * kPanel];
    multiply_panel(p, tiling, p.tiles, weights(panel), first, last, sums);
    finish_rows(p, panel, token + tiling.first(first), tiling.first(last) - tiling.first(first), sums);
  });
}

void linear(const LinearParams& p) {
  for (int64_t token = 0; token < p.tokens; token += kRowBlock) {
    const int64_t rows = kRowBlock < p.tokens - token ? kRowBlock : p.tokens - token;
    if (p.is_bfloat16) {
      linear_block<bfloat16>(p, token, rows);
    } else {
      linear_block<float>(p, token, rows);
    }
  }
}

template <typename Weight>
TGI_INLINE void pack(const PackLinearParams& p) {
  parallel_for((p.out_features + kPanel - 1) / kPanel, [&](int64_t panel) {
    const Weight* from = static_cast<const Weight*>(p.weight) + panel * kPanel * p.in_features;
    Weight* to = static_cast<Weight*>(p.packed) + panel * kPanel * p.in_features;
    const int64_t rest = p.out_features - panel * kPanel, columns = rest < kPanel ? rest : kPanel;
    for (int64_t k = 0; k < p.in_features; ++k) {
      for (int64_t i = 0; i < kPanel; ++i)
        to[k * kPanel + i] = i < columns ? from[i * p.in_features + k] : Weight{};
    }
  });
}

void pack_linear(const PackLinearParams& p) {
  if (p.is_bfloat16) {
    pack<bfloat16>(p);
  } else {
    pack<float>(p);
  }
}

}  // namespace tgi::TGI_ISA
