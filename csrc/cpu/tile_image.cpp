#include "ivl/tile_image.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>
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

#define IVL_KERNELS "ivl/tile_image_kernels.h"
#include "ivl/foreach_isa.h"

namespace ivl {

template <class T>
void tile_image(const TileImageArgs& args) {
  IVL_CALL(tile_image<T>, args);
}

#define IVL_INSTANTIATE(T) \
  template void tile_image<T>(const TileImageArgs&);
IVL_WIDENED_TYPES(IVL_INSTANTIATE)

}  // namespace ivl
