// Element types of tensors, as launchers receive them. Plain C++: included by .cu and ops_cuda.cpp alike.
#pragma once

namespace tgi {

enum class DType : int { f32, f16, bf16 };

constexpr int bytes_of(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

}  // namespace tgi
