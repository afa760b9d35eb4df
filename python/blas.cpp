// Matrix products through torch's dispatcher: whatever BLAS torch has, without linking one.
#include "ivl/blas.h"

#include "tensor.h"

namespace ivl {
namespace {

Tensor view(Matrix m) {
  const int64_t sizes[] = {m.rows, m.columns}, strides[] = {m.row_stride, m.column_stride};
  return torch::stable::from_blob(const_cast<float*>(m.data), {sizes, 2}, {strides, 2},
                                  torch::stable::Device(torch::headeronly::DeviceType::CPU), ScalarType::Float);
}

}  // namespace

void matmul(Matrix a, Matrix b, float* out, int64_t out_row_stride, bool accumulate) {
  Tensor c = view({out, a.rows, b.columns, out_row_stride, 1});
  using torch::stable::detail::from;
  if (accumulate) {
    StableIValue stack[] = {from(c), from(view(a)), from(view(b)), from(1.0), from(1.0), from(c)};
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::addmm", "out", stack, TORCH_ABI_VERSION));
    torch::stable::detail::to<Tensor>(stack[0]);
  } else {
    StableIValue stack[] = {from(view(a)), from(view(b)), from(c)};
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack, TORCH_ABI_VERSION));
    torch::stable::detail::to<Tensor>(stack[0]);
  }
}

}  // namespace ivl
