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

template void v2pe_rope<float>(const RopeArgs&);
template void v2pe_rope<double>(const RopeArgs&);
template void v2pe_rope<bfloat16>(const RopeArgs&);
template void v2pe_rope<float16>(const RopeArgs&);
template void v2pe_rope_norm_backward<float>(const RopeArgs&);
template void v2pe_rope_norm_backward<double>(const RopeArgs&);
template void v2pe_rope_norm_backward<bfloat16>(const RopeArgs&);
template void v2pe_rope_norm_backward<float16>(const RopeArgs&);

void v2pe_positions(const PositionArgs& args) { IVL_CALL(positions, args); }

}  // namespace ivl
