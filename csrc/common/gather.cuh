// Columns of a row that is staged in shared memory, in another order, a vector of them at a time.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/vec.cuh"

namespace tgi {

// Where the elements of one vector stand in a row of at most 65535; the row's end stands for all outside it.
template <typename T>
using Places = Vec<uint16_t, kVec<T>>;

// Elements that a row takes in shared memory: behind its end stands what indices out of range get.
template <typename T>
inline constexpr int kBehind = kVec<T>;

// order: on 16 bytes, constant for the whole kernel.
template <typename T>
__device__ __forceinline__ Places<T> places_of(const int32_t* order, int length) {
  const auto place = [=](int index) {
    return min(static_cast<uint32_t>(index), static_cast<uint32_t>(length));
  };
  Places<T> places;
#pragma unroll
  for (int i = 0; i < places.kWords / 2; ++i) {
    const int4 four = __ldg(reinterpret_cast<const int4*>(order) + i);
    places.word[2 * i] = place(four.x) | place(four.y) << 16;
    places.word[2 * i + 1] = place(four.z) | place(four.w) << 16;
  }
  return places;
}

// Bits of a NaN, as of every number whose bits are all set.
template <typename T>
__device__ __forceinline__ void end_row(T* row, int length) {
  using Bits = std::conditional_t<sizeof(T) == 2, uint16_t, uint32_t>;
  reinterpret_cast<Bits*>(row)[length] = static_cast<Bits>(~0u);
}

// row: in shared memory, ended.
template <typename T>
__device__ __forceinline__ Vec<T> gathered(const T* row, const Places<T>& places) {
  const auto place = [&](int i) { return i % 2 ? places.word[i / 2] >> 16 : places.word[i / 2] & 0xffffu; };
  Vec<T> vec;
#pragma unroll
  for (int w = 0; w < vec.kWords; ++w) {
    if constexpr (sizeof(T) == 2) {
      const auto* bits = reinterpret_cast<const uint16_t*>(row);
      vec.word[w] = bits[place(2 * w)] | static_cast<uint32_t>(bits[place(2 * w + 1)]) << 16;
    } else {
      vec.word[w] = reinterpret_cast<const uint32_t*>(row)[place(w)];
    }
  }
  return vec;
}

}  // namespace tgi
