#include "ivl/gemm.h"

#include "tensor.h"

namespace ivl {
namespace {

template <class T>
StridedMatrix<T> matrix(const Tensor& t) {
  return {in<T>(t), t.stride(0), t.stride(1)};
}

// An empty bias: none. `any_rows`: a row's result does not depend on the number of rows.
void matmul_into(const Tensor& a, const Tensor& b, const Tensor& bias, Tensor& result, bool accumulate, bool any_rows) {
  STD_TORCH_CHECK(b.stride(0) == 1 || b.stride(1) == 1, "b: got strides (", b.stride(0), ", ", b.stride(1),
                  "), expected one of them to be 1");
  dispatch_widened(a.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    matmul<T>({a.size(0), b.size(1), a.size(1), matrix<T>(a), matrix<T>(b), bias.numel() ? in<T>(bias) : nullptr,
               out<T>(result), result.stride(0), accumulate, any_rows ? Form::packed : Form::best});
  });
}

IVL_OPERATOR(matmul_into, matmul_into)

}  // namespace
}  // namespace ivl
