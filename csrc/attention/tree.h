// The one order in which decode and prefill add up a row's keys, so that both give the same bits, however the
// work is cut: see docs/kernels/attention_tree.md.
//
// Tiles of kTile keys begin at position 0 of the sequence. A tile's weights are relative to its own maximum,
// and its values are summed from zero in steps of 16 keys. kNodeTiles tiles, merged one after the other, are
// a node; the nodes of kChunkTiles tiles, merged likewise, a chunk; and so the chunks make the result.
// Merging what holds no key a row sees changes no bit.
#pragma once

namespace tgi {

template <int kDim>
struct Tree {
  // Heads of 256 leave room in registers for half the scores, and for no sum of nodes beside that of tiles.
  static constexpr int kTile = kDim == 256 ? 64 : 128;
  static constexpr int kNodeShift = kDim == 256 ? 0 : 2;  // log2 of the tiles of a node
  static constexpr int kChunkShift = kDim == 256 ? 6 : 7;
  static constexpr int kNodeTiles = 1 << kNodeShift;
  static constexpr int kChunkTiles = 1 << kChunkShift;
};

// Keys of a chunk.
constexpr int chunk_keys(int head_dim) {
  return head_dim > 128 ? Tree<256>::kTile * Tree<256>::kChunkTiles
                        : Tree<128>::kTile * Tree<128>::kChunkTiles;
}

}  // namespace tgi
