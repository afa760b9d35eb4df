#include "ivl/gemm.h"

#define IVL_KERNELS "ivl/gemm/product.h"
#include "ivl/foreach_isa.h"

namespace ivl {

template <class T>
void matmul(const Product<T>& product) {
  if (product.m > 0 && product.n > 0) IVL_CALL(matmul, product);
}

template void matmul(const Product<float>&);
template void matmul(const Product<bfloat16>&);
template void matmul(const Product<float16>&);

}  // namespace ivl
