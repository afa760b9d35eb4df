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
  return embed_text(in<int64_t>(ids), ids.numel(), token, in<char>(table), table.size(0), table.size(1) * itemsize(table),
                    out<char>(result));
}

PackInput pack_input(const Tensor& ids, const std::optional<Tensor>& mask, const Tensor& compress, int64_t token, int64_t full,
                     int64_t small, int64_t vocabulary) {
  return {in<int64_t>(ids), mask ? in<bool>(*mask) : nullptr, in<bool>(compress), ids.size(0), ids.size(1),
          compress.size(0), token, full, small, vocabulary};
}

void scan(Tensor ids, std::optional<Tensor> mask, Tensor compress, int64_t token, int64_t full, int64_t small,
          int64_t vocabulary, Tensor keep, Tensor status) {
  pack_scan(pack_input(ids, mask, compress, token, full, small, vocabulary), out<bool>(keep), out<int64_t>(status));
}

void write(Tensor ids, std::optional<Tensor> mask, Tensor compress, std::optional<Tensor> labels,
           std::optional<Tensor> weights, int64_t token, int64_t full, int64_t small, Tensor keep, Tensor status,
           int64_t padding, int64_t pad_id, Tensor integers, Tensor new_weights, Tensor tile_rows) {
  // integers: [4 or 5, rows, width], the packed ids, mask, position ids, kept indices and labels.
  const int64_t plane = integers.size(1) * integers.size(2), width = integers.size(2);
  int64_t* base = out<int64_t>(integers);
  PackOutput output{base, base + plane, base + 2 * plane, base + 3 * plane, labels ? base + 4 * plane : nullptr,
                    weights ? out<float>(new_weights) : nullptr, out<int64_t>(tile_rows)};
  pack_write(pack_input(ids, mask, compress, token, full, small, 0), in<bool>(keep), in<int64_t>(status),
             labels ? in<int64_t>(*labels) : nullptr, weights ? in<float>(*weights) : nullptr,
             static_cast<Padding>(padding), width, pad_id, output);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ivl_native, m) {
  m.def("place_rows_(Tensor(a!) embeds, Tensor ids, Tensor rows, int token) -> int");
  m.def("take_rows(Tensor embeds, Tensor ids, Tensor(a!) rows, int token) -> int");
  m.def("embed_text(Tensor ids, Tensor table, Tensor(a!) result, int token) -> int");
  m.def(
      "pack_scan(Tensor ids, Tensor? mask, Tensor compress, int token, int full, int small, int vocabulary, "
      "Tensor(a!) keep, Tensor(b!) status) -> ()");
  m.def(
      "pack_write(Tensor ids, Tensor? mask, Tensor compress, Tensor? labels, Tensor? weights, int token, int full, "
      "int small, Tensor keep, Tensor status, int padding, int pad_id, Tensor(a!) integers, Tensor(b!) new_weights, "
      "Tensor(c!) tile_rows) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(ivl_native, CPU, m) {
  m.impl("place_rows_", TORCH_BOX(&place));
  m.impl("take_rows", TORCH_BOX(&take));
  m.impl("embed_text", TORCH_BOX(&embed));
  m.impl("pack_scan", TORCH_BOX(&scan));
  m.impl("pack_write", TORCH_BOX(&write));
}

}  // namespace ivl
