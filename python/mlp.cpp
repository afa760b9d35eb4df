#include "ivl/mlp.h"

#include <optional>

#include "tensor.h"

namespace ivl {
namespace {

using Optional = std::optional<Tensor>;

template <class T>
const T* in(const Optional& t) {
  return t ? ivl::in<T>(*t) : nullptr;
}

void forward(Tensor x, Optional gate, Tensor up, Optional up_bias, Tensor down, Optional down_bias, Tensor result,
             Optional pre) {
  dispatch_widened(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    mlp<T>({x.size(0), x.size(1), up.size(0), down.size(0), ivl::in<T>(x), x.stride(0), in<T>(gate), ivl::in<T>(up),
            in<T>(up_bias), ivl::in<T>(down), in<T>(down_bias), out<T>(result), pre ? out<T>(*pre) : nullptr});
  });
}

void backward(Tensor pre, Tensor grad, Tensor active, Tensor dpre) {
  dispatch_widened(pre.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    gated_backward<T>(ivl::in<T>(pre), ivl::in<T>(grad), grad.size(0), grad.size(1), out<T>(active), out<T>(dpre));
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ivl_native, m) {
  m.def(
      "mlp(Tensor x, Tensor? gate, Tensor up, Tensor? up_bias, Tensor down, Tensor? down_bias, Tensor(a!) out, "
      "Tensor(b!)? pre) -> ()");
  m.def("gated_backward(Tensor pre, Tensor grad, Tensor(a!) active, Tensor(b!) dpre) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(ivl_native, CPU, m) {
  m.impl("mlp", TORCH_BOX(&forward));
  m.impl("gated_backward", TORCH_BOX(&backward));
}

}  // namespace ivl
