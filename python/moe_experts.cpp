#include "ivl/moe_experts.h"

#include <optional>
#include <string>
#include <vector>

#include "tensor.h"

namespace ivl {
namespace {

void forward(Tensor hidden, Tensor weights, Tensor permutation, Tensor offsets, Tensor gate_up, Tensor down,
             std::optional<Tensor> gate_up_bias, std::optional<Tensor> down_bias, bool gpt_oss, double alpha, double limit,
             bool interleaved, Tensor result, std::optional<Tensor> pre) {
  const ExpertOptions options{gpt_oss ? Gating::gpt_oss : Gating::silu, static_cast<float>(alpha),
                              static_cast<float>(limit)};
  const int64_t experts = gate_up.size(0), width = hidden.size(1), inner = down.size(interleaved ? 1 : 2);
  const ExpertShape shape{hidden.size(0), weights.size(1), width, inner, experts};
  dispatch_float(hidden.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    if constexpr (!std::is_same_v<T, double>) {
      std::vector<const T*> gates(experts), ups(experts), downs(experts);
      for (int64_t e = 0; e < experts; ++e) {
        gates[e] = in<T>(gate_up) + e * 2 * inner * width;
        ups[e] = gates[e] + inner * width;
        downs[e] = in<T>(down) + e * inner * width;
      }
      const ExpertWeights<T> all{gates.data(),
                                 ups.data(),
                                 downs.data(),
                                 interleaved,
                                 gate_up_bias ? in<T>(*gate_up_bias) : nullptr,
                                 down_bias ? in<T>(*down_bias) : nullptr};
      experts_forward<T>(shape, options, in<T>(hidden), in<float>(weights), in<int32_t>(permutation), in<int32_t>(offsets),
                         all, out<T>(result), pre ? out<T>(*pre) : nullptr);
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ivl_native, m) {
  m.def(
      "moe_experts(Tensor hidden, Tensor weights, Tensor permutation, Tensor offsets, Tensor gate_up, Tensor down, "
      "Tensor? gate_up_bias, Tensor? down_bias, bool gpt_oss, float alpha, float limit, bool interleaved, "
      "Tensor(a!) result, Tensor(b!)? pre) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(ivl_native, CPU, m) { m.impl("moe_experts", TORCH_BOX(&forward)); }

}  // namespace ivl
