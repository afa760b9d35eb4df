#include "ivl/moe_experts.h"

#include <optional>
#include <type_traits>
#include <vector>

#include "tensor.h"

namespace ivl {
namespace {

using Maybe = std::optional<Tensor>;

GatedActivation options_of(bool gpt_oss, double alpha, double limit) {
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

bool in_blocks(const Maybe& scales) { return scales.has_value(); }

template <class T>
BlockExperts<T> blocks_of(const Tensor& gate_up, const Tensor& down, const Maybe& gate_up_scales,
                          const Maybe& down_scales, bool interleaved, const Maybe& gate_up_bias,
                          const Maybe& down_bias) {
  return {gate_up.scalar_type() == ScalarType::Byte ? BlockFormat::mxfp4 : BlockFormat::fp8,
          in<uint8_t>(gate_up), in<uint8_t>(down), gate_up_scales->const_data_ptr(), down_scales->const_data_ptr(),
          interleaved, in_or_null<T>(gate_up_bias), in_or_null<T>(down_bias)};
}

// Of experts in few bits: the width of a plain matrix's rows is in their inputs alone.
ExpertShape block_shape(const Tensor& hidden, const Tensor& weights, const Tensor& gate_up) {
  return {hidden.size(0), weights.size(1), hidden.size(1), gate_up.size(1) / 2, gate_up.size(0)};
}

template <class F>
void dispatch(const Tensor& hidden, F&& f) {
  dispatch_float(hidden.scalar_type(), [&](auto zero) {
    if constexpr (!std::is_same_v<decltype(zero), double>) f(zero);
  });
}

void forward(Tensor hidden, Tensor weights, Tensor permutation, Tensor offsets, Tensor gate_up, Tensor down,
             Maybe gate_up_bias, Maybe down_bias, Maybe gate_up_scales, Maybe down_scales, bool gpt_oss, double alpha,
             double limit, bool interleaved, Tensor result, Maybe pre) {
  if (in_blocks(gate_up_scales)) {
    dispatch(hidden, [&](auto zero) {
      using T = decltype(zero);
      experts_forward<T>(block_shape(hidden, weights, gate_up), options_of(gpt_oss, alpha, limit), in<T>(hidden),
                         in<float>(weights), in<int32_t>(permutation), in<int32_t>(offsets),
                         blocks_of<T>(gate_up, down, gate_up_scales, down_scales, interleaved, gate_up_bias, down_bias),
                         out<T>(result), out_or_null<T>(pre));
    });
    return;
  }
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

void backward(Tensor grad, Tensor hidden, Tensor weights, Tensor permutation, Tensor inverse, Tensor offsets,
              Tensor gate_up, Tensor down, Maybe gate_up_bias, Maybe down_bias, Maybe gate_up_scales, Maybe down_scales,
              Tensor pre, bool gpt_oss, double alpha, double limit, bool interleaved, Maybe grad_hidden,
              Maybe grad_weights, Maybe grad_gate_up, Maybe grad_down, Maybe grad_gate_up_bias, Maybe grad_down_bias) {
  if (in_blocks(gate_up_scales)) {
    dispatch(hidden, [&](auto zero) {
      using T = decltype(zero);
      const ExpertGradients<T> gradients{out_or_null<T>(grad_hidden),
                                         out_or_null<float>(grad_weights),
                                         nullptr,
                                         nullptr,
                                         nullptr,
                                         out_or_null<T>(grad_gate_up_bias),
                                         out_or_null<T>(grad_down_bias)};
      experts_backward<T>(
          block_shape(hidden, weights, gate_up), options_of(gpt_oss, alpha, limit), in<T>(grad), in<T>(hidden),
          in<float>(weights), in<int32_t>(permutation), in<int32_t>(inverse), in<int32_t>(offsets),
          blocks_of<T>(gate_up, down, gate_up_scales, down_scales, interleaved, gate_up_bias, down_bias), in<T>(pre),
          gradients);
    });
    return;
  }
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

// The same with one tensor a matrix: gate[e], up[e] [I, H] and down[e] [H, I], contiguous, SiLU, no biases.
template <class T>
std::vector<const T*> in_each(const std::vector<Tensor>& tensors) {
  std::vector<const T*> pointers;
  for (const Tensor& t : tensors) pointers.push_back(in<T>(t));
  return pointers;
}
template <class T>
std::vector<T*> out_each(const std::vector<Tensor>& tensors) {
  std::vector<T*> pointers;
  for (const Tensor& t : tensors) pointers.push_back(out<T>(t));
  return pointers;
}

ExpertShape shape_of_list(const Tensor& hidden, const Tensor& weights, const std::vector<Tensor>& down) {
  return {hidden.size(0), weights.size(1), hidden.size(1), down[0].size(1), static_cast<int64_t>(down.size())};
}

void forward_list(Tensor hidden, Tensor weights, Tensor permutation, Tensor offsets, std::vector<Tensor> gate,
                  std::vector<Tensor> up, std::vector<Tensor> down, Tensor result, Maybe pre) {
  dispatch(hidden, [&](auto zero) {
    using T = decltype(zero);
    const auto gates = in_each<T>(gate), ups = in_each<T>(up), downs = in_each<T>(down);
    const ExpertWeights<T> experts{gates.data(), ups.data(), downs.data(), false, nullptr, nullptr};
    experts_forward<T>(shape_of_list(hidden, weights, down), options_of(false, 0, 0), in<T>(hidden), in<float>(weights),
                       in<int32_t>(permutation), in<int32_t>(offsets), experts, out<T>(result), out_or_null<T>(pre));
  });
}

void backward_list(Tensor grad, Tensor hidden, Tensor weights, Tensor permutation, Tensor inverse, Tensor offsets,
                   std::vector<Tensor> gate, std::vector<Tensor> up, std::vector<Tensor> down, Tensor pre,
                   Maybe grad_hidden, Maybe grad_weights, std::vector<Tensor> grad_gate, std::vector<Tensor> grad_up,
                   std::vector<Tensor> grad_down) {
  dispatch(hidden, [&](auto zero) {
    using T = decltype(zero);
    const auto gates = in_each<T>(gate), ups = in_each<T>(up), downs = in_each<T>(down);
    const auto to_gates = out_each<T>(grad_gate), to_ups = out_each<T>(grad_up), to_downs = out_each<T>(grad_down);
    const ExpertWeights<T> experts{gates.data(), ups.data(), downs.data(), false, nullptr, nullptr};
    const ExpertGradients<T> gradients{out_or_null<T>(grad_hidden),
                                       out_or_null<float>(grad_weights),
                                       to_gates.empty() ? nullptr : to_gates.data(),
                                       to_gates.empty() ? nullptr : to_ups.data(),
                                       to_downs.empty() ? nullptr : to_downs.data(),
                                       nullptr,
                                       nullptr};
    experts_backward<T>(shape_of_list(hidden, weights, down), options_of(false, 0, 0), in<T>(grad), in<T>(hidden),
                        in<float>(weights), in<int32_t>(permutation), in<int32_t>(inverse), in<int32_t>(offsets),
                        experts, in<T>(pre), gradients);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ivl_native, m) {
  m.def(
      "moe_experts(Tensor hidden, Tensor weights, Tensor permutation, Tensor offsets, Tensor gate_up, Tensor down, "
      "Tensor? gate_up_bias, Tensor? down_bias, Tensor? gate_up_scales, Tensor? down_scales, bool gpt_oss, float alpha, "
      "float limit, bool interleaved, Tensor(a!) result, Tensor(b!)? pre) -> ()");
  m.def(
      "moe_experts_backward(Tensor grad, Tensor hidden, Tensor weights, Tensor permutation, Tensor inverse, "
      "Tensor offsets, Tensor gate_up, Tensor down, Tensor? gate_up_bias, Tensor? down_bias, Tensor? gate_up_scales, "
      "Tensor? down_scales, Tensor pre, bool gpt_oss, float alpha, float limit, bool interleaved, Tensor(a!)? grad_hidden, Tensor(b!)? grad_weights, "
      "Tensor(c!)? grad_gate_up, Tensor(d!)? grad_down, Tensor(e!)? grad_gate_up_bias, Tensor(f!)? grad_down_bias) "
      "-> ()");
  m.def(
      "moe_experts_list(Tensor hidden, Tensor weights, Tensor permutation, Tensor offsets, Tensor[] gate, Tensor[] up, "
      "Tensor[] down, Tensor(a!) result, Tensor(b!)? pre) -> ()");
  m.def(
      "moe_experts_list_backward(Tensor grad, Tensor hidden, Tensor weights, Tensor permutation, Tensor inverse, "
      "Tensor offsets, Tensor[] gate, Tensor[] up, Tensor[] down, Tensor pre, Tensor(a!)? grad_hidden, "
      "Tensor(b!)? grad_weights, Tensor(c!)[] grad_gate, Tensor(d!)[] grad_up, Tensor(e!)[] grad_down) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(ivl_native, CPU, m) {
  m.impl("moe_experts", TORCH_BOX(&forward));
  m.impl("moe_experts_backward", TORCH_BOX(&backward));
  m.impl("moe_experts_list", TORCH_BOX(&forward_list));
  m.impl("moe_experts_list_backward", TORCH_BOX(&backward_list));
}

}  // namespace ivl
