// Hopper's warpgroup products with a register operand: 64 rows of weights times 8 … 256 tokens whose rows lie
// along k in shared memory. PTX ISA 8.7, section 9.7.15.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace tgi {

#define TGI_D4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define TGI_D8(d, i) TGI_D4(d, i), TGI_D4(d, i + 4)
#define TGI_D16(d, i) TGI_D8(d, i), TGI_D8(d, i + 8)
#define TGI_D32(d, i) TGI_D16(d, i), TGI_D16(d, i + 16)
#define TGI_D64(d, i) TGI_D32(d, i), TGI_D32(d, i + 32)
#define TGI_D128(d, i) TGI_D64(d, i), TGI_D64(d, i + 64)
#define TGI_N4 "%0, %1, %2, %3"
#define TGI_N8 TGI_N4 ", %4, %5, %6, %7"
#define TGI_N16 TGI_N8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define TGI_N32 TGI_N16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define TGI_N64                                                                                       \
  TGI_N32                                                                                             \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, " \
  "%51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define TGI_N128                                                                                           \
  TGI_N64                                                                                                  \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, "      \
  "%83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, "      \
  "%102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, " \
  "%119, %120, %121, %122, %123, %124, %125, %126, %127"

#define TGI_PRODUCT(TYPE, N, NAMES, A0, A1, A2, A3, B, ...)                                                  \
  asm volatile("wgmma.mma_async.sync.aligned.m64n" N "k16.f32." TYPE "." TYPE " {" NAMES "}, {%" A0 ", %" A1 \
               ", %" A2 ", %" A3 "}, %" B ", 1, 1, 1, 0;"                                                    \
               : __VA_ARGS__                                                                                 \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))

// d += a · b for kTokens = 2 · kCount tokens; the layouts are those of wgmma.cuh.
#define TGI_PRODUCT_OF(COUNT, N, A0, A1, A2, A3, B)                                                      \
  template <typename T>                                                                                  \
  __device__ __forceinline__ void weights_times(float (&d)[COUNT], const uint32_t (&a)[4], uint64_t b) { \
    if constexpr (__is_same(T, __half)) {                                                                \
      TGI_PRODUCT("f16", N, TGI_N##COUNT, A0, A1, A2, A3, B, TGI_D##COUNT(d, 0));                        \
    } else {                                                                                             \
      TGI_PRODUCT("bf16", N, TGI_N##COUNT, A0, A1, A2, A3, B, TGI_D##COUNT(d, 0));                       \
    }                                                                                                    \
  }

TGI_PRODUCT_OF(4, "8", "4", "5", "6", "7", "8")
TGI_PRODUCT_OF(8, "16", "8", "9", "10", "11", "12")
TGI_PRODUCT_OF(16, "32", "16", "17", "18", "19", "20")
TGI_PRODUCT_OF(32, "64", "32", "33", "34", "35", "36")
TGI_PRODUCT_OF(64, "128", "64", "65", "66", "67", "68")
TGI_PRODUCT_OF(128, "256", "128", "129", "130", "131", "132")

#undef TGI_D4
#undef TGI_D8
#undef TGI_D16
#undef TGI_D32
#undef TGI_D64
#undef TGI_D128
#undef TGI_N4
#undef TGI_N8
#undef TGI_N16
#undef TGI_N32
#undef TGI_N64
#undef TGI_N128
#undef TGI_PRODUCT
#undef TGI_PRODUCT_OF

}  // namespace tgi
