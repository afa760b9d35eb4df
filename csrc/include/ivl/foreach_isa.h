// Compiles the header named by IVL_KERNELS once for every instruction set this binary supports, in the namespaces
// ivl::portable, ivl::avx2 and ivl::avx512. IVL_CALL(f, ...) then calls the best one the processor can run.
// Inside, only the kernels may be compiled: other headers that they need are included here or by the .cpp before this.
#ifndef IVL_KERNELS
#error "define IVL_KERNELS as the header of the kernels"
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#if defined(__x86_64__) && defined(__GNUC__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12, about its own intrinsics
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

#include "ivl/convert.h"
#include "ivl/gating.h"
#include "ivl/gemm.h"
#include "ivl/isa.h"
#include "ivl/parallel.h"
#include "ivl/scratch.h"
#include "ivl/types.h"

#define IVL_NAMESPACE portable
#define IVL_VECTOR_BYTES 16
#include "ivl/vec.h"
#include IVL_KERNELS
#undef IVL_NAMESPACE
#undef IVL_VECTOR_BYTES

#if defined(__x86_64__) && defined(__GNUC__)
#define IVL_NAMESPACE avx2
#define IVL_VECTOR_BYTES 32
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi,bmi2")
#include "ivl/vec.h"
#include IVL_KERNELS
#pragma GCC pop_options
#undef IVL_NAMESPACE
#undef IVL_VECTOR_BYTES

#define IVL_NAMESPACE avx512
#define IVL_VECTOR_BYTES 64
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi,bmi2,prefer-vector-width=512")
#include "ivl/vec.h"
#include IVL_KERNELS
#pragma GCC pop_options
#undef IVL_NAMESPACE
#undef IVL_VECTOR_BYTES

#define IVL_CALL(function, ...)                                            \
  (::ivl::isa() == ::ivl::Isa::avx512 ? ::ivl::avx512::function(__VA_ARGS__) \
   : ::ivl::isa() == ::ivl::Isa::avx2 ? ::ivl::avx2::function(__VA_ARGS__)   \
                                      : ::ivl::portable::function(__VA_ARGS__))
#else
#define IVL_CALL(function, ...) ::ivl::portable::function(__VA_ARGS__)
#endif
