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

template void attention<float>(const AttentionArgs&, float*, float*);
template void attention<bfloat16>(const AttentionArgs&, bfloat16*, float*);
template void attention<float16>(const AttentionArgs&, float16*, float*);
template void attention_backward<float>(const AttentionArgs&, const AttentionGrads&);
template void attention_backward<bfloat16>(const AttentionArgs&, const AttentionGrads&);
template void attention_backward<float16>(const AttentionArgs&, const AttentionGrads&);

}  // namespace ivl
