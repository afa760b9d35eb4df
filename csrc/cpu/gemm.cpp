#include "ivl/gemm.h"

#define IVL_KERNELS "ivl/gemm/product.h"
#include "ivl/foreach_isa.h"

namespace ivl {

template <class T>
void matmul(const Product<T>& product) {
  if (product.m > 0 && product.n > 0) IVL_CALL(matmul, product);
}

#define IVL_INSTANTIATE(T) \
  template void matmul(const Product<T>&);
IVL_WIDENED_TYPES(IVL_INSTANTIATE)

}  // namespace ivl
