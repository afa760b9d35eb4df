#include "ivl/norm.h"

#include <optional>
#include <type_traits>

#include "tensor.h"

namespace ivl {
namespace {

using Optional = std::optional<Tensor>;

// Of a tensor of any shape that is contiguous, or of rows [R, C].
NormRows rows(const Tensor& t) { return {t.const_data_ptr(), t.dim() > 1 ? t.stride(t.dim() - 2) : t.numel()}; }
NormRows rows(const Optional& t) { return t ? rows(*t) : NormRows{}; }

NormVector vector(const Tensor& t) { return {t.const_data_ptr(), t.scalar_type() == ScalarType::Float}; }
NormVector vector(const Optional& t) { return t ? vector(*t) : NormVector{}; }

// Where a result goes; null when the caller does not want it and gave an empty tensor.
template <class T>
T* wanted(const Tensor& t) {
  return t.numel() ? static_cast<T*>(t.mutable_data_ptr()) : nullptr;
}

template <class F>
void dispatch(ScalarType type, F&& f) {
  dispatch_float(type, [&](auto zero) {
    if constexpr (std::is_same_v<decltype(zero), double>) {
      STD_TORCH_CHECK(false, "expected float32, bfloat16 or float16");
    } else {
      f(zero);
    }
  });
}

void forward(Tensor x, Optional residual, Optional layer_scale, Tensor weight, Optional bias, double eps, bool center,
             bool round, Tensor y, Tensor sum) {
  NormArgs args = {};
  args.width = x.size(x.dim() - 1);
  args.rows = x.numel() / args.width;
  args.x = rows(x);
  args.residual = rows(residual);
  args.layer_scale = vector(layer_scale);
  args.weight = vector(weight);
  args.bias = vector(bias);
  args.eps = eps;
  args.center = center;
  args.round = round;
  args.y = wanted<void>(y);
  args.sum = wanted<void>(sum);
  dispatch(x.scalar_type(), [&](auto zero) { norm<decltype(zero)>(args); });
}

void backward(Tensor grad, Optional grad_sum, Tensor sum, Optional x, Optional layer_scale, Tensor weight, double eps,
              bool center, Tensor ds, Tensor dx, Tensor dscale, Tensor dweight, Tensor dbias) {
  NormBackwardArgs args = {};
  args.width = sum.size(sum.dim() - 1);
  args.rows = sum.numel() / args.width;
  args.grad = rows(grad);
  args.grad_sum = rows(grad_sum);
  args.sum = rows(sum);
  args.x = rows(x);
  args.layer_scale = vector(layer_scale);
  args.weight = vector(weight);
  args.eps = eps;
  args.center = center;
  args.ds = wanted<void>(ds);
  args.dx = wanted<void>(dx);
  args.dscale = wanted<float>(dscale);
  args.dweight = wanted<float>(dweight);
  args.dbias = wanted<float>(dbias);
  dispatch(sum.scalar_type(), [&](auto zero) { norm_backward<decltype(zero)>(args); });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ivl_native, m) {
  m.def(
      "norm(Tensor x, Tensor? residual, Tensor? layer_scale, Tensor weight, Tensor? bias, float eps, bool center, "
      "bool round, Tensor(a!) y, Tensor(b!) sum) -> ()");
  m.def(
      "norm_backward(Tensor grad, Tensor? grad_sum, Tensor sum, Tensor? x, Tensor? layer_scale, Tensor weight, float "
      "eps, "
      "bool center, Tensor(a!) ds, Tensor(b!) dx, Tensor(c!) dscale, Tensor(d!) dweight, Tensor(e!) dbias) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(ivl_native, CPU, m) {
  m.impl("norm", TORCH_BOX(&forward));
  m.impl("norm_backward", TORCH_BOX(&backward));
}

}  // namespace ivl
