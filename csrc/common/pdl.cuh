// Programmatic dependent launch: a kernel starts while the one before it drains.
//
// The rule of every kernel here: all threads call wait_for_previous() before they read what an earlier kernel
// of the stream wrote, before they write anything, and before they exit. As each kernel waits for its
// predecessor to be complete, what is visible after the wait is everything earlier in the stream. Before it,
// only what is older than the step (weights) may be read.
#pragma once

#include <cuda_runtime.h>

#include "common/stress.cuh"

namespace tgi {

__device__ __forceinline__ void wait_for_previous() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  pause_at_random();
  asm volatile("griddepcontrol.wait;" ::: "memory");
  pause_at_random();
#endif
}

// Lets the next kernel's CTAs take what room this one leaves; they still wait for this grid's end.
__device__ __forceinline__ void let_next_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  pause_at_random();
#endif
}

// Launches clusters of `cluster` neighbours along x, with the programmatic edge to the kernel before. Both
// attributes are unknown before sm_90, where the edge would be an ordinary one and clusters are of one CTA.
template <typename... Params, typename... Args>
cudaError_t launch_clusters(void (*kernel)(Params...), dim3 grid, int cluster, int threads, int shared_bytes,
                            cudaStream_t stream, Args&&... args) {
  int device = 0, major = 0;
  if (const cudaError_t error = cudaGetDevice(&device)) return error;
  if (const cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device))
    return error;
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = major < 9 ? 0 : cluster == 1 ? 1 : 2;
  return cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...);
}

// The same for CTAs that know nothing of each other.
template <typename... Params, typename... Args>
cudaError_t launch(void (*kernel)(Params...), dim3 grid, int threads, int shared_bytes, cudaStream_t stream,
                   Args&&... args) {
  return launch_clusters(kernel, grid, 1, threads, shared_bytes, stream, static_cast<Args&&>(args)...);
}

}  // namespace tgi
