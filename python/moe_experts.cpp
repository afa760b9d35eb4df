#include "ivl/moe_experts.h"

#include "tensor.h"

namespace ivl {
namespace {

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

GatedActivation activation_of(bool gpt_oss, double alpha, double limit) {
  return {gpt_oss ? Gating::gpt_oss : Gating::silu, static_cast<float>(alpha), static_cast<float>(limit)};
}

ExpertShape shape_of(const Tensor& hidden, const Tensor& weights, const Tensor& down, bool interleaved) {
  return {hidden.size(0), weights.size(1), hidden.size(1), down.size(interleaved ? 1 : 2), down.size(0)};
}

ExpertShape shape_of(const Tensor& hidden, const Tensor& weights, const Tensors& down) {
  const auto experts = static_cast<int64_t>(down.size());
  return {hidden.size(0), weights.size(1), hidden.size(1), down[0].size(1), experts};
}

// Experts in few bits. Their rows are as long as their inputs, whatever the dimensions of the tensor.
ExpertShape block_shape(const Tensor& hidden, const Tensor& weights, const Tensor& gate_up) {
  return {hidden.size(0), weights.size(1), hidden.size(1), gate_up.size(1) / 2, gate_up.size(0)};
}
template <class T>
BlockExperts<T> blocks_of(const Tensor& gate_up, const Tensor& down, const OptionalTensor& gate_up_bias,
                          const OptionalTensor& down_bias, const OptionalTensor& gate_up_scales,
                          const OptionalTensor& down_scales, bool interleaved) {
  return {gate_up.scalar_type() == ScalarType::Byte ? BlockFormat::mxfp4 : BlockFormat::fp8,
          in<uint8_t>(gate_up), in<uint8_t>(down), in<void>(gate_up_scales), in<void>(down_scales), interleaved,
          in<T>(gate_up_bias), in<T>(down_bias)};
}

void forward(const Tensor& hidden, const Tensor& weights, const Tensor& permutation, const Tensor& offsets,
             const Tensor& gate_up, const Tensor& down, const OptionalTensor& gate_up_bias,
             const OptionalTensor& down_bias, const OptionalTensor& gate_up_scales, const OptionalTensor& down_scales,
             bool gpt_oss, double alpha, double limit, bool interleaved,
             Tensor& result, OptionalTensor& pre) {
  const ExpertShape shape =
      gate_up_scales ? block_shape(hidden, weights, gate_up) : shape_of(hidden, weights, down, interleaved);
  dispatch_widened(hidden.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    if (gate_up_scales)
      return experts_forward<T>(
          BlockArgs<T>{shape, activation_of(gpt_oss, alpha, limit), in<T>(hidden), in<float>(weights),
                       in<int32_t>(permutation), nullptr, in<int32_t>(offsets),
                       blocks_of<T>(gate_up, down, gate_up_bias, down_bias, gate_up_scales, down_scales, interleaved)},
          out<T>(result), out<T>(pre));
    const Pointers<const T*> p(in<T>(gate_up), in<T>(down), shape.experts, shape.width * shape.inner);
    experts_forward<T>(ExpertsArgs<T>{shape, activation_of(gpt_oss, alpha, limit), in<T>(hidden), in<float>(weights),
                        in<int32_t>(permutation), nullptr, in<int32_t>(offsets),
                        {p.gate.data(), p.up.data(), p.down.data(), interleaved, in<T>(gate_up_bias), in<T>(down_bias)}},
                       out<T>(result), out<T>(pre));
  });
}

void backward(const Tensor& grad, const Tensor& hidden, const Tensor& weights, const Tensor& permutation,
              const Tensor& inverse, const Tensor& offsets, const Tensor& gate_up, const Tensor& down,
              const OptionalTensor& gate_up_bias, const OptionalTensor& down_bias,
              const OptionalTensor& gate_up_scales, const OptionalTensor& down_scales, const Tensor& pre, bool gpt_oss,
              double alpha, double limit, bool interleaved, OptionalTensor& grad_hidden, OptionalTensor& grad_weights,
              OptionalTensor& grad_gate_up, OptionalTensor& grad_down, OptionalTensor& grad_gate_up_bias,
              OptionalTensor& grad_down_bias) {
  const ExpertShape shape =
      gate_up_scales ? block_shape(hidden, weights, gate_up) : shape_of(hidden, weights, down, interleaved);
  dispatch_widened(hidden.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    if (gate_up_scales)
      return experts_backward<T>(
          BlockArgs<T>{shape, activation_of(gpt_oss, alpha, limit), in<T>(hidden), in<float>(weights),
                       in<int32_t>(permutation), in<int32_t>(inverse), in<int32_t>(offsets),
                       blocks_of<T>(gate_up, down, gate_up_bias, down_bias, gate_up_scales, down_scales, interleaved)},
          in<T>(grad), in<T>(pre),
          {out<T>(grad_hidden), out<float>(grad_weights), nullptr, nullptr, nullptr, out<T>(grad_gate_up_bias),
           out<T>(grad_down_bias)});
    const int64_t size = shape.width * shape.inner;
    const Pointers<const T*> p(in<T>(gate_up), in<T>(down), shape.experts, size);
    const Pointers<T*> g(out<T>(grad_gate_up), out<T>(grad_down), shape.experts, size);
    experts_backward<T>(ExpertsArgs<T>{shape, activation_of(gpt_oss, alpha, limit), in<T>(hidden), in<float>(weights),
                         in<int32_t>(permutation), in<int32_t>(inverse), in<int32_t>(offsets),
                         {p.gate.data(), p.up.data(), p.down.data(), interleaved, in<T>(gate_up_bias), in<T>(down_bias)}},
                        in<T>(grad), in<T>(pre),
                        {out<T>(grad_hidden), out<float>(grad_weights), grad_gate_up ? g.gate.data() : nullptr,
                         grad_gate_up ? g.up.data() : nullptr, grad_down ? g.down.data() : nullptr,
                         out<T>(grad_gate_up_bias), out<T>(grad_down_bias)});
  });
}

// The same with one tensor a matrix: gate[e], up[e] [I, H] and down[e] [H, I], contiguous, SiLU, no biases.
template <class T>
std::vector<const T*> in_each(const Tensors& tensors) {
  std::vector<const T*> pointers;
  for (const Tensor& t : tensors) pointers.push_back(in<T>(t));
  return pointers;
}
template <class T>
std::vector<T*> out_each(const Tensors& tensors) {
  std::vector<T*> pointers;
  for (const Tensor& t : tensors) pointers.push_back(out<T>(t));
  return pointers;
}
template <class P>
const P* data_or_null(const std::vector<P>& pointers) {
  return pointers.empty() ? nullptr : pointers.data();
}

void forward_list(const Tensor& hidden, const Tensor& weights, const Tensor& permutation, const Tensor& offsets,
                  const Tensors& gate, const Tensors& up, const Tensors& down, Tensor& result, OptionalTensor& pre) {
  dispatch_widened(hidden.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const auto gates = in_each<T>(gate), ups = in_each<T>(up), downs = in_each<T>(down);
    experts_forward<T>(ExpertsArgs<T>{shape_of(hidden, weights, down), activation_of(false, 0, 0), in<T>(hidden), in<float>(weights),
                        in<int32_t>(permutation), nullptr, in<int32_t>(offsets),
                        {gates.data(), ups.data(), downs.data(), false, nullptr, nullptr}},
                       out<T>(result), out<T>(pre));
  });
}

void backward_list(const Tensor& grad, const Tensor& hidden, const Tensor& weights, const Tensor& permutation,
                   const Tensor& inverse, const Tensor& offsets, const Tensors& gate, const Tensors& up,
                   const Tensors& down, const Tensor& pre, OptionalTensor& grad_hidden, OptionalTensor& grad_weights,
                   Tensors& grad_gate, Tensors& grad_up, Tensors& grad_down) {
  dispatch_widened(hidden.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const auto gates = in_each<T>(gate), ups = in_each<T>(up), downs = in_each<T>(down);
    const auto to_gates = out_each<T>(grad_gate), to_ups = out_each<T>(grad_up), to_downs = out_each<T>(grad_down);
    experts_backward<T>(ExpertsArgs<T>{shape_of(hidden, weights, down), activation_of(false, 0, 0), in<T>(hidden), in<float>(weights),
                         in<int32_t>(permutation), in<int32_t>(inverse), in<int32_t>(offsets),
                         {gates.data(), ups.data(), downs.data(), false, nullptr, nullptr}},
                        in<T>(grad), in<T>(pre),
                        {out<T>(grad_hidden), out<float>(grad_weights), data_or_null(to_gates), data_or_null(to_ups),
                         data_or_null(to_downs), nullptr, nullptr});
  });
}

IVL_OPERATOR(moe_experts, forward)
IVL_OPERATOR(moe_experts_backward, backward)
IVL_OPERATOR(moe_experts_list, forward_list)
IVL_OPERATOR(moe_experts_list_backward, backward_list)

}  // namespace
}  // namespace ivl
