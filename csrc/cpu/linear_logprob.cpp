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

template void linear_logprob<Elements<float, float>>(const LogprobArgs&);
template void linear_logprob<Elements<bfloat16, bfloat16>>(const LogprobArgs&);
template void linear_logprob<Elements<bfloat16, float>>(const LogprobArgs&);
template void linear_logprob<Elements<float16, float16>>(const LogprobArgs&);
template void linear_logprob<Elements<float16, float>>(const LogprobArgs&);
template void linear_logprob_backward<Elements<float, float>>(const LogprobBackwardArgs&);
template void linear_logprob_backward<Elements<bfloat16, bfloat16>>(const LogprobBackwardArgs&);
template void linear_logprob_backward<Elements<bfloat16, float>>(const LogprobBackwardArgs&);
template void linear_logprob_backward<Elements<float16, float16>>(const LogprobBackwardArgs&);
template void linear_logprob_backward<Elements<float16, float>>(const LogprobBackwardArgs&);

}  // namespace ivl
