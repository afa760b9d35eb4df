#include "ivl/moe_routing.h"

#include "tensor.h"

namespace ivl {
namespace {

RoutingOptions options_of(const Tensor& logits, const Tensor& ids, bool softmax_first, bool renormalize) {
  return {logits.size(0), logits.size(1), ids.size(1), softmax_first, renormalize};
}

void forward(const Tensor& logits, const OptionalTensor& bias, bool softmax_first, bool renormalize, Tensor& ids,
             Tensor& weights) {
  dispatch_widened(logits.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    route(options_of(logits, ids, softmax_first, renormalize), in<T>(logits), in<T>(bias),
          out<int64_t>(ids), out<T>(weights));
  });
}

void backward(const Tensor& grad, const Tensor& logits, const OptionalTensor& bias, const Tensor& ids,
              bool softmax_first, bool renormalize, Tensor& result) {
  dispatch_widened(logits.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    route_backward(options_of(logits, ids, softmax_first, renormalize), in<T>(grad), in<T>(logits),
                   in<T>(bias), in<int64_t>(ids), out<T>(result));
  });
}

void dispatch(const Tensor& ids, int64_t tile, Tensor& permutation, Tensor& inverse, Tensor& counts, Tensor& offsets,
              Tensor& tiles) {
  const int64_t experts = counts.size(0);
  sort_by_expert(in<int64_t>(ids), permutation.size(0), experts, out<int32_t>(permutation), out<int32_t>(inverse),
                 out<int32_t>(counts), out<int32_t>(offsets));
  if (tile > 0) list_tiles(in<int32_t>(offsets), experts, tile, tiles.size(0), out<int32_t>(tiles));
}

IVL_OPERATOR(moe_routing, forward)
IVL_OPERATOR(moe_routing_backward, backward)
IVL_OPERATOR(moe_dispatch, dispatch)

}  // namespace
}  // namespace ivl
