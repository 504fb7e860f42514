// Hopper's warpgroup products into fp32, m64nNk16 of 16-bit operands and m64nNk32 of e4m3. PTX ISA 8.7,
// section 9.7.15.
//
// A thread's accumulators: element 4j + e is of row 16·warp + g + 8·(e / 2), column 8j + 2t + e % 2, with g =
// lane / 4 and t = lane % 4. A from registers is four words a step, laid out as for mma.sync.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "common/mma.cuh"

namespace tgi {

// Describes an operand in shared memory whose rows of 128 bytes are swizzled in groups of eight, as the
// tensor copy engine writes them. Along rows of 64 elements the next 64 lie `leading` bytes on (where the
// operand is read across its rows); the next eight rows always 1024.
__device__ __forceinline__ uint64_t swizzled_operand(uint32_t address, uint32_t leading = 16) {
  return (static_cast<uint64_t>(1) << 62) | (static_cast<uint64_t>(1024 >> 4) << 32) |
         (static_cast<uint64_t>(leading >> 4) << 16) | ((address & 0x3ffff) >> 4);
}

// What `bytes` further on add to an operand's description.
constexpr uint64_t operand_step(int bytes) { return static_cast<uint64_t>(bytes >> 4); }

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

// Sixteen accumulators, and their names in the instruction.
#define TGI_D16(d, i)                                                                                   \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]),           \
      "+f"(d[i + 6]), "+f"(d[i + 7]), "+f"(d[i + 8]), "+f"(d[i + 9]), "+f"(d[i + 10]), "+f"(d[i + 11]), \
      "+f"(d[i + 12]), "+f"(d[i + 13]), "+f"(d[i + 14]), "+f"(d[i + 15])
#define TGI_NAMES16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define TGI_NAMES32 \
  TGI_NAMES16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define TGI_NAMES48 \
  TGI_NAMES32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define TGI_NAMES64 \
  TGI_NAMES48 ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define TGI_NAMES80 \
  TGI_NAMES64 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define TGI_NAMES96 \
  TGI_NAMES80 ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define TGI_NAMES112 \
  TGI_NAMES96 ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111"
#define TGI_NAMES128 \
  TGI_NAMES112       \
  ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define TGI_SUMS16(d) TGI_D16(d, 0)
#define TGI_SUMS32(d) TGI_SUMS16(d), TGI_D16(d, 16)
#define TGI_SUMS48(d) TGI_SUMS32(d), TGI_D16(d, 32)
#define TGI_SUMS64(d) TGI_SUMS48(d), TGI_D16(d, 48)
#define TGI_SUMS80(d) TGI_SUMS64(d), TGI_D16(d, 64)
#define TGI_SUMS96(d) TGI_SUMS80(d), TGI_D16(d, 80)
#define TGI_SUMS112(d) TGI_SUMS96(d), TGI_D16(d, 96)
#define TGI_SUMS128(d) TGI_SUMS112(d), TGI_D16(d, 112)

// d = a · b, plus d where `add`. Both in shared memory, rows along k.
#define TGI_PRODUCT_SHARED(TYPE, N, NAMES, A, B, ADD, ...)                                                \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" ADD                                                   \
               ", 0;\n"                                                                                   \
               "wgmma.mma_async.sync.aligned.m64n" N "k16.f32." TYPE "." TYPE " {" NAMES "}, %" A ", %" B \
               ", p, 1, 1, 0, 0;\n}"                                                                      \
               : __VA_ARGS__                                                                              \
               : "l"(a), "l"(b), "r"(static_cast<int>(add)))

#define TGI_PRODUCT_E4M3(N, NAMES, A, B, ADD, ...)                                                \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" ADD                                           \
               ", 0;\n"                                                                           \
               "wgmma.mma_async.sync.aligned.m64n" N "k32.f32.e4m3.e4m3 {" NAMES "}, %" A ", %" B \
               ", p, 1, 1;\n}"                                                                    \
               : __VA_ARGS__                                                                      \
               : "l"(a), "l"(b), "r"(static_cast<int>(add)))

// The product of 64 rows of `a` with N rows of `b`; a thread has N / 2 accumulators.
#define TGI_WARPGROUP_MMA(N, COUNT, A, B, ADD)                                                         \
  template <typename T>                                                                                \
  __device__ __forceinline__ void warpgroup_mma(float (&d)[COUNT], uint64_t a, uint64_t b, bool add) { \
    if constexpr (__is_same(T, __half)) {                                                              \
      TGI_PRODUCT_SHARED("f16", N, TGI_NAMES##COUNT, A, B, ADD, TGI_SUMS##COUNT(d));                   \
    } else if constexpr (__is_same(T, E4M3)) {                                                         \
      TGI_PRODUCT_E4M3(N, TGI_NAMES##COUNT, A, B, ADD, TGI_SUMS##COUNT(d));                            \
    } else {                                                                                           \
      TGI_PRODUCT_SHARED("bf16", N, TGI_NAMES##COUNT, A, B, ADD, TGI_SUMS##COUNT(d));                  \
    }                                                                                                  \
  }

TGI_WARPGROUP_MMA("32", 16, "16", "17", "18")
TGI_WARPGROUP_MMA("64", 32, "32", "33", "34")
TGI_WARPGROUP_MMA("96", 48, "48", "49", "50")
TGI_WARPGROUP_MMA("128", 64, "64", "65", "66")
TGI_WARPGROUP_MMA("160", 80, "80", "81", "82")
TGI_WARPGROUP_MMA("192", 96, "96", "97", "98")
TGI_WARPGROUP_MMA("224", 112, "112", "113", "114")
TGI_WARPGROUP_MMA("256", 128, "128", "129", "130")

// d (+)= a · b, a in registers, b in shared memory, read across its rows.
#define TGI_PRODUCT_REGISTERS(TYPE, N, NAMES, A0, A1, A2, A3, B, ADD, ...)                                   \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" ADD                                                      \
               ", 0;\n"                                                                                      \
               "wgmma.mma_async.sync.aligned.m64n" N "k16.f32." TYPE "." TYPE " {" NAMES "}, {%" A0 ", %" A1 \
               ", %" A2 ", %" A3 "}, %" B ", p, 1, 1, 1;\n}"                                                 \
               : __VA_ARGS__                                                                                 \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)))

#define TGI_WARPGROUP_MMA_ACROSS(N, COUNT, A0, A1, A2, A3, B, ADD)                                    \
  template <typename T>                                                                               \
  __device__ __forceinline__ void warpgroup_mma_across(float (&d)[COUNT], const uint32_t (&a)[4],     \
                                                       uint64_t b, bool add) {                        \
    if constexpr (__is_same(T, __half)) {                                                             \
      TGI_PRODUCT_REGISTERS("f16", N, TGI_NAMES##COUNT, A0, A1, A2, A3, B, ADD, TGI_SUMS##COUNT(d));  \
    } else {                                                                                          \
      TGI_PRODUCT_REGISTERS("bf16", N, TGI_NAMES##COUNT, A0, A1, A2, A3, B, ADD, TGI_SUMS##COUNT(d)); \
    }                                                                                                 \
  }

TGI_WARPGROUP_MMA_ACROSS("64", 32, "32", "33", "34", "35", "36", "37")
TGI_WARPGROUP_MMA_ACROSS("128", 64, "64", "65", "66", "67", "68", "69")

#undef TGI_NAMES16
#undef TGI_SUMS16
#undef TGI_NAMES32
#undef TGI_SUMS32
#undef TGI_NAMES48
#undef TGI_SUMS48
#undef TGI_NAMES64
#undef TGI_SUMS64
#undef TGI_NAMES80
#undef TGI_SUMS80
#undef TGI_NAMES96
#undef TGI_SUMS96
#undef TGI_NAMES112
#undef TGI_SUMS112
#undef TGI_NAMES128
#undef TGI_SUMS128
#undef TGI_D16
#undef TGI_PRODUCT_SHARED
#undef TGI_PRODUCT_E4M3
#undef TGI_PRODUCT_REGISTERS
#undef TGI_WARPGROUP_MMA
#undef TGI_WARPGROUP_MMA_ACROSS

}  // namespace tgi
