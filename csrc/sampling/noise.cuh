// Counter-based noise: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011).
// The definition of what is drawn with it is in tgi_kernels/sampling.py; the CPU's is cpu_noise.h.
#pragma once

#include <cstdint>

namespace tgi {

// Four words of noise for a counter of four words.
__device__ __forceinline__ uint4 philox(uint4 words, uint64_t key) {
  uint32_t low_key = static_cast<uint32_t>(key), high_key = static_cast<uint32_t>(key >> 32);
  asm("" : "+r"(low_key), "+r"(high_key));  // else a loop of draws keeps twenty round keys in registers
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint32_t low_a = words.x * 0xd2511f53u, high_a = __umulhi(words.x, 0xd2511f53u);
    const uint32_t low_b = words.z * 0xcd9e8d57u, high_b = __umulhi(words.z, 0xcd9e8d57u);
    words = {high_b ^ words.y ^ low_key, low_b, high_a ^ words.w ^ high_key, low_a};
    low_key += 0x9e3779b9u;
    high_key += 0xbb67ae85u;
  }
  return words;
}

// One of four, without an array: a run-time index would move it to memory.
template <typename Four>
__device__ __forceinline__ auto pick(const Four& four, int i) {
  return i == 0 ? four.x : i == 1 ? four.y : i == 2 ? four.z : four.w;
}

// What the noise of one draw depends on, but for the token.
struct Noise {
  uint64_t seed;
  uint32_t position, choice;

  // The words of tokens 4·quad … 4·quad + 3.
  __device__ __forceinline__ uint4 words(uint32_t quad) const {
    return philox({quad, position, choice, 0}, seed);
  }

  __device__ __forceinline__ uint32_t word(uint32_t token) const { return pick(words(token / 4), token % 4); }
};

// A word as a number of the standard Gumbel distribution, the larger the smaller the word. In double
// precision, so that implementations whose logarithms differ draw the same token all the same.
__device__ __forceinline__ double gumbel(uint32_t word) {
  const double uniform = (static_cast<double>(word) + 0.5) * 0x1p-32;
  return -log(-log(1.0 - uniform));
}

}  // namespace tgi
