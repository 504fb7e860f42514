// What every ops.cpp needs of torch: the stable ABI's tensor, and checks whose messages name the argument.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>

namespace tgi {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Throws unless the condition holds. The Python wrappers give users the full story; these guard the memory.
template <typename... Args>
inline void check(bool condition, const Args&... message) {
  if (condition) return;
  std::ostringstream text;
  (text << ... << message);
  throw std::runtime_error(text.str());
}

inline void check_dims(const Tensor& tensor, int64_t dims, const char* name) {
  check(tensor.dim() == dims, name, " has ", tensor.dim(), " dimensions; it needs ", dims);
}

inline void check_shape(const Tensor& tensor, std::initializer_list<int64_t> shape, const char* name) {
  check_dims(tensor, static_cast<int64_t>(shape.size()), name);
  int64_t dim = 0;
  for (const int64_t size : shape) {
    check(tensor.size(dim) == size, name, ": dimension ", dim, " is ", tensor.size(dim), "; it needs to be ",
          size);
    ++dim;
  }
}

template <typename T>
constexpr ScalarType scalar_type_of() {
  if constexpr (std::is_same_v<T, float>) return ScalarType::Float;
  if constexpr (std::is_same_v<T, int32_t>) return ScalarType::Int;
  if constexpr (std::is_same_v<T, int64_t>) return ScalarType::Long;
}

template <typename T>
inline void check_cpu(const Tensor& tensor, const char* name) {
  check(tensor.is_cpu(), name, " is not on the CPU");
  check(tensor.scalar_type() == scalar_type_of<T>(), name, " has dtype ",
        static_cast<int>(tensor.scalar_type()), "; it needs to be ", static_cast<int>(scalar_type_of<T>()));
}

// The data of a contiguous CPU tensor.
template <typename T>
inline const T* read(const Tensor& tensor, const char* name) {
  check_cpu<T>(tensor, name);
  check(tensor.is_contiguous(), name, " is not contiguous");
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <typename T>
inline T* write(const Tensor& tensor, const char* name) {
  check_cpu<T>(tensor, name);
  check(tensor.is_contiguous(), name, " is not contiguous");
  return static_cast<T*>(tensor.mutable_data_ptr());
}

template <typename T>
inline const T* read_optional(const std::optional<Tensor>& tensor, const char* name) {
  return tensor.has_value() ? read<T>(*tensor, name) : nullptr;
}

}  // namespace tgi
