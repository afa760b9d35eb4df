#include "ivl/moe_experts.h"

#include <optional>
#include <type_traits>
#include <vector>

#include "tensor.h"

namespace ivl {
namespace {

using Maybe = std::optional<Tensor>;

ExpertOptions options_of(bool gpt_oss, double alpha, double limit) {
  return {gpt_oss ? Gating::gpt_oss : Gating::silu, static_cast<float>(alpha), static_cast<float>(limit)};
}

template <class T>
const T* in_or_null(const Maybe& t) {
  return t ? in<T>(*t) : nullptr;
}
template <class T>
T* out_or_null(const Maybe& t) {
  return t ? out<T>(*t) : nullptr;
}

// Pointers to the matrices of every expert in stacked tensors. P is const T* or T*.
template <class P>
struct Pointers {
  std::vector<P> gate, up, down;

  Pointers(P gate_up, P all_down, int64_t experts, int64_t size) {
    for (int64_t e = 0; e < experts; ++e) {
      if (gate_up) gate.push_back(gate_up + 2 * e * size), up.push_back(gate_up + (2 * e + 1) * size);
      if (all_down) down.push_back(all_down + e * size);
    }
  }
};

ExpertShape shape_of(const Tensor& hidden, const Tensor& weights, const Tensor& down, bool interleaved) {
  return {hidden.size(0), weights.size(1), hidden.size(1), down.size(interleaved ? 1 : 2), down.size(0)};
}

template <class F>
void dispatch(const Tensor& hidden, F&& f) {
  dispatch_float(hidden.scalar_type(), [&](auto zero) {
    if constexpr (!std::is_same_v<decltype(zero), double>) f(zero);
  });
}

void forward(Tensor hidden, Tensor weights, Tensor permutation, Tensor offsets, Tensor gate_up, Tensor down,
             Maybe gate_up_bias, Maybe down_bias, bool gpt_oss, double alpha, double limit, bool interleaved, Tensor result,
             Maybe pre) {
  const ExpertShape shape = shape_of(hidden, weights, down, interleaved);
  dispatch(hidden, [&](auto zero) {
    using T = decltype(zero);
    const Pointers<const T*> p(in<T>(gate_up), in<T>(down), shape.experts, shape.width * shape.inner);
    const ExpertWeights<T> experts{p.gate.data(), p.up.data(), p.down.data(), interleaved, in_or_null<T>(gate_up_bias),
                                   in_or_null<T>(down_bias)};
    experts_forward<T>(shape, options_of(gpt_oss, alpha, limit), in<T>(hidden), in<float>(weights),
                       in<int32_t>(permutation), in<int32_t>(offsets), experts, out<T>(result), out_or_null<T>(pre));
  });
}

void backward(Tensor grad, Tensor hidden, Tensor weights, Tensor permutation, Tensor inverse, Tensor offsets, Tensor gate_up,
              Tensor down, Maybe gate_up_bias, Maybe down_bias, Tensor pre, bool gpt_oss, double alpha, double limit,
              bool interleaved, Maybe grad_hidden, Maybe grad_weights, Maybe grad_gate_up, Maybe grad_down,
              Maybe grad_gate_up_bias, Maybe grad_down_bias) {
  const ExpertShape shape = shape_of(hidden, weights, down, interleaved);
  dispatch(hidden, [&](auto zero) {
    using T = decltype(zero);
    const int64_t size = shape.width * shape.inner;
    const Pointers<const T*> p(in<T>(gate_up), in<T>(down), shape.experts, size);
    const Pointers<T*> g(out_or_null<T>(grad_gate_up), out_or_null<T>(grad_down), shape.experts, size);
    const ExpertWeights<T> experts{p.gate.data(), p.up.data(), p.down.data(), interleaved, in_or_null<T>(gate_up_bias),
                                   in_or_null<T>(down_bias)};
    const ExpertGradients<T> gradients{out_or_null<T>(grad_hidden),
                                       out_or_null<float>(grad_weights),
                                       grad_gate_up ? g.gate.data() : nullptr,
                                       grad_gate_up ? g.up.data() : nullptr,
                                       grad_down ? g.down.data() : nullptr,
                                       out_or_null<T>(grad_gate_up_bias),
                                       out_or_null<T>(grad_down_bias)};
    experts_backward<T>(shape, options_of(gpt_oss, alpha, limit), in<T>(grad), in<T>(hidden), in<float>(weights),
                        in<int32_t>(permutation), in<int32_t>(inverse), in<int32_t>(offsets), experts, in<T>(pre),
                        gradients);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ivl_native, m) {
  m.def(
      "moe_experts(Tensor hidden, Tensor weights, Tensor permutation, Tensor offsets, Tensor gate_up, Tensor down, "
      "Tensor? gate_up_bias, Tensor? down_bias, bool gpt_oss, float alpha, float limit, bool interleaved, "
      "Tensor(a!) result, Tensor(b!)? pre) -> ()");
  m.def(
      "moe_experts_backward(Tensor grad, Tensor hidden, Tensor weights, Tensor permutation, Tensor inverse, "
      "Tensor offsets, Tensor gate_up, Tensor down, Tensor? gate_up_bias, Tensor? down_bias, Tensor pre, bool gpt_oss, "
      "float alpha, float limit, bool interleaved, Tensor(a!)? grad_hidden, Tensor(b!)? grad_weights, "
      "Tensor(c!)? grad_gate_up, Tensor(d!)? grad_down, Tensor(e!)? grad_gate_up_bias, Tensor(f!)? grad_down_bias) "
      "-> ()");
}

STABLE_TORCH_LIBRARY_IMPL(ivl_native, CPU, m) {
  m.impl("moe_experts", TORCH_BOX(&forward));
  m.impl("moe_experts_backward", TORCH_BOX(&backward));
}

}  // namespace ivl
