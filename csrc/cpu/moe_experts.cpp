#include "ivl/moe_experts.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#if defined(__x86_64__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

#include "ivl/isa.h"
#include "ivl/parallel.h"
#include "ivl/scratch.h"

#define IVL_KERNELS "ivl/moe_experts_isa.h"
#include "ivl/foreach_isa.h"

namespace ivl {

template <class T>
void experts_forward(ExpertShape shape, ExpertOptions options, const T* hidden, const float* weights,
                     const int32_t* permutation, const int32_t* offsets, const ExpertWeights<T>& experts, T* out, T* pre) {
  if (pre != nullptr) {
    const int64_t used = offsets[shape.experts], all = shape.tokens * shape.top_k;
    std::memset(static_cast<void*>(pre + used * 2 * shape.inner), 0, (all - used) * 2 * shape.inner * sizeof(T));
  }
  IVL_CALL(forward, shape, options, hidden, weights, permutation, offsets, experts, out, pre);
}

template void experts_forward(ExpertShape, ExpertOptions, const float*, const float*, const int32_t*, const int32_t*,
                              const ExpertWeights<float>&, float*, float*);
template void experts_forward(ExpertShape, ExpertOptions, const bfloat16*, const float*, const int32_t*, const int32_t*,
                              const ExpertWeights<bfloat16>&, bfloat16*, bfloat16*);
template void experts_forward(ExpertShape, ExpertOptions, const float16*, const float*, const int32_t*, const int32_t*,
                              const ExpertWeights<float16>&, float16*, float16*);

}  // namespace ivl
