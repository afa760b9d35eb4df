#include "ivl/attention.h"

#include "tensor.h"

namespace ivl {
namespace {

AttentionSide side(const Tensor& t) { return {t.const_data_ptr(), t.stride(0), t.stride(1), t.stride(2)}; }

AttentionArgs arguments(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& cu_q,
                        const OptionalTensor& cu_k, const OptionalTensor& sinks, double scale, bool causal,
                        int64_t window) {
  AttentionArgs args = {};
  args.batch = q.size(0);
  args.q_tokens = q.size(1);
  args.k_tokens = k.size(1);
  args.q_heads = q.size(2);
  args.kv_heads = k.size(2);
  args.dim = q.size(3);
  args.q_offsets = in<int64_t>(cu_q);
  args.k_offsets = in<int64_t>(cu_k);
  args.sequences = cu_q ? cu_q->size(0) - 1 : q.size(0);
  args.q = side(q);
  args.k = side(k);
  args.v = side(v);
  args.sinks = in<float>(sinks);
  args.scale = scale;
  args.causal = causal;
  args.window = window;
  return args;
}

void forward(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& cu_q, const OptionalTensor& cu_k,
             const OptionalTensor& sinks, double scale, bool causal, int64_t window, Tensor& result, Tensor& lse) {
  const AttentionArgs args = arguments(q, k, v, cu_q, cu_k, sinks, scale, causal, window);
  dispatch_widened(q.scalar_type(), [&](auto zero) { attention(args, out<decltype(zero)>(result), out<float>(lse)); });
}

void backward(const Tensor& grad, const Tensor& result, const Tensor& lse, const Tensor& q, const Tensor& k,
              const Tensor& v, const OptionalTensor& cu_q, const OptionalTensor& cu_k, const OptionalTensor& sinks,
              double scale, bool causal, int64_t window, Tensor& dq, Tensor& dk, Tensor& dv, Tensor& dsinks) {
  const AttentionArgs args = arguments(q, k, v, cu_q, cu_k, sinks, scale, causal, window);
  AttentionGrads grads = {};
  grads.grad = side(grad);
  grads.out = result.const_data_ptr();
  grads.lse = in<float>(lse);
  grads.dq = dq.mutable_data_ptr();
  grads.dk = dk.mutable_data_ptr();
  grads.dv = dv.mutable_data_ptr();
  grads.dsinks = sinks ? out<float>(dsinks) : nullptr;
  dispatch_widened(q.scalar_type(), [&](auto zero) { attention_backward<decltype(zero)>(args, grads); });
}

IVL_OPERATOR(attention, forward)
IVL_OPERATOR(attention_backward, backward)

}  // namespace
}  // namespace ivl
