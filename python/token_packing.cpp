#include "ivl/token_packing.h"

#include <optional>

#include "tensor.h"

namespace ivl {
namespace {

RowGrid grid_of(const Tensor& embeds) {
  const int64_t size = itemsize(embeds);
  return {out<char>(embeds), embeds.size(1), embeds.stride(0) * size, embeds.stride(1) * size, embeds.size(2) * size};
}

int64_t place(Tensor embeds, Tensor ids, Tensor rows, int64_t token) {
  return place_rows(grid_of(embeds), in<int64_t>(ids), ids.numel(), token, in<char>(rows), rows.size(0));
}

int64_t take(Tensor embeds, Tensor ids, Tensor rows, int64_t token) {
  return take_rows(grid_of(embeds), in<int64_t>(ids), ids.numel(), token, out<char>(rows), rows.size(0));
}

int64_t embed(Tensor ids, Tensor table, Tensor result, int64_t token) {
  return embed_text(in<int64_t>(ids), ids.numel(), token, in<char>(table), table.size(0),
                    table.size(1) * itemsize(table), out<char>(result));
}

const int64_t* in_long(const std::optional<Tensor>& t) { return t ? in<int64_t>(*t) : nullptr; }

int64_t pack(Tensor ids, std::optional<Tensor> mask, Tensor compress, std::optional<Tensor> labels,
             std::optional<Tensor> weights, int64_t token, int64_t full, int64_t small, int64_t vocabulary,
             int64_t padding, bool capacity, int64_t pad_id, Tensor keep, Tensor status, Tensor integers,
             Tensor new_weights, Tensor tile_rows) {
  const bool narrow = mask && mask->scalar_type() == ScalarType::Bool;
  const PackInput input{in<int64_t>(ids), narrow ? in<bool>(*mask) : nullptr, narrow ? nullptr : in_long(mask),
                        in<bool>(compress), in_long(labels), weights ? in<float>(*weights) : nullptr, ids.size(0),
                        ids.size(1), compress.size(0), token, full, small, vocabulary};
  return pack_tokens(input, static_cast<Padding>(padding), capacity, pad_id, out<bool>(keep), out<int64_t>(status),
                     out<int64_t>(integers), out<float>(new_weights), out<int64_t>(tile_rows));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ivl_native, m) {
  m.def("place_rows_(Tensor(a!) embeds, Tensor ids, Tensor rows, int token) -> int");
  m.def("take_rows(Tensor embeds, Tensor ids, Tensor(a!) rows, int token) -> int");
  m.def("embed_text(Tensor ids, Tensor table, Tensor(a!) result, int token) -> int");
  m.def(
      "pack_tokens(Tensor ids, Tensor? mask, Tensor compress, Tensor? labels, Tensor? weights, int token, int full, "
      "int small, int vocabulary, int padding, bool capacity, int pad_id, Tensor(a!) keep, Tensor(b!) status, "
      "Tensor(c!) integers, Tensor(d!) new_weights, Tensor(e!) tile_rows) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(ivl_native, CPU, m) {
  m.impl("place_rows_", TORCH_BOX(&place));
  m.impl("take_rows", TORCH_BOX(&take));
  m.impl("embed_text", TORCH_BOX(&embed));
  m.impl("pack_tokens", TORCH_BOX(&pack));
}

}  // namespace ivl
