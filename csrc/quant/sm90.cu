// Product with weights of 4 or 8 bits on Hopper: weights are the register operand of warpgroup products,
// widened while the products before them run.
//
// A warpgroup has 64 rows of weights, and one accumulator an output that takes the k16 steps in ascending
// order: the bits are those of the dense product of the dequantised matrix, for every number of tokens and
// every tiling. docs/kernels/quant_matmul.md.
//
//   producers: | weights, pairs 0 … s-1 | wait for the previous kernel | x 0 … s-1 | all of s, s+1, … as
//   slots free | warpgroup: | wait slot → 16 bytes a lane → widen piece p while piece p - 1 multiplies → 4
//   products | … | epilogue |
#include "common/dispatch.cuh"
#include "common/hopper.cuh"
#include "common/mma.cuh"
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
constexpr int kMaxThreads = (kMaxWarpgroups + 1) * kWarpgroup;  // the last are the producers
// Large blocks need more registers than an even share: the producers give up theirs.
template <int kTokens>
constexpr bool kUneven = kTokens > 64;
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

// Four warps fill the ring, one thread of each: asking for copies takes a thread longer than memory takes to
// bring them (H200, one token, in a chain: 4096 x 4096 16.0 → 13.8 µs, 14336 x 4096 64.4 → 56.8).
enum class Load { words, x, pairs, more_words };  // of the first warpgroup, for all, for all, of the second

template <int kTokens, int kBits>
struct Producer {
  const CUtensorMap* x_map;
  const QuantMatmulParams& p;
  const Tiling& t;
  const Slots& s;
  const Load load;
  int block = 0;  // of tokens
  int64_t strip = 0;
  int group = 0,
      group_end = 0;  // group of columns of the next stage's first column; the first column after it

  __device__ __forceinline__ void enter_tile(const Tile& tile) {
    block = tile.block;
    strip = static_cast<int64_t>(tile.rows) * t.warpgroups;
    group = 0;
    group_end = p.weight.group_size;
  }

  // Asks for this thread's part of a stage.
  __device__ __forceinline__ void fill(int slot, int step, uint64_t policy) {
    const QuantMatrix& w = p.weight;
    const uint32_t barrier = s.full + 8 * slot;
    const int first = step * t.stage_pieces;
    if (load == Load::x) {  // pieces past the last column arrive as zeros
      const bool whole = w.columns % kPiece == 0;
      copy_box(s.at(slot), x_map, whole ? 0 : first * kPiece, block * kTokens, whole ? first : 0, barrier);
      return;
    }
    const int pieces = min(t.stage_pieces, t.pieces - first), end = (first + pieces) * kPiece;
    const int words_bytes = pieces * kPieceBytes<kBits>;
    if (load == Load::more_words) {
      copy_words(slot, 1, first, words_bytes, policy);
      return;
    }
    const int from = group;
    int groups = 1;
    for (; group_end < end; group_end += w.group_size) ++groups;
    group += groups - 1;
    if (group_end == end) {
      ++group;
      group_end += w.group_size;
    }
    const int pairs_bytes = groups * kPairsBytes;
    if (load == Load::words) {
      barrier_arrive_expecting(barrier, s.x + t.warpgroups * (words_bytes + pairs_bytes));
      copy_words(slot, 0, first, words_bytes, policy);
      return;
    }
    for (int g = 0; g < t.warpgroups; ++g) {
      copy_bytes(s.pairs_of(slot, t.warpgroups, g),
                 static_cast<const uint8_t*>(w.scales) + ((strip + g) * w.groups + from) * kPairsBytes,
                 pairs_bytes, barrier, policy);
    }
  }

  __device__ __forceinline__ void copy_words(int slot, int g, int first, int bytes, uint64_t policy) const {
    copy_bytes(
        s.words_of(slot, g),
        static_cast<const uint8_t*>(p.weight.words) + ((strip + g) * t.pieces + first) * kPieceBytes<kBits>,
        bytes, s.full + 8 * slot, policy);
  }

  // The weights are older than this step: the first ring of them travels while the previous kernel ends.
  __device__ __forceinline__ void run() {
    const uint64_t policy = evict_first();
    bool has_waited = load == Load::x;
    if (has_waited) wait_for_previous();
    Cursor at;
    int filled = 0;
    if (load == Load::more_words && t.warpgroups == 1) return wait_for_previous();
    for (int number = blockIdx.x; number < t.tiles * t.token_blocks; number += gridDim.x) {
      enter_tile(Tile(number, t));
      for (int step = 0; step < t.steps; ++step, at.advance(t.stages)) {
        if (filled < t.stages) {
          ++filled;
        } else {
          if (!has_waited) wait_for_previous();
          has_waited = true;
          barrier_wait(s.empty + 8 * at.slot, at.parity ^ 1);
        }
        fill(at.slot, step, policy);
      }
    }
    if (!has_waited) wait_for_previous();
  }
};

// An 8 × 8 matrix of 16-bit elements, two of a row in each lane, transposed.
__device__ __forceinline__ uint32_t transposed(uint32_t two) {
  uint32_t to;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(to) : "r"(two));
  return to;
}

// Adds bias and residual to a warpgroup's products and stores them. Accumulator 4j + 2h + e is of row 16 ·
// warp + lane / 4 + 8h of the strip and of token 8j + 2 (lane % 4) + e of the block; they change places, so
// that a lane has four features of one token and a warp writes whole sectors: memory takes parts of them at a
// fifth of its speed.
template <typename T, int kTokens>
__device__ __forceinline__ void finish(const QuantMatmulParams& p, int strip, int block,
                                       const float (&d)[kTokens / 2]) {
  const int lane = threadIdx.x % 32, quad = lane % 4;
  const int row = strip * kStrip + threadIdx.x % kWarpgroup / 32 * 16;
  const int feature = row + quad * 4, features = p.weight.rows;
  float bias[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int of = row + lane / 4 + 8 * h;
    bias[h] = p.bias != nullptr && of < features ? to_float(static_cast<const T*>(p.bias)[of]) : 0.0f;
  }
#pragma unroll
  for (int j = 0; j < kTokens / 8; ++j) {
    uint32_t half[2];
#pragma unroll
    for (int h = 0; h < 2; ++h)
      half[h] = transposed(pack<T>(d[4 * j + 2 * h] + bias[h], d[4 * j + 2 * h + 1] + bias[h]));
    uint32_t y[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int from = lane / 4 * 4 + quad % 2 * 2 + i;
      const uint32_t low = __shfl_sync(~0u, half[0], from), high = __shfl_sync(~0u, half[1], from);
      y[i] = quad < 2 ? low : high;
    }
    const int token = block * kTokens + 8 * j + lane / 4;
    if (token >= p.tokens) continue;
    T* to = static_cast<T*>(p.out) + token * p.out_stride + feature;
    const T* residual = static_cast<const T*>(p.residual) + token * p.residual_stride + feature;
    if (p.is_wide && feature < features) {
      if (p.residual != nullptr) {
        const uint2 more = *reinterpret_cast<const uint2*>(residual);
        const float2 a = unpack<T>(y[0]), b = unpack<T>(y[1]), c = unpack<T>(more.x), e = unpack<T>(more.y);
        y[0] = pack<T>(a.x + c.x, a.y + c.y);
        y[1] = pack<T>(b.x + e.x, b.y + e.y);
      }
      *reinterpret_cast<uint2*>(to) = make_uint2(y[0], y[1]);
      continue;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (feature + i >= features) break;
      const float2 two = unpack<T>(y[i / 2]);
      float one = i % 2 == 0 ? two.x : two.y;
      if (p.residual != nullptr) one += to_float(residual[i]);
      to[i] = from_float<T>(one);
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

  __device__ __forceinline__ void enter_group() {
    group_steps = p.weight.group_size / 16;
    load_pairs();
    pairs += kPairsBytes;
  }

  static constexpr int kLoads = Widener<T, S, kBits>::kWords;  // of 16 bytes, for a piece

  // Widens a piece into `to`, whose last products have ended.
  __device__ __forceinline__ void widen(uint32_t (&to)[4][4], const uint32_t (&word)[kLoads][4]) {
    const auto step_words = [&](int step) { return &word[0][0] + step * kLoads; };
    if (group_steps == 0) enter_group();
    if (group_steps >= 4) {  // four steps side by side: a lane waits for none of its own results
      group_steps -= 4;
#pragma unroll
      for (int step = 0; step < 4; ++step) lane.widen(to[step], step_words(step));
      return;
    }
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      if (group_steps == 0) enter_group();
      --group_steps;
      lane.widen(to[step], step_words(step));
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
    left = min(t.stage_pieces, t.pieces - first);
    first += left;
    x = s.at(at.slot);
    words = s.words_of(at.slot, warpgroup) + threadIdx.x % kWarpgroup * 16;
    pairs = s.pairs_of(at.slot, t.warpgroups, warpgroup) + (group_steps > 0 ? kPairsBytes : 0) +
            (warp * 16 + lane_row) * 4;
    barrier_wait(s.full + 8 * at.slot, at.parity);
  }

  __device__ __forceinline__ void run_piece(uint32_t (&a)[4][4], int warpgroup) {
    if (left == 0) enter_stage(warpgroup);
    uint32_t word[kLoads][4];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(word[i][0]), "=r"(word[i][1]), "=r"(word[i][2]), "=r"(word[i][3])
                   : "r"(words + i * kWarpgroup * 16));
    }
    products_wait<1>();
    release();
    widen(a, word);
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

// The same for few tokens, warp by warp: nobody waits for three others (H200, one token, in a chain: 4096 x
// 28672 63.8 → 43.4 µs, 14336 x 4096 76.8 → 64.4; 64 tokens: 59.3 → 82.5, so they stay with the warpgroups).
template <typename T, typename S, int kBits, int kTokens>
struct FewTokens {
  static constexpr int kLoads = Widener<T, S, kBits>::kWords;
  static constexpr int kBlocks = kTokens / 8;
  const QuantMatmulParams& p;
  const Tiling& t;
  const Slots& s;
  Widener<T, S, kBits> widener;
  float d[kTokens / 2];
  Cursor at;
  int group_steps;

  __device__ __forceinline__ void enter_group(uint32_t& pairs) {
    group_steps = p.weight.group_size / 16;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      uint32_t pair;
      asm volatile("ld.shared.u32 %0, [%1];" : "=r"(pair) : "r"(pairs + 32 * h));
      widener.load(h, pair);
    }
    pairs += kPairsBytes;
  }

  // Operands of a piece: fragments of weights by step, of x by half.
  struct Operands {
    uint32_t a[4][4], b[2][kBlocks][4];
  };

  __device__ __forceinline__ void multiply(const Operands& of) {
    float (*const sums)[4] = reinterpret_cast<float (*)[4]>(d);
#pragma unroll
    for (int step = 0; step < 4; ++step) {
#pragma unroll
      for (int j = 0; j < kBlocks; ++j) {
        mma<T>(sums[j], of.a[step], of.b[step / 2][j][step % 2 * 2], of.b[step / 2][j][step % 2 * 2 + 1]);
      }
    }
  }

  // Widens a piece; the products of the one before run between its instructions, as they wait for each other.
  __device__ __forceinline__ void run_piece(uint32_t words, uint32_t x, const uint32_t (&x_lane)[2],
                                            uint32_t& pairs, Operands& before) {
    uint32_t word[kLoads][4];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(word[i][0]), "=r"(word[i][1]), "=r"(word[i][2]), "=r"(word[i][3])
                   : "r"(words + i * kWarpgroup * 16));
    }
    if (group_steps == 0) enter_group(pairs);
    Operands now;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int j = 0; j < kBlocks; ++j) load_matrices(now.b[half][j], x + j * 8 * kRowBytes + x_lane[half]);
    }
    if (group_steps >= 4) {  // four steps side by side: a lane waits for none of its own results
      group_steps -= 4;
      multiply(before);
#pragma unroll
      for (int step = 0; step < 4; ++step) widener.widen(now.a[step], &word[0][0] + step * kLoads);
    } else {
      multiply(before);
#pragma unroll
      for (int step = 0; step < 4; ++step) {
        if (group_steps == 0) enter_group(pairs);
        --group_steps;
        widener.widen(now.a[step], &word[0][0] + step * kLoads);
      }
    }
    before = now;
  }

  __device__ __forceinline__ void run_tile(int warpgroup, const Tile& tile) {
    const int warp = threadIdx.x % kWarpgroup / 32, lane = threadIdx.x % 32;
    const uint32_t token = lane % 8, chunk = lane / 8;
    const uint32_t x_lane[2] = {token * kRowBytes + ((chunk ^ token) << 4),
                                token * kRowBytes + (((4 + chunk) ^ token) << 4)};
    group_steps = 0;
#pragma unroll
    for (float& sum : d) sum = 0.0f;
    Operands before{};  // zeros, which change no sum
    for (int first = 0; first < t.pieces; first += t.stage_pieces) {
      const int pieces = min(t.stage_pieces, t.pieces - first);
      uint32_t words = s.words_of(at.slot, warpgroup) + threadIdx.x % kWarpgroup * 16, x = s.at(at.slot);
      uint32_t pairs = s.pairs_of(at.slot, t.warpgroups, warpgroup) + (group_steps > 0 ? kPairsBytes : 0) +
                       (warp * 16 + lane / 4) * 4;
      barrier_wait(s.full + 8 * at.slot, at.parity);
#pragma unroll 4
      for (int piece = 0; piece < pieces; ++piece) {
        run_piece(words, x, x_lane, pairs, before);
        words += kPieceBytes<kBits>;
        x += s.x_piece;
      }
      __syncwarp();
      if (lane == 0) barrier_arrive(s.empty + 8 * at.slot);
      at.advance(t.stages);
    }
    multiply(before);
    finish<T, kTokens>(p, tile.rows * t.warpgroups + warpgroup, tile.block, d);
  }
};

template <bool kFirst, typename First, typename Second>
struct OneOf {
  using type = First;
};
template <typename First, typename Second>
struct OneOf<false, First, Second> {
  using type = Second;
};

template <typename T, typename S, int kBits, int kTokens>
__global__ void __launch_bounds__(kMaxThreads, kTokens > 8 ? 1 : 2)
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
    if (threadIdx.x % 32 == 0) {
      const auto load = static_cast<Load>(threadIdx.x % kWarpgroup / 32);
      Producer<kTokens, kBits>{.x_map = &x_map, .p = p, .t = t, .s = slots, .load = load}.run();
    } else {
      wait_for_previous();
    }
    return;
  }
  if constexpr (kUneven<kTokens>) asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
  wait_for_previous();
  using Worker =
      typename OneOf<(kTokens > 16), Consumer<T, S, kBits, kTokens>, FewTokens<T, S, kBits, kTokens>>::type;
  Worker worker{.p = p, .t = t, .s = slots};
  for (int number = blockIdx.x; number < t.tiles * t.token_blocks; number += gridDim.x) {
    worker.run_tile(warpgroup, Tile(number, t));
  }
}

// ---- host ----

// Two CTAs fit an SM, so that the next kernel's weights arrive while this one ends, if half an SM holds four
// stages.
constexpr int kHalfSm = 112 * 1024, kWholeSm = 224 * 1024, kMinStages = 4;

struct Shape {
  int tokens, warpgroups;
};

// The block of tokens and number of strips that end first; bits do not depend on them. A piece of a tile
// takes about as many cycles as its products, but no fewer than its weights take to be widened (H200: see
// docs).
Shape shape_for(int tokens, int strips, int sms) {
  const int most = strips % 2 == 0 ? kMaxWarpgroups : 1;
  if (tokens <= 64) return {tokens, strips > sms ? most : 1};
  Shape best{};
  int64_t best_cost = -1;
  for (const int block : {64, 128, 256}) {
    for (int warpgroups = 1; warpgroups <= most; ++warpgroups) {
      const int64_t tiles = static_cast<int64_t>(strips / warpgroups) * ((tokens + block - 1) / block);
      const int cycles = block == 64 ? 250 + 50 * warpgroups : 100 + 400 * warpgroups * block / 256 * 4 / 3;
      const int64_t cost = (tiles + sms - 1) / sms * cycles;
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
  t.stage_pieces = !whole || kTokens > 64 ? 1 : kTokens > 16 ? 2 : 32 / kBits / warpgroups;
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
  return launch(kernel, grid, (warpgroups + 1) * kWarpgroup, shared_bytes, stream, x_map, p, t);
}

}  // namespace

cudaError_t quant_matmul(const QuantMatmulParams& p, DType dtype, cudaStream_t stream) {
  if (p.tokens == 0 || p.weight.rows == 0) return cudaSuccess;
  int device = 0, sms = 0;
  if (const cudaError_t error = cudaGetDevice(&device)) return error;
  if (const cudaError_t error = cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device))
    return error;
  if (p.tokens <= 16) return quant_matmul_few(p, dtype, sms, stream);
  const Shape shape = shape_for(p.tokens, (p.weight.rows + kStrip - 1) / kStrip, sms);
  return by_operand_and_scale(dtype, p.weight.scale_dtype, [&]<typename T, typename S>() {
    return by_at_least<8, 16, 32, 64, 128, 256>(shape.tokens, [&]<int kTokens>() {
      if (p.weight.bits == 4) return launch_matmul<T, S, 4, kTokens>(p, shape.warpgroups, sms, stream);
      return launch_matmul<T, S, 8, kTokens>(p, shape.warpgroups, sms, stream);
    });
  });
}

}  // namespace tgi
