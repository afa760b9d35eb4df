#include "ivl/tile_image.h"

#include "tensor.h"

namespace ivl {
namespace {

void tile(Tensor photos, Tensor scale, Tensor shift, int64_t columns, int64_t rows, bool thumbnail, Tensor& result) {
  TileImageArgs args = {};
  args.photos = in<uint8_t>(photos);
  args.frames = photos.size(0);
  args.height = photos.size(1);
  args.width = photos.size(2);
  args.frame_stride = photos.stride(0);
  args.row_stride = photos.stride(1);
  args.columns = columns;
  args.rows = rows;
  args.tile = result.size(3);
  args.thumbnail = thumbnail;
  args.scale = in<float>(scale);
  args.shift = in<float>(shift);
  args.out = out<void>(result);
  dispatch_widened(result.scalar_type(), [&](auto zero) { tile_image<decltype(zero)>(args); });
}

}  // namespace

IVL_OPERATOR(tile_image_, tile)

}  // namespace ivl
