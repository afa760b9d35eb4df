#include "ivl/attention.h"

#include <atomic>
#include <utility>

#define IVL_KERNELS "ivl/attention_backward_kernels.h"
#include "ivl/foreach_isa.h"

namespace ivl {

template <class T>
void attention(const AttentionArgs& args, T* out, float* lse) {
  IVL_CALL(attention<T>, args, out, lse);
}

template <class T>
void attention_backward(const AttentionArgs& args, const AttentionGrads& grads) {
  IVL_CALL(attention_backward<T>, args, grads);
}

#define IVL_INSTANTIATE(T) \
  template void attention<T>(const AttentionArgs&, T*, float*); \
  template void attention_backward<T>(const AttentionArgs&, const AttentionGrads&);
IVL_WIDENED_TYPES(IVL_INSTANTIATE)

}  // namespace ivl
