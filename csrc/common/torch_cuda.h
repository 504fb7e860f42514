// What every ops_cuda.cpp needs of torch: checks that guard the memory, the stream to launch on, and the
// check of a launch.
#pragma once

#include <cuda_runtime_api.h>

#include "common/dtype.h"
#include "common/torch_cpu.h"

// Weak, so that _cuda.so also loads beside a torch that was built without CUDA.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                                                   void** stream);

namespace tgi {

// torch's current stream on the tensor's device.
inline cudaStream_t stream_of(const Tensor& tensor) {
  check(aoti_torch_get_current_cuda_stream != nullptr,
        "this torch was built without CUDA; install a CUDA build of torch");
  void* stream = nullptr;
  const auto failed = aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream);
  check(!failed, "torch gave no current stream for CUDA device ", tensor.get_device_index());
  return static_cast<cudaStream_t>(stream);
}

inline void check_launch(cudaError_t error, const char* op) {
  // Forgotten, if it can be: else whoever launches next and looks would take it for its own.
  if (error != cudaSuccess) cudaGetLastError();
  check(error == cudaSuccess, op, ": ", cudaGetErrorName(error), ": ", cudaGetErrorString(error));
}

// The element type, one of those that kernels are compiled for.
inline DType dtype_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::Half:
      return DType::f16;
    case ScalarType::BFloat16:
      return DType::bf16;
    default:
      break;
  }
  check(false, name, " has dtype ", static_cast<int>(tensor.scalar_type()),
        "; kernels take float32, float16 and bfloat16");
  return DType::f32;
}

inline void check_cuda(const Tensor& tensor, ScalarType dtype, const char* name) {
  check(tensor.is_cuda(), name, " is not on a CUDA device");
  check(tensor.scalar_type() == dtype, name, " has dtype ", static_cast<int>(tensor.scalar_type()),
        "; it needs to be ", static_cast<int>(dtype));
}

// The same device and dtype as `like`, and contiguous in its last dimension.
inline void check_rows(const Tensor& tensor, const Tensor& like, const char* name) {
  check_cuda(tensor, like.scalar_type(), name);
  check(tensor.get_device_index() == like.get_device_index(), name, " is on CUDA device ",
        tensor.get_device_index(), "; the op runs on ", like.get_device_index());
  const int64_t last = tensor.dim() - 1;
  check(tensor.size(last) <= 1 || tensor.stride(last) == 1, name, ": its rows are not contiguous");
}

// An order of the columns of `like`: int32, beside it. What is in it, only the kernel sees.
inline void check_order(const Tensor& order, const Tensor& like, int64_t columns) {
  check_cuda(order, ScalarType::Int, "order");
  check(order.get_device_index() == like.get_device_index(), "order is on CUDA device ",
        order.get_device_index(), "; the op runs on ", like.get_device_index());
  check_shape(order, {columns}, "order");
  check(order.is_contiguous(), "order is not contiguous");
}

inline bool is_aligned(const void* pointer, int64_t stride_bytes = 0) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0 && stride_bytes % 16 == 0;
}

}  // namespace tgi
