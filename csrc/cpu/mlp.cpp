#include "ivl/mlp.h"

#include "ivl/gating.h"
#include "ivl/gemm.h"

#define IVL_KERNELS "ivl/mlp_kernels.h"
#include "ivl/foreach_isa.h"

namespace ivl {

template <class T>
void mlp(const Mlp<T>& call) {
  if (call.rows > 0 && call.outputs > 0) IVL_CALL(mlp, call);
}

template <class T>
void gated_backward(const T* pre, const T* grad, int64_t rows, int64_t inner, T* active, T* dpre) {
  IVL_CALL(gated_backward, pre, grad, rows, inner, active, dpre);
}

#define IVL_INSTANTIATE(T)         \
  template void mlp(const Mlp<T>&); \
  template void gated_backward(const T*, const T*, int64_t, int64_t, T*, T*);
IVL_WIDENED_TYPES(IVL_INSTANTIATE)

}  // namespace ivl
