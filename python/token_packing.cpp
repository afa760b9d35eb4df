#include "ivl/token_packing.h"

#include "tensor.h"

namespace ivl {
namespace {

RowGrid grid_of(const Tensor& embeds) {
  const int64_t size = itemsize(embeds);
  return {out<char>(embeds), embeds.size(1), embeds.stride(0) * size, embeds.stride(1) * size};
}

void place(Tensor embeds, Tensor positions, Tensor rows) {
  place_rows(grid_of(embeds), in<int64_t>(positions), in<char>(rows), positions.size(0), embeds.size(2) * itemsize(embeds));
}

void take(Tensor embeds, Tensor positions, Tensor rows) {
  take_rows(grid_of(embeds), in<int64_t>(positions), out<char>(rows), positions.size(0), embeds.size(2) * itemsize(embeds));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ivl_native, m) {
  m.def("place_rows_(Tensor(a!) embeds, Tensor positions, Tensor rows) -> ()");
  m.def("take_rows(Tensor embeds, Tensor positions, Tensor(a!) rows) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(ivl_native, CPU, m) {
  m.impl("place_rows_", TORCH_BOX(&place));
  m.impl("take_rows", TORCH_BOX(&take));
}

}  // namespace ivl
