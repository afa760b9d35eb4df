#include "ivl/attention.h"

#include <optional>
#include <type_traits>

#include "tensor.h"

namespace ivl {
namespace {

using Optional = std::optional<Tensor>;

AttentionSide side(const Tensor& t) { return {t.const_data_ptr(), t.stride(0), t.stride(1), t.stride(2)}; }

AttentionArgs arguments(const Tensor& q, const Tensor& k, const Tensor& v, const Optional& cu_q, const Optional& cu_k,
                        const Optional& sinks, double scale, bool causal, int64_t window) {
  AttentionArgs args = {};
  args.batch = q.size(0);
  args.q_tokens = q.size(1);
  args.k_tokens = k.size(1);
  args.q_heads = q.size(2);
  args.kv_heads = k.size(2);
  args.dim = q.size(3);
  args.q_offsets = cu_q ? in<int64_t>(*cu_q) : nullptr;
  args.k_offsets = cu_k ? in<int64_t>(*cu_k) : nullptr;
  args.sequences = cu_q ? cu_q->size(0) - 1 : q.size(0);
  args.q = side(q);
  args.k = side(k);
  args.v = side(v);
  args.sinks = sinks ? in<float>(*sinks) : nullptr;
  args.scale = scale;
  args.causal = causal;
  args.window = window;
  return args;
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

void forward(Tensor q, Tensor k, Tensor v, Optional cu_q, Optional cu_k, Optional sinks, double scale, bool causal,
             int64_t window, Tensor result, Tensor lse) {
  const AttentionArgs args = arguments(q, k, v, cu_q, cu_k, sinks, scale, causal, window);
  dispatch(q.scalar_type(), [&](auto zero) { attention(args, out<decltype(zero)>(result), out<float>(lse)); });
}

void backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor result, Tensor lse, Optional cu_q, Optional cu_k,
              Optional sinks, double scale, bool causal, int64_t window, Tensor dq, Tensor dk, Tensor dv,
              Tensor dsinks) {
  const AttentionArgs args = arguments(q, k, v, cu_q, cu_k, sinks, scale, causal, window);
  AttentionGrads grads = {};
  grads.grad = side(grad);
  grads.out = result.const_data_ptr();
  grads.lse = in<float>(lse);
  grads.dq = dq.mutable_data_ptr();
  grads.dk = dk.mutable_data_ptr();
  grads.dv = dv.mutable_data_ptr();
  grads.dsinks = sinks ? out<float>(dsinks) : nullptr;
  dispatch(q.scalar_type(), [&](auto zero) { attention_backward<decltype(zero)>(args, grads); });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ivl_native, m) {
  m.def(
      "attention(Tensor q, Tensor k, Tensor v, Tensor? cu_q, Tensor? cu_k, Tensor? sinks, float scale, bool causal, "
      "int window, Tensor(a!) out, Tensor(b!) lse) -> ()");
  m.def(
      "attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? cu_q, Tensor? "
      "cu_k, "
      "Tensor? sinks, float scale, bool causal, int window, Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv, "
      "Tensor(d!) dsinks) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(ivl_native, CPU, m) {
  m.impl("attention", TORCH_BOX(&forward));
  m.impl("attention_backward", TORCH_BOX(&backward));
}

}  // namespace ivl
