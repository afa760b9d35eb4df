#include "ivl/v2pe_rope.h"

#include <optional>

#include "tensor.h"

namespace ivl {
namespace {

using Optional = std::optional<Tensor>;

RopeStrides strides(const Tensor& t, int64_t heads_dim) {
  return {t.stride(0), t.stride(heads_dim), t.stride(3 - heads_dim)};
}

RopeSide side(const Tensor& in, const Tensor& out, const Optional& weight, int64_t heads_dim) {
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

void rope(Tensor q, Tensor k, Tensor q_out, Tensor k_out, Tensor first, Tensor second, bool table, Optional q_weight,
          Optional k_weight, double scale, double eps, int64_t rotary_dim, int64_t heads_dim, bool round,
          bool inverse) {
  RopeArgs args = arguments(q, first, second, table, scale, eps, rotary_dim, heads_dim, round, inverse);
  args.q = side(q, q_out, q_weight, heads_dim);
  args.k = side(k, k_out, k_weight, heads_dim);
  dispatch_float(q.scalar_type(), [&](auto zero) { v2pe_rope<decltype(zero)>(args); });
}

void norm_backward(Tensor grad_q, Tensor grad_k, Tensor q, Tensor k, Tensor q_out, Tensor k_out, Tensor q_weight_grad,
                   Tensor k_weight_grad, Tensor first, Tensor second, bool table, Tensor q_weight, Tensor k_weight,
                   double scale, double eps, int64_t rotary_dim, int64_t heads_dim, bool round) {
  RopeArgs args = arguments(q, first, second, table, scale, eps, rotary_dim, heads_dim, round, false);
  const auto fill = [&](RopeSide& s, const Tensor& grad, const Tensor& x, const Tensor& out, const Tensor& weight,
                        const Tensor& weight_grad) {
    s = side(grad, out, weight, heads_dim);
    s.x = x.const_data_ptr();
    s.x_strides = strides(x, heads_dim);
    s.grad_weight = weight_grad.mutable_data_ptr();
  };
  fill(args.q, grad_q, q, q_out, q_weight, q_weight_grad);
  fill(args.k, grad_k, k, k_out, k_weight, k_weight_grad);
  dispatch_float(q.scalar_type(), [&](auto zero) { v2pe_rope_norm_backward<decltype(zero)>(args); });
}

void positions(Tensor ids, Optional mask, Optional cu_seqlens, int64_t token_id, Tensor deltas, bool per_row,
               Optional compress, int64_t tile_tokens, int64_t compressed_tokens, int64_t compressed_units,
               Tensor result, Tensor info) {
  PositionArgs args = {};
  args.batch = ids.size(0);
  args.tokens = ids.size(1);
  args.ids = in<int64_t>(ids);
  args.ids_stride = ids.stride(0);
  args.mask = mask ? in<bool>(*mask) : nullptr;
  args.cu_seqlens = cu_seqlens ? in<int64_t>(*cu_seqlens) : nullptr;
  args.segments = cu_seqlens ? cu_seqlens->size(0) - 1 : 0;
  args.token_id = token_id;
  args.deltas = in<double>(deltas);
  args.delta_count = deltas.size(0);
  args.delta_per_row = per_row;
  args.compress = compress ? in<bool>(*compress) : nullptr;
  args.tiles = compress ? compress->size(0) : 0;
  args.tile_tokens = tile_tokens;
  args.compressed_tokens = compressed_tokens;
  args.compressed_units = compressed_units;
  args.out = out<float>(result);
  args.info = out<double>(info);
  v2pe_positions(args);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ivl_native, m) {
  m.def(
      "v2pe_rope(Tensor q, Tensor k, Tensor(a!) q_out, Tensor(b!) k_out, Tensor first, Tensor second, bool table, "
      "Tensor? q_weight, Tensor? k_weight, float scale, float eps, int rotary_dim, int heads_dim, bool round, "
      "bool inverse) -> ()");
  m.def(
      "v2pe_rope_norm_backward(Tensor grad_q, Tensor grad_k, Tensor q, Tensor k, Tensor(a!) q_out, Tensor(b!) k_out, "
      "Tensor(c!) q_weight_grad, Tensor(d!) k_weight_grad, Tensor first, Tensor second, bool table, Tensor q_weight, "
      "Tensor k_weight, float scale, float eps, int rotary_dim, int heads_dim, bool round) -> ()");
  m.def(
      "v2pe_position_ids(Tensor input_ids, Tensor? mask, Tensor? cu_seqlens, int token_id, Tensor deltas, bool "
      "per_row, "
      "Tensor? compress, int tile_tokens, int compressed_tokens, int compressed_units, Tensor(a!) positions, "
      "Tensor(b!) info) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(ivl_native, CPU, m) {
  m.impl("v2pe_rope", TORCH_BOX(&rope));
  m.impl("v2pe_rope_norm_backward", TORCH_BOX(&norm_backward));
  m.impl("v2pe_position_ids", TORCH_BOX(&positions));
}

}  // namespace ivl
