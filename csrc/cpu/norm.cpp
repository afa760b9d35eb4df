#include "ivl/norm.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#if defined(__x86_64__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

#include "ivl/parallel.h"
#include "ivl/scratch.h"
#include "ivl/types.h"

#define IVL_KERNELS "ivl/norm_kernels.h"
#include "ivl/foreach_isa.h"

namespace ivl {

template <class T>
void norm(const NormArgs& args) {
  IVL_CALL(norm<T>, args);
}

template <class T>
void norm_backward(const NormBackwardArgs& args) {
  IVL_CALL(norm_backward<T>, args);
}

#define IVL_INSTANTIATE(T) \
  template void norm<T>(const NormArgs&); \
  template void norm_backward<T>(const NormBackwardArgs&);
IVL_WIDENED_TYPES(IVL_INSTANTIATE)

}  // namespace ivl
