#include "ivl/moe_experts.h"

#define IVL_KERNELS "ivl/moe_experts_backward_kernels.h"
#include "ivl/foreach_isa.h"

namespace ivl {

template <class T>
void experts_forward(ExpertShape shape, GatedActivation options, const T* hidden, const float* weights,
                     const int32_t* permutation, const int32_t* offsets, const ExpertWeights<T>& experts, T* out,
                     T* pre) {
  clear_unused(shape, offsets, pre);
  IVL_CALL(forward, shape, options, hidden, weights, permutation, offsets, experts, out, pre);
}

template <class T>
void experts_backward(ExpertShape shape, GatedActivation options, const T* grad, const T* hidden, const float* weights,
                      const int32_t* permutation, const int32_t* inverse, const int32_t* offsets,
                      const ExpertWeights<T>& experts, const T* pre, ExpertGradients<T> gradients) {
  IVL_CALL(backward, shape, options, grad, hidden, weights, permutation, inverse, offsets, experts, pre, gradients);
}

#define IVL_INSTANTIATE(T)                                                                                         \
  template void experts_forward(ExpertShape, GatedActivation, const T*, const float*, const int32_t*, const int32_t*, \
                                const ExpertWeights<T>&, T*, T*);                                                   \
  template void experts_backward(ExpertShape, GatedActivation, const T*, const T*, const float*, const int32_t*,      \
                                 const int32_t*, const int32_t*, const ExpertWeights<T>&, const T*, ExpertGradients<T>);
IVL_INSTANTIATE(float)
IVL_INSTANTIATE(bfloat16)
IVL_INSTANTIATE(float16)

}  // namespace ivl
