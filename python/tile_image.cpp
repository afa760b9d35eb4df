#include "ivl/tile_image.h"

#include "tensor.h"

namespace ivl {
namespace {

void tile(Tensor photos, Tensor scale, Tensor shift, int64_t columns, int64_t rows, int64_t tile, bool thumbnail,
          Tensor out) {
  TileImageArgs args = {};
  args.photos = in<uint8_t>(photos);
  args.frames = photos.size(0);
  args.height = photos.size(1);
  args.width = photos.size(2);
  args.frame_stride = photos.stride(0);
  args.row_stride = photos.stride(1);
  args.columns = columns;
  args.rows = rows;
  args.tile = tile;
  args.thumbnail = thumbnail;
  args.scale = in<float>(scale);
  args.shift = in<float>(shift);
  args.out = ivl::out<void>(out);
  dispatch_widened(out.scalar_type(), [&](auto zero) { tile_image<decltype(zero)>(args); });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ivl_native, m) {
  m.def(
      "tile_image(Tensor photos, Tensor scale, Tensor shift, int columns, int rows, int tile, bool thumbnail, "
      "Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(ivl_native, CPU, m) { m.impl("tile_image", TORCH_BOX(&tile)); }

}  // namespace ivl
