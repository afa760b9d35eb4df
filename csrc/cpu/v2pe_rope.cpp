#include "ivl/v2pe_rope.h"

#define IVL_KERNELS "ivl/v2pe_rope_kernels.h"
#include "ivl/foreach_isa.h"

namespace ivl {

template <class T>
void v2pe_rope(const RopeArgs& args) {
  IVL_CALL(rope<T>, args);
}

template <class T>
void v2pe_rope_norm_backward(const RopeArgs& args) {
  IVL_CALL(rope_norm_backward<T>, args);
}

#define IVL_INSTANTIATE(T) \
  template void v2pe_rope<T>(const RopeArgs&); \
  template void v2pe_rope_norm_backward<T>(const RopeArgs&);
IVL_FLOAT_TYPES(IVL_INSTANTIATE)

void v2pe_positions(const PositionArgs& args) { IVL_CALL(positions, args); }

}  // namespace ivl
