#include "ivl/moe_experts.h"

#define IVL_KERNELS "ivl/moe_experts_backward_kernels.h"
#include "ivl/foreach_isa.h"

namespace ivl {

template <class T>
void experts_forward(const ExpertsArgs<T>& args, T* out, T* pre) {
  if (pre != nullptr) {
    const ExpertShape& shape = args.shape;
    const int64_t used = args.offsets[shape.experts], all = shape.tokens * shape.top_k;
    std::memset(static_cast<void*>(pre + used * 2 * shape.inner), 0, (all - used) * 2 * shape.inner * sizeof(T));
  }
  IVL_CALL(forward, args, out, pre);
}

template <class T>
void experts_backward(const ExpertsArgs<T>& args, const T* grad, const T* pre, const ExpertGradients<T>& gradients) {
  IVL_CALL(backward, args, grad, pre, gradients);
}

#define IVL_INSTANTIATE(T)                                         \
  template void experts_forward(const ExpertsArgs<T>&, T*, T*);     \
  template void experts_backward(const ExpertsArgs<T>&, const T*, const T*, const ExpertGradients<T>&);
IVL_INSTANTIATE(float)
IVL_INSTANTIATE(bfloat16)
IVL_INSTANTIATE(float16)

}  // namespace ivl
