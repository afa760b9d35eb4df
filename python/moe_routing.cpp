#include "ivl/moe_routing.h"

#include <optional>

#include "tensor.h"

namespace ivl {
namespace {

RoutingOptions options_of(const Tensor& logits, const Tensor& ids, bool softmax_first, bool renormalize) {
  return {logits.size(0), logits.size(1), ids.size(1), softmax_first, renormalize};
}

template <class F>
void dispatch_routing(const Tensor& logits, F&& f) {
  dispatch_float(logits.scalar_type(), [&](auto zero) {
    if constexpr (!std::is_same_v<decltype(zero), double>) f(zero);
  });
}

void forward(Tensor logits, std::optional<Tensor> bias, bool softmax_first, bool renormalize, Tensor ids,
             Tensor weights) {
  dispatch_routing(logits, [&](auto zero) {
    using T = decltype(zero);
    route(options_of(logits, ids, softmax_first, renormalize), in<T>(logits), bias ? in<T>(*bias) : nullptr,
          out<int64_t>(ids), out<T>(weights));
  });
}

void backward(Tensor grad, Tensor logits, std::optional<Tensor> bias, Tensor ids, bool softmax_first, bool renormalize,
              Tensor result) {
  dispatch_routing(logits, [&](auto zero) {
    using T = decltype(zero);
    route_backward(options_of(logits, ids, softmax_first, renormalize), in<T>(grad), in<T>(logits),
                   bias ? in<T>(*bias) : nullptr, in<int64_t>(ids), out<T>(result));
  });
}

void dispatch(Tensor ids, int64_t tile, Tensor permutation, Tensor inverse, Tensor counts, Tensor offsets,
              Tensor tiles) {
  const int64_t experts = counts.size(0);
  sort_by_expert(in<int64_t>(ids), permutation.size(0), experts, out<int32_t>(permutation), out<int32_t>(inverse),
                 out<int32_t>(counts), out<int32_t>(offsets));
  if (tile > 0) list_tiles(in<int32_t>(offsets), experts, tile, tiles.size(0), out<int32_t>(tiles));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ivl_native, m) {
  m.def(
      "moe_routing(Tensor logits, Tensor? bias, bool softmax_first, bool renormalize, Tensor(a!) ids, "
      "Tensor(b!) weights) -> ()");
  m.def(
      "moe_routing_backward(Tensor grad, Tensor logits, Tensor? bias, Tensor ids, bool softmax_first, bool "
      "renormalize, "
      "Tensor(a!) result) -> ()");
  m.def(
      "moe_dispatch(Tensor ids, int tile, Tensor(a!) permutation, Tensor(b!) inverse, Tensor(c!) counts, "
      "Tensor(d!) offsets, Tensor(e!) tiles) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(ivl_native, CPU, m) {
  m.impl("moe_routing", TORCH_BOX(&forward));
  m.impl("moe_routing_backward", TORCH_BOX(&backward));
  m.impl("moe_dispatch", TORCH_BOX(&dispatch));
}

}  // namespace ivl
