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

template void tile_image<float>(const TileImageArgs&);
template void tile_image<bfloat16>(const TileImageArgs&);
template void tile_image<float16>(const TileImageArgs&);

}  // namespace ivl
