// Counter-based noise: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011).
#pragma once

#include "common/vec.h"

namespace tgi::TGI_ISA {

using VecLong [[gnu::vector_size(4 * kLanes)]] = uint64_t;
constexpr int kLongs = kLanes / 2;

// The product of the lower halves.
TGI_INLINE uint64_t low_product(uint64_t a, uint32_t b) { return (a & 0xffffffffu) * b; }
TGI_INLINE VecLong low_product(VecLong a, uint32_t b) {
  const VecLong all_b = VecLong{} + b;
#if defined(TGI_ISA_IS_avx512)
  return reinterpret_cast<VecLong>(
      _mm512_mul_epu32(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(all_b)));
#elif defined(TGI_ISA_IS_avx2)
  return reinterpret_cast<VecLong>(
      _mm256_mul_epu32(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(all_b)));
#elif defined(__x86_64__)
  return reinterpret_cast<VecLong>(
      _mm_mul_epu32(reinterpret_cast<__m128i>(a), reinterpret_cast<__m128i>(all_b)));
#else
  return (a & 0xffffffffu) * all_b;
#endif
}

// Turns a counter of four words into four words of noise. Words are the lower halves of T, one word or a
// vector of them; the upper halves may hold anything before and do so after.
template <typename T>
TGI_INLINE void philox(T (&words)[4], uint64_t key) {
  uint32_t low_key = static_cast<uint32_t>(key), high_key = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const T first = low_product(words[0], 0xd2511f53u), second = low_product(words[2], 0xcd9e8d57u);
    words[0] = (second >> 32) ^ words[1] ^ (T{} + low_key);
    words[1] = second;
    words[2] = (first >> 32) ^ words[3] ^ (T{} + high_key);
    words[3] = first;
    low_key += 0x9e3779b9u;
    high_key += 0xbb67ae85u;
  }
}

// What the noise of one draw depends on, but for the token.
struct Noise {
  uint64_t seed;
  uint64_t position;
  uint64_t choice;
};

// The words of four tokens (of 4 · kLongs, for a vector): token t's is word t % 4 of counter t / 4.
template <typename T>
TGI_INLINE void noise_words(const Noise& noise, T counter, T (&words)[4]) {
  words[0] = counter;
  words[1] = T{} + noise.position;
  words[2] = T{} + noise.choice;
  words[3] = T{};
  philox(words, noise.seed);
}

TGI_INLINE uint32_t noise_word(const Noise& noise, int64_t token) {
  uint64_t words[4];
  noise_words(noise, static_cast<uint64_t>(token) / 4, words);
  return static_cast<uint32_t>(words[token % 4]);
}

// A word as a number of the standard Gumbel distribution, in [-3.1, 22.9]; the smaller the word, the larger
// it is. In double precision, so that implementations whose logarithms differ draw the same token all the
// same.
TGI_INLINE double gumbel(uint32_t word) {
  const double uniform = (static_cast<double>(word) + 0.5) * 0x1p-32;
  return -__builtin_log(-__builtin_log(1.0 - uniform));
}

// A bound on the words that can give a Gumbel number above `least`: no word above it does. −1: none does.
TGI_INLINE int64_t largest_word_above(double least) {
  // gumbel(w) > g needs −log(1 − u) < e^−g, hence u < e^−g or w < 2^(32 − g / ln 2), here rounded up to a
  // power of 2.
  const double exponent = 33.000001 - least * 1.4426950408889634;
  if (!(exponent < 32.0)) return 0xffffffff;
  return exponent < 0.0 ? -1 : (int64_t{1} << static_cast<int>(exponent)) - 1;
}

// Whether any lane of a comparison is true.
TGI_INLINE bool any(VecInt found) {
#if defined(TGI_ISA_IS_avx512)
  const __m512i bits = reinterpret_cast<__m512i>(found);
  return _mm512_test_epi32_mask(bits, bits) != 0;
#elif defined(TGI_ISA_IS_avx2)
  const __m256i bits = reinterpret_cast<__m256i>(found);
  return !_mm256_testz_si256(bits, bits);
#else
  const VecLong bits = reinterpret_cast<VecLong>(found);
  return (bits[0] | bits[1]) != 0;
#endif
}

// Whether any lower half is at most `bound`.
TGI_INLINE bool any_at_most(const VecLong (&words)[4], uint32_t bound) {
  const VecLong upper = VecLong{} + 0xffffffff00000000u;
  VecInt found{};
  for (const VecLong word : words) {
    found |= reinterpret_cast<VecUint>(word | upper) <= VecUint{} + bound;
  }
  return any(found);
}

}  // namespace tgi::TGI_ISA
