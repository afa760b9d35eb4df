#include "ivl/mlp.h"

#include "tensor.h"

namespace ivl {
namespace {

void forward(const Tensor& x, const OptionalTensor& gate, const Tensor& up, const OptionalTensor& up_bias,
             const Tensor& down, const OptionalTensor& down_bias, Tensor& result, OptionalTensor& pre) {
  dispatch_widened(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    mlp<T>({x.size(0), x.size(1), up.size(0), down.size(0), in<T>(x), x.stride(0), in<T>(gate), in<T>(up),
            in<T>(up_bias), in<T>(down), in<T>(down_bias), out<T>(result), out<T>(pre)});
  });
}

void backward(const Tensor& pre, const Tensor& grad, Tensor& active, Tensor& dpre) {
  dispatch_widened(pre.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    gated_backward<T>(in<T>(pre), in<T>(grad), grad.size(0), grad.size(1), out<T>(active), out<T>(dpre));
  });
}

}  // namespace

IVL_OPERATOR(mlp, forward)
IVL_OPERATOR(gated_backward, backward)

}  // namespace ivl
