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
#define TGI_N4 "%0, %1, %2, %3"
#define TGI_N8 TGI_N4 ", %4, %5, %6, %7"
#define TGI_N16 TGI_N8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define TGI_N32 TGI_N16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define TGI_N64                                                                                       \
  TGI_N32                                                                                             \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, " \
  "%51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define TGI_PRODUCT(TYPE, N, NAMES, A0, A1, A2, A3, B, ADD, ...)                                             \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" ADD                                                      \
               ", 0;\n"                                                                                      \
               "wgmma.mma_async.sync.aligned.m64n" N "k16.f32." TYPE "." TYPE " {" NAMES "}, {%" A0 ", %" A1 \
               ", %" A2 ", %" A3 "}, %" B ", p, 1, 1, 0;\n}"                                                 \
               : __VA_ARGS__                                                                                 \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)))

// d = a · b, plus d where `add`, for 2 · COUNT tokens; the layouts are those of wgmma.cuh.
#define TGI_PRODUCT_OF(COUNT, N, A0, A1, A2, A3, B, ADD)                                               \
  template <typename T>                                                                                \
  __device__ __forceinline__ void weights_times(float (&d)[COUNT], const uint32_t (&a)[4], uint64_t b, \
                                                bool add) {                                            \
    if constexpr (__is_same(T, __half)) {                                                              \
      TGI_PRODUCT("f16", N, TGI_N##COUNT, A0, A1, A2, A3, B, ADD, TGI_D##COUNT(d, 0));                 \
    } else {                                                                                           \
      TGI_PRODUCT("bf16", N, TGI_N##COUNT, A0, A1, A2, A3, B, ADD, TGI_D##COUNT(d, 0));                \
    }                                                                                                  \
  }

TGI_PRODUCT_OF(16, "32", "16", "17", "18", "19", "20", "21")
TGI_PRODUCT_OF(32, "64", "32", "33", "34", "35", "36", "37")
TGI_PRODUCT_OF(64, "128", "64", "65", "66", "67", "68", "69")

#undef TGI_D4
#undef TGI_D8
#undef TGI_D16
#undef TGI_D32
#undef TGI_D64
#undef TGI_N4
#undef TGI_N8
#undef TGI_N16
#undef TGI_N32
#undef TGI_N64
#undef TGI_PRODUCT
#undef TGI_PRODUCT_OF

}  // namespace tgi
