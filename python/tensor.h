// Helpers over torch's stable ABI, shared by the operator registrations of this folder.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>
#include <string>
#include <type_traits>
#include <vector>

#include "ivl/types.h"

namespace ivl {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Tensors = std::vector<Tensor>;

template <class T>
inline constexpr std::optional<ScalarType> kScalarType = std::nullopt;
template <> inline constexpr std::optional<ScalarType> kScalarType<float> = ScalarType::Float;
template <> inline constexpr std::optional<ScalarType> kScalarType<double> = ScalarType::Double;
template <> inline constexpr std::optional<ScalarType> kScalarType<bfloat16> = ScalarType::BFloat16;
template <> inline constexpr std::optional<ScalarType> kScalarType<float16> = ScalarType::Half;
template <> inline constexpr std::optional<ScalarType> kScalarType<int32_t> = ScalarType::Int;
template <> inline constexpr std::optional<ScalarType> kScalarType<int64_t> = ScalarType::Long;

// A kernel that reads or writes another type than the tensor's would leave its memory. Bytes are anything's.
template <class T>
void check_type(const Tensor& t) {
  const ScalarType type = t.scalar_type();
  STD_TORCH_CHECK(type == kScalarType<T>.value_or(type) || t.numel() == 0,
                  "got a tensor of another dtype than the kernel's");
}

template <class T>
const T* in(const Tensor& t) {
  check_type<T>(t);
  return static_cast<const T*>(t.const_data_ptr());
}

template <class T>
T* out(const Tensor& t) {
  check_type<T>(t);
  return static_cast<T*>(t.mutable_data_ptr());
}

// The same of a tensor that may be missing: null.
template <class T>
const T* in(const OptionalTensor& t) {
  return t ? in<T>(*t) : nullptr;
}

template <class T>
T* out(const OptionalTensor& t) {
  return t ? out<T>(*t) : nullptr;
}

// Where a result goes; null when the caller does not want it and gave an empty tensor.
template <class T>
T* wanted(const Tensor& t) {
  return t.numel() ? out<T>(t) : nullptr;
}

inline int64_t itemsize(const Tensor& t) { return t.element_size(); }

#define IVL_CASE(T) \
  case *kScalarType<T>: return f(T{});

// Calls f with a value of the tensor's element type.
template <class F>
auto dispatch_float(ScalarType type, F&& f) {
  switch (type) {
    IVL_FLOAT_TYPES(IVL_CASE)
    default: STD_TORCH_CHECK(false, "expected float32, float64, bfloat16 or float16");
  }
}

// The same without double, for kernels that compute in float32.
template <class F>
auto dispatch_widened(ScalarType type, F&& f) {
  switch (type) {
    IVL_WIDENED_TYPES(IVL_CASE)
    default: STD_TORCH_CHECK(false, "expected float32, bfloat16 or float16");
  }
}

// The schema of an operator is the type of its function. What it writes to is a parameter `Tensor&`, `OptionalTensor&`
// or `Tensors&`; what it reads comes by value or const reference.
template <class T>
std::string schema_type(char alias) {
  using Value = std::remove_cv_t<std::remove_reference_t<T>>;
  const bool written = std::is_lvalue_reference_v<T> && !std::is_const_v<std::remove_reference_t<T>>;
  const std::string tensor = written ? std::string("Tensor(") + alias + "!)" : "Tensor";
  if constexpr (std::is_same_v<Value, Tensor>) return tensor;
  else if constexpr (std::is_same_v<Value, OptionalTensor>) return tensor + "?";
  else if constexpr (std::is_same_v<Value, Tensors>) return tensor + "[]";
  else if constexpr (std::is_same_v<Value, bool>) return "bool";
  else if constexpr (std::is_same_v<Value, int64_t>) return "int";
  else {
    static_assert(std::is_same_v<Value, double>, "no schema has this type");
    return "float";
  }
}

template <class Result, class... Arguments>
std::string schema(const char* name, Result (*)(Arguments...)) {
  std::string list;
  char alias = 'a';
  ((list += (list.empty() ? "" : ", ") + schema_type<Arguments>(alias) + " " + alias, ++alias), ...);
  std::string result = "()";
  if constexpr (!std::is_void_v<Result>) result = schema_type<Result>(alias);
  return std::string(name) + "(" + list + ") -> " + result;
}

// `torch.ops.ivl_cpu.<name>`, which calls `function` on CPU tensors.
#define IVL_OPERATOR(name, function)                                                                       \
  STABLE_TORCH_LIBRARY_FRAGMENT(ivl_cpu, m) { m.def(ivl::schema(#name, &function).c_str()); }            \
  STABLE_TORCH_LIBRARY_IMPL(ivl_cpu, CPU, m) { m.impl(#name, TORCH_BOX(&function)); }

}  // namespace ivl
