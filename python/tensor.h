// Helpers over torch's stable ABI, shared by the operator registrations of this folder.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>

#include "ivl/types.h"

namespace ivl {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class T>
const T* in(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

template <class T>
T* out(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

inline int64_t itemsize(const Tensor& t) { return t.element_size(); }

// Calls f with a value of the tensor's element type: float, double, ivl::bfloat16 or ivl::float16.
template <class F>
auto dispatch_float(ScalarType type, F&& f) {
  switch (type) {
    case ScalarType::Float: return f(float{});
    case ScalarType::Double: return f(double{});
    case ScalarType::BFloat16: return f(bfloat16{});
    case ScalarType::Half: return f(float16{});
    default: STD_TORCH_CHECK(false, "expected float32, float64, bfloat16 or float16");
  }
}

// The same without double, for kernels that compute in float32.
template <class F>
auto dispatch_widened(ScalarType type, F&& f) {
  switch (type) {
    case ScalarType::Float: return f(float{});
    case ScalarType::BFloat16: return f(bfloat16{});
    case ScalarType::Half: return f(float16{});
    default: STD_TORCH_CHECK(false, "expected float32, bfloat16 or float16");
  }
}

}  // namespace ivl
