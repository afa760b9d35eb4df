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

#define IVL_INSTANTIATE(T, W)                                \
  template void linear_kl<Elements<T, W>>(const KlArgs&); \
  template void linear_kl_backward<Elements<T, W>>(const KlBackwardArgs&);
#define IVL_SAME(T) IVL_INSTANTIATE(T, T)
#define IVL_WIDE_WEIGHT(T) IVL_INSTANTIATE(T, float)
IVL_WIDENED_TYPES(IVL_SAME)
IVL_NARROW_TYPES(IVL_WIDE_WEIGHT)

}  // namespace ivl
