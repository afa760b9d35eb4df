#include "ivl/moe_experts.h"

#define IVL_KERNELS "ivl/moe_experts_block_kernels.h"
#include "ivl/foreach_isa.h"

namespace ivl {

template <class T>
void experts_forward(const BlockArgs<T>& args, T* out, T* pre) {
  clear_unused(args.shape, args.offsets, pre);
  IVL_CALL(forward_blocks, args, out, pre);
}

template <class T>
void experts_backward(const BlockArgs<T>& args, const T* grad, const T* pre, const ExpertGradients<T>& gradients) {
  IVL_CALL(backward_blocks, args, grad, pre, gradients);
}

#define IVL_INSTANTIATE(T)                                   \
  template void experts_forward(const BlockArgs<T>&, T*, T*); \
  template void experts_backward(const BlockArgs<T>&, const T*, const T*, const ExpertGradients<T>&);
IVL_WIDENED_TYPES(IVL_INSTANTIATE)

}  // namespace ivl
