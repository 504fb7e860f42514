// Hopper's warpgroup products, m64nNk16 of 16-bit operands into fp32. PTX ISA 8.7, section 9.7.15.
//
// A thread's accumulators: element 4j + e is of row 16·warp + g + 8·(e / 2), column 8j + 2t + e % 2, with g =
// lane / 4 and t = lane % 4. A from registers is four words a step, laid out as for mma.sync.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace tgi {

// Describes an operand in shared memory whose rows of 128 bytes are swizzled in groups of eight, as the
// tensor copy engine writes them. Along rows of 64 elements the next 64 lie `leading` bytes on (where the
// operand is read across its rows); the next eight rows always 1024.
__device__ __forceinline__ uint64_t swizzled_operand(uint32_t address, uint32_t leading = 16) {
  return (static_cast<uint64_t>(1) << 62) | (static_cast<uint64_t>(1024 >> 4) << 32) |
         (static_cast<uint64_t>(leading >> 4) << 16) | ((address & 0x3ffff) >> 4);
}

// Orders this warpgroup's register and shared memory accesses before its next products.
__device__ __forceinline__ void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void products_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Until at most kPending committed groups are under way.
template <int kPending>
__device__ __forceinline__ void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler from moving accumulators across a wait.
template <int kCount>
__device__ __forceinline__ void products_hold(float (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

#define TGI_D8(d, i)                                                                          \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define TGI_D32(d, i) TGI_D8(d, i), TGI_D8(d, i + 8), TGI_D8(d, i + 16), TGI_D8(d, i + 24)
#define TGI_NAMES32                                                                                      \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, " \
  "%22, "                                                                                                \
  "%23, %24, %25, %26, %27, %28, %29, %30, %31"
#define TGI_NAMES64                                                                                        \
  TGI_NAMES32                                                                                              \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, " \
  "%52, "                                                                                                  \
  "%53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

// d = a · b, plus d where `add`. Both in shared memory, rows along k.
#define TGI_PRODUCT_SHARED(TYPE, N, NAMES, A, B, ADD, ...)                                                \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" ADD                                                   \
               ", 0;\n"                                                                                   \
               "wgmma.mma_async.sync.aligned.m64n" N "k16.f32." TYPE "." TYPE " {" NAMES "}, %" A ", %" B \
               ", p, 1, 1, 0, 0;\n}"                                                                      \
               : __VA_ARGS__                                                                              \
               : "l"(a), "l"(b), "r"(static_cast<int>(add)))

// The same, a in registers, b in shared memory, read across its rows.
#define TGI_PRODUCT_REGISTERS(TYPE, N, NAMES, A0, A1, A2, A3, B, ADD, ...)                                   \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" ADD                                                      \
               ", 0;\n"                                                                                      \
               "wgmma.mma_async.sync.aligned.m64n" N "k16.f32." TYPE "." TYPE " {" NAMES "}, {%" A0 ", %" A1 \
               ", %" A2 ", %" A3 "}, %" B ", p, 1, 1, 1;\n}"                                                 \
               : __VA_ARGS__                                                                                 \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)))

template <typename T>
__device__ __forceinline__ void warpgroup_mma(float (&d)[64], uint64_t a, uint64_t b, bool add) {
  if constexpr (__is_same(T, __half)) {
    TGI_PRODUCT_SHARED("f16", "128", TGI_NAMES64, "64", "65", "66", TGI_D32(d, 0), TGI_D32(d, 32));
  } else {
    TGI_PRODUCT_SHARED("bf16", "128", TGI_NAMES64, "64", "65", "66", TGI_D32(d, 0), TGI_D32(d, 32));
  }
}

template <typename T>
__device__ __forceinline__ void warpgroup_mma_across(float (&d)[64], const uint32_t (&a)[4], uint64_t b,
                                                     bool add) {
  if constexpr (__is_same(T, __half)) {
    TGI_PRODUCT_REGISTERS("f16", "128", TGI_NAMES64, "64", "65", "66", "67", "68", "69", TGI_D32(d, 0),
                          TGI_D32(d, 32));
  } else {
    TGI_PRODUCT_REGISTERS("bf16", "128", TGI_NAMES64, "64", "65", "66", "67", "68", "69", TGI_D32(d, 0),
                          TGI_D32(d, 32));
  }
}

template <typename T>
__device__ __forceinline__ void warpgroup_mma_across(float (&d)[32], const uint32_t (&a)[4], uint64_t b,
                                                     bool add) {
  if constexpr (__is_same(T, __half)) {
    TGI_PRODUCT_REGISTERS("f16", "64", TGI_NAMES32, "32", "33", "34", "35", "36", "37", TGI_D32(d, 0));
  } else {
    TGI_PRODUCT_REGISTERS("bf16", "64", TGI_NAMES32, "32", "33", "34", "35", "36", "37", TGI_D32(d, 0));
  }
}

#undef TGI_D8
#undef TGI_D32
#undef TGI_NAMES32
#undef TGI_NAMES64
#undef TGI_PRODUCT_SHARED
#undef TGI_PRODUCT_REGISTERS

}  // namespace tgi
