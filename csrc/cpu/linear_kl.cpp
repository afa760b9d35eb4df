#include "ivl/linear_kl.h"

#define IVL_KERNELS "ivl/linear_kl_kernels.h"
#include "ivl/foreach_isa.h"

namespace ivl {

template <class E>
void linear_kl(const KlArgs& args) {
  if (args.student.rows > 0) IVL_CALL(linear_kl<E>, args);
}

template <class E>
void linear_kl_backward(const KlBackwardArgs& args) {
  if (args.student.rows > 0) IVL_CALL(linear_kl_backward<E>, args);
}

template void linear_kl<Elements<float, float>>(const KlArgs&);
template void linear_kl<Elements<bfloat16, bfloat16>>(const KlArgs&);
template void linear_kl<Elements<bfloat16, float>>(const KlArgs&);
template void linear_kl<Elements<float16, float16>>(const KlArgs&);
template void linear_kl<Elements<float16, float>>(const KlArgs&);
template void linear_kl_backward<Elements<float, float>>(const KlBackwardArgs&);
template void linear_kl_backward<Elements<bfloat16, bfloat16>>(const KlBackwardArgs&);
template void linear_kl_backward<Elements<bfloat16, float>>(const KlBackwardArgs&);
template void linear_kl_backward<Elements<float16, float16>>(const KlBackwardArgs&);
template void linear_kl_backward<Elements<float16, float>>(const KlBackwardArgs&);

}  // namespace ivl
