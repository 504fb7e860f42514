// The dense product's tile for each shape. docs/kernels/gemm.md.
#include "common/dispatch.cuh"
#include "matmul/gemm.cuh"

namespace tgi {
namespace gemm {

extern template cudaError_t launch_choice<__half>(const MatmulParams&, const Choice&, int, cudaStream_t);
extern template cudaError_t launch_choice<__nv_bfloat16>(const MatmulParams&, const Choice&, int,
                                                         cudaStream_t);

// For k16, n columns take n / 2 clocks of the tensor cores for each warpgroup. Shared memory, 128 bytes a
// clock, is written (tokens + n) · 32 bytes and read (64 + n) · 32 for each warpgroup; with one of them that
// is more, and as much as the SM can take in. Two warpgroups' products draw so much power that clocks fall by
// an eighth (H200, 768 tokens, 4096 → 6144: 3 waves of 64 × 192 take 55 µs, 2 of 128 × 192 65). A tile begins
// and ends in about 1500 clocks.
float clocks(const MatmulParams& p, const Choice& c, int sms) {
  const int tokens = 64 * c.warpgroups * c.peers;
  const int tiles = tiles_of(p.tokens, tokens) * tiles_of(p.out_features, c.columns);
  const int waves = tiles_of(tiles, sms / c.peers);
  const float n = static_cast<float>(c.columns);
  const float k16 = c.warpgroups == 1 ? 32 + n / 2 : 1.13f * fmaxf(n, 64 + 0.75f * n);
  return waves * (tiles_of(p.in_features, 16) * k16 + 1500);
}

// The tile that takes the least. Two tiles of 64 tokens share their weights: 128 tokens, 4096 → 4096 13.5 →
// 13.0 µs, 14336 → 4096 38.5 → 36.1. So do pairs of large ones where power decides: 8192 tokens, 4096 → 4096
// 437 → 432 µs, 4096 → 28672 2845 → 2822. Others gain nothing by it (docs/kernels/gemm.md).
Choice choose(const MatmulParams& p, int sms) {
  constexpr Choice kTiles[] = {{1, 32, 1},  {1, 64, 1},  {1, 96, 1},  {1, 128, 1}, {1, 192, 1}, {1, 224, 1},
                               {2, 128, 1}, {2, 160, 1}, {2, 192, 1}, {2, 224, 1}, {2, 256, 1}};
  Choice best{};
  float least = 0;
  for (Choice c : kTiles) {
    const int token_tiles = tiles_of(p.tokens, 64 * c.warpgroups);
    if (c.warpgroups == 1 ? token_tiles == 2 : token_tiles >= 8 && token_tiles % 2 == 0) c.peers = 2;
    const float taken = clocks(p, c, sms);
    if (best.columns == 0 || taken < least) best = c, least = taken;
  }
  return best;
}

}  // namespace gemm

cudaError_t gemm_matmul(const MatmulParams& p, DType dtype, cudaStream_t stream) {
  if (p.tokens == 0 || p.out_features == 0) return cudaSuccess;
  int device = 0, sms = 0;
  if (const cudaError_t error = cudaGetDevice(&device)) return error;
  if (const cudaError_t error = cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device))
    return error;
  const gemm::Choice choice = gemm::choose(p, sms);
  return by_half_dtype(dtype, [&]<typename T>() { return gemm::launch_choice<T>(p, choice, sms, stream); });
}

}  // namespace tgi
