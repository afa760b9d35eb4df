#include "ivl/linear_logprob.h"

#define IVL_KERNELS "ivl/linear_logprob_kernels.h"
#include "ivl/foreach_isa.h"

namespace ivl {

template <class E>
void linear_logprob(const LogprobArgs& args) {
  if (args.head.rows > 0) IVL_CALL(linear_logprob<E>, args);
}

template <class E>
void linear_logprob_backward(const LogprobBackwardArgs& args) {
  if (args.head.rows > 0) IVL_CALL(linear_logprob_backward<E>, args);
}

#define IVL_INSTANTIATE(T, W)                                \
  template void linear_logprob<Elements<T, W>>(const LogprobArgs&); \
  template void linear_logprob_backward<Elements<T, W>>(const LogprobBackwardArgs&);
#define IVL_SAME(T) IVL_INSTANTIATE(T, T)
#define IVL_WIDE_WEIGHT(T) IVL_INSTANTIATE(T, float)
IVL_WIDENED_TYPES(IVL_SAME)
IVL_NARROW_TYPES(IVL_WIDE_WEIGHT)

}  // namespace ivl
