// Instruction sets of the CPU kernels, and the one place that chooses among them.
//
// cpu_kernels.cpp is compiled once per set with TGI_ISA naming the namespace, so tgi::baseline, tgi::avx2 and
// tgi::avx512 hold the same kernels. TGI_CPU_KERNEL(name, Params) declares tgi::name(const Params&), which
// calls the active set's. Code in cpu.h must not make the compiler emit functions outside its namespace (an
// inline function of std compiled for AVX-512 may be the copy that the linker keeps for everybody):
// tools/check_isa_symbols.cmake looks.
#pragma once

#include <atomic>

namespace tgi {

enum class CpuIsa : int { baseline = 0, avx2 = 1, avx512 = 2 };

inline CpuIsa best_cpu_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
    return CpuIsa::avx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    return CpuIsa::avx2;
  }
#endif
  return CpuIsa::baseline;
}

// The set in use: the best this CPU has, unless a test asked for another.
inline std::atomic<CpuIsa>& active_cpu_isa() {
  static std::atomic<CpuIsa> isa{best_cpu_isa()};
  return isa;
}

// Whether kernels of the set avx512 may use vpdpbusd. No set of its own: one kernel family has a use for it.
inline bool has_vnni() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  return best_cpu_isa() == CpuIsa::avx512 && __builtin_cpu_supports("avx512vnni");
#else
  return false;
#endif
}

// Whether they do: if they may, unless a test asked for the others.
inline std::atomic<bool>& active_vnni() {
  static std::atomic<bool> active{has_vnni()};
  return active;
}

}  // namespace tgi

#if defined(__x86_64__)
#define TGI_CPU_KERNEL(name, Params)                                                                 \
  namespace baseline {                                                                               \
  void name(const Params&);                                                                          \
  }                                                                                                  \
  namespace avx2 {                                                                                   \
  void name(const Params&);                                                                          \
  }                                                                                                  \
  namespace avx512 {                                                                                 \
  void name(const Params&);                                                                          \
  }                                                                                                  \
  inline void name(const Params& params) {                                                           \
    static constexpr void (*kKernels[])(const Params&) = {baseline::name, avx2::name, avx512::name}; \
    kKernels[static_cast<int>(active_cpu_isa().load(std::memory_order_relaxed))](params);            \
  }
#else
#define TGI_CPU_KERNEL(name, Params) \
  namespace baseline {               \
  void name(const Params&);          \
  }                                  \
  inline void name(const Params& params) { baseline::name(params); }
#endif
