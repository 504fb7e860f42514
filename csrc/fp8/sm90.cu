// The tile of an fp8 product for each shape. docs/kernels/fp8_gemm.md.
#include "common/dispatch.cuh"
#include "fp8/gemm.cuh"

namespace tgi {
namespace fp8 {

extern template cudaError_t launch_choice<__half>(const Fp8Params&, int, int, cudaStream_t);
extern template cudaError_t launch_choice<__nv_bfloat16>(const Fp8Params&, int, int, cudaStream_t);

// The tile that takes the least, as an H200 measures them: a chunk of 128 columns of K, a tile's beginning
// and end, and weights from memory. The choice does not change a bit of the result.
int choose(const Fp8Params& p, int sms) {
  struct Candidate {
    int tile, tokens, columns;
    float chunk_us;
  };
  constexpr Candidate kTiles[] = {
      {1, 64, 32, 0.125f}, {2, 64, 64, 0.155f}, {3, 64, 128, 0.245f}, {4, 128, 128, 0.42f}};
  constexpr float kTileUs = 0.4f, kBytesPerUs = 4e6f;
  const float memory_us =
      static_cast<float>(p.in_features) * static_cast<float>(p.out_features) / kBytesPerUs;
  int best = 0;
  float least = 0;
  for (const Candidate& c : kTiles) {
    const int waves = tiles_of(tiles_of(p.tokens, c.tokens) * tiles_of(p.out_features, c.columns), sms);
    const float taken = fmaxf(waves * (tiles_of(p.in_features, kChunk) * c.chunk_us + kTileUs), memory_us);
    if (best == 0 || taken < least) best = c.tile, least = taken;
  }
  if (best == 1 && p.tokens <= kFewTokens) best = 0;
  return best;
}

}  // namespace fp8

cudaError_t fp8_matmul(const Fp8Params& p, DType dtype, cudaStream_t stream) {
  if (p.tokens == 0 || p.out_features == 0) return cudaSuccess;
  int device = 0, sms = 0;
  if (const cudaError_t error = cudaGetDevice(&device)) return error;
  if (const cudaError_t error = cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device))
    return error;
  const int tile = p.tile >= 0 ? p.tile : fp8::choose(p, sms);
  return by_half_dtype(dtype, [&]<typename T>() { return fp8::launch_choice<T>(p, tile, sms, stream); });
}

}  // namespace tgi
