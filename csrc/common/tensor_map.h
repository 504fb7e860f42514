// Tensor maps for Hopper's copy engine, encoded by the driver.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

namespace tgi {

// The driver's encoder, found at run time so that nothing links against libcuda; nullptr where the driver has
// none.
inline decltype(&cuTensorMapEncodeTiled) tensor_map_encoder() {
  static const auto encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found{};
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                                               cudaEnableDefault, &found);
    const bool usable = error == cudaSuccess && found == cudaDriverEntryPointSuccess;
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(usable ? function : nullptr);
  }();
  return encode;
}

// A map of three dimensions of 16-bit elements, innermost first, whose boxes arrive in rows of 128 swizzled
// bytes. `strides` are in bytes, of the outer two dimensions. What lies outside the tensor arrives as zeros.
inline bool encode_swizzled_map(CUtensorMap* map, bool f16, const void* data, const cuuint64_t (&sizes)[3],
                                const cuuint64_t (&strides)[2], const cuuint32_t (&box)[3]) {
  const cuuint32_t steps[3] = {1, 1, 1};
  const auto encode = tensor_map_encoder();
  return encode != nullptr &&
         encode(map, f16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3,
                const_cast<void*>(data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

// A map of three dimensions of 32-bit numbers whose boxes arrive as they lie. Strides and inner sizes of
// boxes are whole 16 bytes.
inline bool encode_float_map(CUtensorMap* map, const void* data, const cuuint64_t (&sizes)[3],
                             const cuuint64_t (&strides)[2], const cuuint32_t (&box)[3]) {
  const cuuint32_t steps[3] = {1, 1, 1};
  const auto encode = tensor_map_encoder();
  return encode != nullptr &&
         encode(map, CU_TENSOR_MAP_DATA_TYPE_FLOAT32, 3, const_cast<void*>(data), sizes, strides, box, steps,
                CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_L2_PROMOTION_NONE,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

}  // namespace tgi
