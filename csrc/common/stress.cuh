// Pauses of random length beside whatever orders accesses to memory: copies, barriers, the edges between
// kernels. In a build with TGI_STRESS what is right only at the usual pace then gives wrong numbers or hangs,
// which the sanitizers cannot see of asynchronous copies and dependent launches. Nothing in other builds.
#pragma once

#include <cstdint>

namespace tgi {

#ifdef TGI_STRESS
// One time in eight, for up to two microseconds; the same for all lanes that are here together, so that what
// follows finds a warp as whole as it was.
__device__ __forceinline__ void pause_at_random() {
  uint32_t clock, sm, warp;
  asm volatile("mov.u32 %0, %%clock;\nmov.u32 %1, %%smid;\nmov.u32 %2, %%warpid;"
               : "=r"(clock), "=r"(sm), "=r"(warp));
  uint32_t random = (clock + 0x9e3779b9u * (64 * sm + warp + 1)) * 0x85ebca6bu;
  random ^= random >> 15;
  random *= 0xc2b2ae35u;
  random ^= random >> 13;
  if (random % 8 == 0) asm volatile("nanosleep.u32 %0;" ::"r"(random >> 21) : "memory");
}
#else
__device__ __forceinline__ void pause_at_random() {}
#endif

}  // namespace tgi
