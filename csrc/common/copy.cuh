// Asynchronous copies from global to shared memory (sm_80 and later), and the swizzle that keeps their tiles
// free of bank conflicts.
#pragma once

#include <cstdint>

#include "common/stress.cuh"

namespace tgi {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// 16 bytes past L1.
__device__ __forceinline__ void copy_async(uint32_t to, const void* from) {
  pause_at_random();
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}

// The same; writes zeros, and reads nothing, where `valid` is false.
__device__ __forceinline__ void copy_async(uint32_t to, const void* from, bool valid) {
  pause_at_random();
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
               "r"(valid ? 16 : 0)
               : "memory");
}

__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until at most kPending of this thread's committed groups are under way.
template <int kPending>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
  pause_at_random();
}

// Byte offset of a 16-byte chunk in a tile of rows of kRowBytes. Eight rows' chunks of one column lie in
// eight different groups of four banks, so neither ldmatrix nor copies of whole rows conflict.
template <int kRowBytes>
__device__ __forceinline__ int swizzled(int row, int chunk) {
  static_assert(kRowBytes % 128 == 0 || kRowBytes == 64);
  if constexpr (kRowBytes == 64) return row * 64 + ((chunk ^ ((row >> 1) & 3)) << 4);
  return row * kRowBytes + ((chunk ^ (row & 7)) << 4);
}

}  // namespace tgi
