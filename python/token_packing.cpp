#include "ivl/token_packing.h"

#include "tensor.h"

namespace ivl {
namespace {

RowGrid grid_of(const Tensor& embeds) {
  const int64_t size = itemsize(embeds);
  return {out<char>(embeds), embeds.size(1), embeds.stride(0) * size, embeds.stride(1) * size, embeds.size(2) * size};
}

int64_t place(Tensor& embeds, const Tensor& ids, const Tensor& rows, int64_t token) {
  return place_rows(grid_of(embeds), in<int64_t>(ids), ids.numel(), token, in<char>(rows), rows.size(0));
}

int64_t take(const Tensor& embeds, const Tensor& ids, Tensor& rows, int64_t token) {
  return take_rows(grid_of(embeds), in<int64_t>(ids), ids.numel(), token, out<char>(rows), rows.size(0));
}

int64_t embed(const Tensor& ids, const Tensor& table, Tensor& result, int64_t token) {
  return embed_text(in<int64_t>(ids), ids.numel(), token, in<char>(table), table.size(0),
                    table.size(1) * itemsize(table), out<char>(result));
}

int64_t pack(const Tensor& ids, const OptionalTensor& mask, const Tensor& compress, const OptionalTensor& labels,
             const OptionalTensor& weights, int64_t token, int64_t full, int64_t small, int64_t vocabulary,
             int64_t padding, bool capacity, int64_t pad_id, Tensor& keep, Tensor& status, Tensor& integers,
             Tensor& new_weights, Tensor& tile_rows) {
  const bool narrow = mask && mask->scalar_type() == ScalarType::Bool;
  const PackInput input{in<int64_t>(ids), narrow ? in<bool>(mask) : nullptr, narrow ? nullptr : in<int64_t>(mask),
                        in<bool>(compress), in<int64_t>(labels), in<float>(weights), ids.size(0),
                        ids.size(1), compress.size(0), token, full, small, vocabulary};
  return pack_tokens(input, static_cast<Padding>(padding), capacity, pad_id, out<bool>(keep), out<int64_t>(status),
                     out<int64_t>(integers), out<float>(new_weights), out<int64_t>(tile_rows));
}

IVL_OPERATOR(place_rows_, place)
IVL_OPERATOR(take_rows, take)
IVL_OPERATOR(embed_text, embed)
IVL_OPERATOR(pack_tokens, pack)

}  // namespace
}  // namespace ivl
