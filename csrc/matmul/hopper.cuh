// Hopper's asynchronous parts that the matrix kernels stand on: mbarriers, the bulk tensor copy, wgmma.
// PTX ISA 8.7, sections 9.7.13 (mbarrier), 9.7.9 (bulk tensor copy), 9.7.15 (wgmma).
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "common/copy.cuh"

namespace tgi {

// ---- mbarrier ----

__device__ __forceinline__ void barrier_init(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals));
}

// Makes initialised barriers visible to the copy engine.
__device__ __forceinline__ void barrier_init_done() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void barrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// Arrives, and makes the phase wait for that many bytes more.
__device__ __forceinline__ void barrier_arrive_expecting(uint64_t* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void barrier_wait(uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}\n" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// ---- bulk tensor copy ----

__device__ __forceinline__ void prefetch_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Reads that nobody repeats: they leave L2 first.
__device__ __forceinline__ uint64_t evict_first() {
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

__device__ __forceinline__ uint64_t evict_normally() {
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// Copies the box at (column, row) of a two-dimensional map; what lies outside the tensor arrives as zeros.
__device__ __forceinline__ void copy_box(void* to, const CUtensorMap* map, int column, int row, uint64_t* barrier,
                                         uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(shared_address(to)),
      "l"(map), "r"(column), "r"(row), "r"(shared_address(barrier)), "l"(policy)
      : "memory");
}

// ---- wgmma: D[64, kN] += A[64, 16] · B[kN, 16]ᵀ, both from shared memory, K contiguous ----

// Describes rows of 64 elements (128 bytes) in the 128-byte swizzle; groups of eight rows lie 1024 bytes apart.
__device__ __forceinline__ uint64_t swizzled_operand(const void* first_row) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  constexpr uint64_t kGroupStride = uint64_t{1024 >> 4} << 32;
  return kSwizzle128 | kGroupStride | ((shared_address(first_row) & 0x3ffff) >> 4);
}

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

#define TGI_D4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define TGI_D8(d, i) TGI_D4(d, i), TGI_D4(d, i + 4)
#define TGI_WGMMA(n, type, registers, a, b, p, ...)                                                              \
  asm volatile("{\n.reg .pred keep;\nsetp.ne.b32 keep, " p                                                       \
               ", 0;\nwgmma.mma_async.sync.aligned.m64n" n "k16.f32." type "." type " {" registers "}, " a ", " b \
               ", keep, 1, 1, 0, 0;\n}\n"                                                                        \
               : __VA_ARGS__                                                                                     \
               : "l"(a_desc), "l"(b_desc), "r"(static_cast<int>(keep)))
#define TGI_R8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define TGI_R12 TGI_R8 ", %8, %9, %10, %11"
#define TGI_R16 TGI_R12 ", %12, %13, %14, %15"
#define TGI_R28 TGI_R16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27"

// keep: add to d rather than overwrite it.
#define TGI_WGMMA_OF(T, type)                                                                                     \
  template <int kN>                                                                                               \
  __device__ __forceinline__ void wgmma(float* d, uint64_t a_desc, uint64_t b_desc, bool keep, T) {                \
    static_assert(kN == 16 || kN == 24 || kN == 32 || kN == 56, "wgmma: written out for 16, 24, 32 and 56 columns"); \
    if constexpr (kN == 16) TGI_WGMMA("16", type, TGI_R8, "%8", "%9", "%10", TGI_D8(d, 0));                        \
    if constexpr (kN == 24) TGI_WGMMA("24", type, TGI_R12, "%12", "%13", "%14", TGI_D8(d, 0), TGI_D4(d, 8));       \
    if constexpr (kN == 32) TGI_WGMMA("32", type, TGI_R16, "%16", "%17", "%18", TGI_D8(d, 0), TGI_D8(d, 8));       \
    if constexpr (kN == 56)                                                                                       \
      TGI_WGMMA("56", type, TGI_R28, "%28", "%29", "%30", TGI_D8(d, 0), TGI_D8(d, 8), TGI_D8(d, 16), TGI_D4(d, 24)); \
  }
TGI_WGMMA_OF(__half, "f16")
TGI_WGMMA_OF(__nv_bfloat16, "bf16")
#undef TGI_WGMMA_OF
#undef TGI_WGMMA
#undef TGI_R8
#undef TGI_R12
#undef TGI_R16
#undef TGI_R28
#undef TGI_D8
#undef TGI_D4

}  // namespace tgi
