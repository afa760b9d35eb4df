#include "ivl/norm.h"

#include "tensor.h"

namespace ivl {
namespace {

// Of a tensor of any shape that is contiguous, or of rows [R, C].
// The strides of a contiguous tensor say nothing where a size is 1.
NormRows rows(const Tensor& t) { return {t.const_data_ptr(), t.dim() == 2 ? t.stride(0) : t.size(t.dim() - 1)}; }
NormRows rows(const OptionalTensor& t) { return t ? rows(*t) : NormRows{}; }

NormVector vector(const Tensor& t) { return {t.const_data_ptr(), t.scalar_type() == ScalarType::Float}; }
NormVector vector(const OptionalTensor& t) { return t ? vector(*t) : NormVector{}; }

void forward(const Tensor& x, const OptionalTensor& residual, const OptionalTensor& layer_scale, const Tensor& weight,
             const OptionalTensor& bias, double eps, bool center, bool round, Tensor& y, Tensor& sum) {
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
  dispatch_widened(x.scalar_type(), [&](auto zero) { norm<decltype(zero)>(args); });
}

void backward(const Tensor& grad, const OptionalTensor& grad_sum, const Tensor& sum, const OptionalTensor& x,
              const OptionalTensor& layer_scale, const Tensor& weight, double eps, bool center, Tensor& ds, Tensor& dx,
              Tensor& dscale, Tensor& dweight, Tensor& dbias) {
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
  dispatch_widened(sum.scalar_type(), [&](auto zero) { norm_backward<decltype(zero)>(args); });
}

IVL_OPERATOR(norm, forward)
IVL_OPERATOR(norm_backward, backward)

}  // namespace
}  // namespace ivl
