// Product with weights of 4 or 8 bits on Hopper: weights are the register operand of warpgroup products,
// widened while the products before them run.
//
// A warpgroup has 64 rows of weights, and one accumulator an output that takes the k16 steps in ascending
// order: the bits are those of the dense product of the dequantised matrix, for every number of tokens and
// every tiling. docs/kernels/quant_matmul.md.
//
//   producer:  | weights, pairs 0 … s-1 | wait for the previous kernel | x 0 … s-1 | all of s, s+1, … as
//   slots free | warpgroup: | wait slot → 16 bytes a lane → widen piece p while piece p - 1 multiplies → 4
//   products | … | epilogue |
#include "common/dispatch.cuh"
#include "common/hopper.cuh"
#include "common/pdl.cuh"
#include "common/tensor_map.h"
#include "common/wgmma.cuh"
#include "quant/cuda.h"
#include "quant/layout.cuh"
#include "quant/products.cuh"

namespace tgi {
namespace {

// ---- device ----

constexpr int kWarpgroup = 128;
constexpr int kMaxWarpgroups = 2;
// Large blocks need more registers than an even share: their producer is a whole warpgroup that gives up its
// own.
template <int kTokens>
constexpr bool kUneven = kTokens > 64;
template <int kTokens>
constexpr int kProducerThreads = kUneven<kTokens> ? kWarpgroup : 32;
constexpr int kRowBytes = 128;  // of a piece of x
constexpr int kMaxStages = 16;
constexpr int kHeaderBytes = 1024;  // the barriers; keeps x on the swizzle's 1024 bytes

// How one launch cuts its work: a tile is one strip a warpgroup, and a block of tokens.
struct Tiling {
  int warpgroups;
  int tiles, token_blocks, band;    // tiles of rows; blocks of tokens, of which `band` follow each other
  int pieces, stage_pieces, steps;  // of a strip, of a stage, stages of a strip
  int stage_groups;                 // at most, that touch a stage
  int stages;
};

// A slot holds, one after another: x [pieces][tokens][128 bytes], then for each warpgroup words, then pairs.
struct Slots {
  uint32_t full, empty, first;
  int x_piece, x, words, pairs, bytes;  // sizes in bytes: words and pairs are of one warpgroup

  template <int kTokens, int kBits>
  __device__ __forceinline__ static Slots of(uint8_t* shared, const Tiling& t) {
    Slots s{};
    s.full = shared_address(shared);
    s.empty = s.full + 8 * kMaxStages;
    s.first = s.full + kHeaderBytes;
    s.x_piece = kTokens * kRowBytes;
    s.x = t.stage_pieces * s.x_piece;
    s.words = t.stage_pieces * kPieceBytes<kBits>;
    s.pairs = t.stage_groups * kPairsBytes;
    s.bytes = (s.x + t.warpgroups * (s.words + s.pairs) + 1023) / 1024 * 1024;
    return s;
  }
  __device__ __forceinline__ uint32_t at(int slot) const { return first + slot * bytes; }
  __device__ __forceinline__ uint32_t words_of(int slot, int warpgroup) const {
    return at(slot) + x + warpgroup * words;
  }
  __device__ __forceinline__ uint32_t pairs_of(int slot, int warpgroups, int warpgroup) const {
    return at(slot) + x + warpgroups * words + warpgroup * pairs;
  }
};

struct Cursor {
  int slot = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void advance(int stages) {
    if (++slot < stages) return;
    slot = 0;
    parity ^= 1;
  }
};

// The tile of a number: within a band of token blocks, blocks that share weights follow each other, so that
// weights come from memory once a band, and the band's x stays in L2.
struct Tile {
  int rows, block;
  __device__ __forceinline__ Tile(int number, const Tiling& t) {
    const int in_band = t.tiles * t.band, band = number / in_band, rest = number - band * in_band;
    const int width = min(t.band, t.token_blocks - band * t.band);
    rows = rest / width;
    block = band * t.band + rest % width;
  }
};

template <int kTokens, int kBits>
struct Producer {
  const CUtensorMap* x_map;
  const QuantMatmulParams& p;
  const Tiling& t;
  const Slots& s;
  uint64_t policy = evict_first();

  // Weights and pairs of one stage; x is told of.
  __device__ __forceinline__ void load_weights(int slot, const Tile& tile, int step) const {
    const QuantMatrix& w = p.weight;
    const int first = step * t.stage_pieces, pieces = min(t.stage_pieces, t.pieces - first);
    const int group = first * kPiece / w.group_size;
    const int groups =
        (min((first + pieces) * kPiece, w.groups * w.group_size) - 1) / w.group_size - group + 1;
    const int words = pieces * kPieceBytes<kBits>, pairs = groups * kPairsBytes;
    const uint32_t barrier = s.full + 8 * slot;
    barrier_arrive_expecting(barrier, s.x + t.warpgroups * (words + pairs));
    for (int g = 0; g < t.warpgroups; ++g) {
      const int64_t strip = tile.rows * t.warpgroups + g;
      copy_bytes(s.words_of(slot, g),
                 static_cast<const uint8_t*>(w.words) + (strip * t.pieces + first) * kPieceBytes<kBits>,
                 words, barrier, policy);
      copy_bytes(s.pairs_of(slot, t.warpgroups, g),
                 static_cast<const uint8_t*>(w.scales) + (strip * w.groups + group) * kPairsBytes, pairs,
                 barrier, policy);
    }
  }

  // Pieces past the last column arrive as zeros.
  __device__ __forceinline__ void load_x(int slot, const Tile& tile, int step) const {
    const bool whole = p.weight.columns % kPiece == 0;
    copy_box(s.at(slot), x_map, whole ? 0 : step * kPiece, tile.block * kTokens,
             whole ? step * t.stage_pieces : 0, s.full + 8 * slot);
  }

  __device__ __forceinline__ void run() const {
    const int all = t.tiles * t.token_blocks;
    int number = blockIdx.x, step = 0;
    const auto next = [&] {
      if (++step < t.steps) return;
      step = 0;
      number += gridDim.x;
    };
    // The weights are older than this step: the first ring of them travels while the previous kernel ends.
    int ahead = 0;
    for (; ahead < t.stages && number < all; ++ahead, next()) load_weights(ahead, Tile(number, t), step);
    wait_for_previous();
    int late_number = blockIdx.x, late_step = 0;
    for (int i = 0; i < ahead; ++i) {
      load_x(i, Tile(late_number, t), late_step);
      if (++late_step == t.steps) late_step = 0, late_number += gridDim.x;
    }
    Cursor at;
    for (; number < all; next(), at.advance(t.stages)) {
      const Tile tile(number, t);
      barrier_wait(s.empty + 8 * at.slot, at.parity);
      load_weights(at.slot, tile, step);
      load_x(at.slot, tile, step);
    }
  }
};

// Adds bias and residual to a warpgroup's products and stores them. Accumulator 4j + 2h + e is of row 16 ·
// warp + lane / 4 + 8h of the strip and of token 8j + 2 (lane % 4) + e of the block.
template <typename T, int kTokens>
__device__ __forceinline__ void finish(const QuantMatmulParams& p, int strip, int block,
                                       const float (&d)[kTokens / 2]) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x % kWarpgroup / 32;
  const int row = strip * kStrip + warp * 16 + lane / 4, first = block * kTokens + lane % 4 * 2;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int feature = row + 8 * h;
    if (feature >= p.weight.rows) continue;
    const float bias = p.bias != nullptr ? to_float(static_cast<const T*>(p.bias)[feature]) : 0.0f;
#pragma unroll
    for (int j = 0; j < kTokens / 8; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int token = first + 8 * j + e;
        if (token >= p.tokens) continue;
        float y = rounded<T>(d[4 * j + 2 * h + e] + bias);
        if (p.residual != nullptr) {
          y += to_float(static_cast<const T*>(p.residual)[token * p.residual_stride + feature]);
        }
        static_cast<T*>(p.out)[token * p.out_stride + feature] = from_float<T>(y);
      }
    }
  }
}

// What a warpgroup needs of the stage that it works on, and which stages its products still read.
template <typename T, typename S, int kBits, int kTokens>
struct Consumer {
  const QuantMatmulParams& p;
  const Tiling& t;
  const Slots& s;
  Widener<T, S, kBits> lane;
  float d[kTokens / 2];
  uint32_t fragments[2][4][4];  // of the piece that multiplies, and of the one that is being widened
  Cursor at;
  int done = -1, soon = -1;  // slots whose products have ended, and will have with the next wait
  int first, left;           // piece of the strip that the next stage begins with, pieces left of this one
  int group_steps;           // k16 steps left of the group of columns
  uint32_t x, words, pairs;  // of the next piece; this lane's words, and pairs of its next group

  __device__ __forceinline__ void load_pairs() {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      uint32_t pair;
      asm volatile("ld.shared.u32 %0, [%1];" : "=r"(pair) : "r"(pairs + 32 * h));
      lane.load(h, pair);
    }
  }

  // Widens the next piece into `to`, whose last products have ended.
  __device__ __forceinline__ void widen(uint32_t (&to)[4][4]) {
    using Lane = Widener<T, S, kBits>;
    constexpr int kSteps = 4 / Lane::kWords;
    uint32_t word[4];
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      if (step % kSteps == 0) {
        asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(word[0]), "=r"(word[1]), "=r"(word[2]), "=r"(word[3])
                     : "r"(words + step / kSteps * kWarpgroup * 16));
      }
      if (group_steps == 0) {
        group_steps = p.weight.group_size / 16;
        load_pairs();
        pairs += kPairsBytes;
      }
      --group_steps;
      lane.widen(to[step], word + step % kSteps * Lane::kWords);
    }
  }

  __device__ __forceinline__ void multiply(uint32_t (&a)[4][4]) {
    // The compiler must not define operands between the products: it would run them one by one.
#pragma unroll
    for (auto& fragment : a) {
#pragma unroll
      for (uint32_t& pair : fragment) asm volatile("" : "+r"(pair)::"memory");
    }
    products_begin();
#pragma unroll
    for (int step = 0; step < 4; ++step) weights_times<T>(d, a[step], swizzled_operand(x + 32 * step));
    products_commit();
  }

  // Frees the slots that no product reads any more; called when one group of products at most is under way.
  __device__ __forceinline__ void release() {
    if (done >= 0 && threadIdx.x % 32 == 0) barrier_arrive(s.empty + 8 * done);
    done = soon;
    soon = -1;
  }

  // `pairs` goes to the pairs of the stage's first group that this strip has not loaded yet.
  __device__ __forceinline__ void enter_stage(int warpgroup) {
    const int warp = threadIdx.x % kWarpgroup / 32, lane_row = threadIdx.x % 32 / 4;
    const int first_group = first * kPiece / p.weight.group_size;
    const int next_group = (first * kPiece + group_steps * 16) / p.weight.group_size;
    left = min(t.stage_pieces, t.pieces - first);
    first += left;
    x = s.at(at.slot);
    words = s.words_of(at.slot, warpgroup) + threadIdx.x % kWarpgroup * 16;
    pairs = s.pairs_of(at.slot, t.warpgroups, warpgroup) + (next_group - first_group) * kPairsBytes +
            (warp * 16 + lane_row) * 4;
    barrier_wait(s.full + 8 * at.slot, at.parity);
  }

  __device__ __forceinline__ void run_piece(uint32_t (&a)[4][4], int warpgroup) {
    if (left == 0) enter_stage(warpgroup);
    products_wait<1>();
    release();
    widen(a);
    multiply(a);
    words += kPieceBytes<kBits>;
    x += s.x_piece;
    if (--left > 0) return;
    soon = at.slot;
    at.advance(t.stages);
  }

  __device__ __forceinline__ void run_tile(int warpgroup, const Tile& tile) {
    first = left = group_steps = 0;
#pragma unroll
    for (float& sum : d) sum = 0.0f;
    for (int pair = 0; pair < t.pieces / 2; ++pair) {
      run_piece(fragments[0], warpgroup);
      run_piece(fragments[1], warpgroup);
    }
    if (t.pieces % 2 == 1) run_piece(fragments[0], warpgroup);
    products_wait<0>();
    products_hold(d);
    release();
    release();
    finish<T, kTokens>(p, tile.rows * t.warpgroups + warpgroup, tile.block, d);
  }
};

template <typename T, typename S, int kBits, int kTokens>
__global__ void __launch_bounds__(kMaxWarpgroups* kWarpgroup + kProducerThreads<kTokens>,
                                  kUneven<kTokens> ? 1 : 2)
    quant_matmul_kernel(const __grid_constant__ CUtensorMap x_map, const QuantMatmulParams p,
                        const Tiling t) {
  extern __shared__ __align__(1024) uint8_t shared[];
  const Slots slots = Slots::of<kTokens, kBits>(shared, t);
  const int warpgroup = threadIdx.x / kWarpgroup;
  let_next_start();
  if (threadIdx.x == t.warpgroups * kWarpgroup) {
    prefetch_map(&x_map);
    for (int slot = 0; slot < t.stages; ++slot) {
      barrier_init(slots.full + 8 * slot, 1);
      barrier_init(slots.empty + 8 * slot, t.warpgroups * 4);
    }
    barrier_init_done();
  }
  __syncthreads();
  if (warpgroup == t.warpgroups) {
    if constexpr (kUneven<kTokens>) asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (threadIdx.x == t.warpgroups * kWarpgroup) {
      Producer<kTokens, kBits>{&x_map, p, t, slots}.run();
    } else {
      wait_for_previous();
    }
    return;
  }
  if constexpr (kUneven<kTokens>) asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
  wait_for_previous();
  Consumer<T, S, kBits, kTokens> consumer{p, t, slots};
  for (int number = blockIdx.x; number < t.tiles * t.token_blocks; number += gridDim.x) {
    consumer.run_tile(warpgroup, Tile(number, t));
  }
}

// ---- host ----

// Two CTAs fit an SM, so that the next kernel's weights arrive while this one ends, if half an SM holds four
// stages.
constexpr int kHalfSm = 112 * 1024, kWholeSm = 224 * 1024, kMinStages = 4;

struct Shape {
  int tokens, warpgroups;
};

// The block of tokens and number of strips that end first; bits do not depend on them. A k16 step of a tile
// takes tokens / 2 cycles of the tensor cores for each warpgroup, and about 24 of its instructions.
Shape shape_for(int tokens, int strips, int sms) {
  const int most = strips % 2 == 0 ? kMaxWarpgroups : 1;
  if (tokens <= 64) return {tokens, strips > sms ? most : 1};
  Shape best{};
  int64_t best_cost = -1;
  for (const int block : {64, 128, 256}) {
    for (int warpgroups = 1; warpgroups <= most; ++warpgroups) {
      const int64_t tiles = static_cast<int64_t>(strips / warpgroups) * ((tokens + block - 1) / block);
      const int64_t cost = (tiles + sms - 1) / sms * warpgroups * (block / 2 > 24 ? block / 2 : 24);
      if (best_cost >= 0 && cost > best_cost) continue;
      best_cost = cost;
      best = {block, warpgroups};
    }
  }
  return best;
}

template <int kTokens, int kBits>
Tiling tiling_for(const QuantMatmulParams& p, int warpgroups, int* shared_bytes) {
  const QuantMatrix& w = p.weight;
  const bool whole = w.columns % kPiece == 0;
  Tiling t{};
  t.warpgroups = warpgroups;
  t.tiles = (w.rows + kStrip - 1) / kStrip / warpgroups;
  t.token_blocks = (p.tokens + kTokens - 1) / kTokens;
  t.band = 2048 / kTokens;
  t.pieces = (w.columns + kPiece - 1) / kPiece;
  t.stage_pieces = !whole || kTokens > 64 ? 1 : kTokens > 16 ? 2 : 4;
  t.steps = (t.pieces + t.stage_pieces - 1) / t.stage_pieces;
  t.stage_groups = min(w.groups, (t.stage_pieces * kPiece - 1) / w.group_size + 2);
  const int stage = t.stage_pieces * kTokens * kRowBytes +
                    warpgroups * (t.stage_pieces * kPieceBytes<kBits> + t.stage_groups * kPairsBytes);
  const int stage_bytes = (stage + 1023) / 1024 * 1024;
  const int half_stages = (kHalfSm - kHeaderBytes) / stage_bytes;
  t.stages =
      min(kMaxStages, half_stages >= kMinStages ? half_stages : (kWholeSm - kHeaderBytes) / stage_bytes);
  *shared_bytes = kHeaderBytes + t.stages * stage_bytes;
  return t;
}

template <typename T, typename S, int kBits, int kTokens>
cudaError_t launch_matmul(const QuantMatmulParams& p, int warpgroups, int sms, cudaStream_t stream) {
  int shared_bytes = 0;
  const Tiling t = tiling_for<kTokens, kBits>(p, warpgroups, &shared_bytes);
  const bool whole = p.weight.columns % kPiece == 0;
  CUtensorMap x_map;
  const cuuint64_t sizes[3] = {static_cast<cuuint64_t>(whole ? kPiece : p.weight.columns),
                               static_cast<cuuint64_t>(p.tokens),
                               static_cast<cuuint64_t>(whole ? t.pieces : 1)};
  const cuuint64_t strides[2] = {static_cast<cuuint64_t>(p.x_stride) * 2, kRowBytes};
  const cuuint32_t box[3] = {kPiece, kTokens, static_cast<cuuint32_t>(t.stage_pieces)};
  if (!encode_swizzled_map(&x_map, __is_same(T, __half), p.x, sizes, strides, box))
    return cudaErrorInvalidValue;
  const auto kernel = quant_matmul_kernel<T, S, kBits, kTokens>;
  if (const cudaError_t error =
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kWholeSm)) {
    return error;
  }
  const dim3 grid(static_cast<unsigned>(min(t.tiles * t.token_blocks, sms)));
  return launch(kernel, grid, warpgroups * kWarpgroup + kProducerThreads<kTokens>, shared_bytes, stream,
                x_map, p, t);
}

}  // namespace

cudaError_t quant_matmul(const QuantMatmulParams& p, DType dtype, cudaStream_t stream) {
  if (p.tokens == 0 || p.weight.rows == 0) return cudaSuccess;
  int device = 0, sms = 0;
  if (const cudaError_t error = cudaGetDevice(&device)) return error;
  if (const cudaError_t error = cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device))
    return error;
  const Shape shape = shape_for(p.tokens, (p.weight.rows + kStrip - 1) / kStrip, sms);
  return by_operand_and_scale(dtype, p.weight.scale_dtype, [&]<typename T, typename S>() {
    return by_at_least<8, 16, 32, 64, 128, 256>(shape.tokens, [&]<int kTokens>() {
      if (p.weight.bits == 4) return launch_matmul<T, S, 4, kTokens>(p, shape.warpgroups, sms, stream);
      return launch_matmul<T, S, 8, kTokens>(p, shape.warpgroups, sms, stream);
    });
  });
}

}  // namespace tgi
