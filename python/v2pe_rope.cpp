#include "ivl/v2pe_rope.h"

#include "tensor.h"

namespace ivl {
namespace {

RopeStrides strides(const Tensor& t, int64_t heads_dim) {
  return {t.stride(0), t.stride(heads_dim), t.stride(3 - heads_dim)};
}

RopeSide side(const Tensor& in, const Tensor& out, const OptionalTensor& weight, int64_t heads_dim) {
  RopeSide s = {};
  s.in = in.const_data_ptr();
  s.out = out.mutable_data_ptr();
  s.weight = weight ? weight->const_data_ptr() : nullptr;
  s.heads = in.size(heads_dim);
  s.in_strides = strides(in, heads_dim);
  s.out_strides = strides(out, heads_dim);
  return s;
}

RopeArgs arguments(const Tensor& q, const Tensor& first, const Tensor& second, bool table, double scale, double eps,
                   int64_t rotary_dim, int64_t heads_dim, bool round, bool inverse) {
  RopeArgs args = {};
  args.batch = q.size(0);
  args.tokens = q.size(3 - heads_dim);
  args.head_dim = q.size(3);
  args.rotary_dim = rotary_dim;
  args.table = !table ? RopeTable::none : first.scalar_type() == q.scalar_type() ? RopeTable::same : RopeTable::float32;
  args.first = first.const_data_ptr();
  args.second = second.const_data_ptr();
  args.angle_batch = first.size(0) == 1 ? 0 : first.stride(0);
  args.angle_token = first.stride(1);
  args.scale = scale;
  args.eps = eps;
  args.round = round;
  args.inverse = inverse;
  return args;
}

void rope(const Tensor& q, const Tensor& k, Tensor& q_out, Tensor& k_out, const Tensor& first, const Tensor& second,
          bool table, const OptionalTensor& q_weight, const OptionalTensor& k_weight, double scale, double eps,
          int64_t rotary_dim, int64_t heads_dim, bool round, bool inverse) {
  RopeArgs args = arguments(q, first, second, table, scale, eps, rotary_dim, heads_dim, round, inverse);
  args.q = side(q, q_out, q_weight, heads_dim);
  args.k = side(k, k_out, k_weight, heads_dim);
  dispatch_float(q.scalar_type(), [&](auto zero) { v2pe_rope<decltype(zero)>(args); });
}

void norm_backward(const Tensor& grad_q, const Tensor& grad_k, const Tensor& q, const Tensor& k, Tensor& q_out,
                   Tensor& k_out, Tensor& q_weight_grad, Tensor& k_weight_grad, const Tensor& first,
                   const Tensor& second, bool table, const OptionalTensor& q_weight, const OptionalTensor& k_weight,
                   double scale, double eps, int64_t rotary_dim, int64_t heads_dim, bool round, bool inverse) {
  RopeArgs args = arguments(q, first, second, table, scale, eps, rotary_dim, heads_dim, round, inverse);
  const auto fill = [&](RopeSide& s, const Tensor& grad, const Tensor& x, const Tensor& out,
                        const OptionalTensor& weight, const Tensor& weight_grad) {
    s = side(grad, out, weight, heads_dim);
    s.x = x.const_data_ptr();
    s.x_strides = strides(x, heads_dim);
    s.grad_weight = weight_grad.mutable_data_ptr();
  };
  fill(args.q, grad_q, q, q_out, q_weight, q_weight_grad);
  fill(args.k, grad_k, k, k_out, k_weight, k_weight_grad);
  dispatch_float(q.scalar_type(), [&](auto zero) { v2pe_rope_norm_backward<decltype(zero)>(args); });
}

void positions(const Tensor& ids, const OptionalTensor& mask, const OptionalTensor& cu_seqlens, int64_t token_id,
               const Tensor& deltas, bool per_row, const OptionalTensor& compress, int64_t tile_tokens,
               int64_t compressed_tokens, int64_t compressed_units, Tensor& result, Tensor& info) {
  PositionArgs args = {};
  args.batch = ids.size(0);
  args.tokens = ids.size(1);
  args.ids = in<int64_t>(ids);
  args.ids_stride = ids.stride(0);
  args.mask = in<bool>(mask);
  args.cu_seqlens = in<int64_t>(cu_seqlens);
  args.segments = cu_seqlens ? cu_seqlens->size(0) - 1 : 0;
  args.token_id = token_id;
  args.deltas = in<double>(deltas);
  args.delta_count = deltas.size(0);
  args.delta_per_row = per_row;
  args.compress = in<bool>(compress);
  args.tiles = compress ? compress->size(0) : 0;
  args.tile_tokens = tile_tokens;
  args.compressed_tokens = compressed_tokens;
  args.compressed_units = compressed_units;
  args.out = out<float>(result);
  args.info = out<double>(info);
  v2pe_positions(args);
}

IVL_OPERATOR(v2pe_rope, rope)
IVL_OPERATOR(v2pe_rope_norm_backward, norm_backward)
IVL_OPERATOR(v2pe_position_ids, positions)

}  // namespace
}  // namespace ivl
