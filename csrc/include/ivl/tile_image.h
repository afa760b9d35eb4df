// Photographs to normalised tiles: bicubic with antialias as Pillow computes it, cut, thumbnail, normalised.
#pragma once

#include <cstdint>

namespace ivl {

struct TileImageArgs {
  const uint8_t* photos;  // [frames, height, width, 3]; a row's pixels are adjacent
  int64_t frames, height, width;
  int64_t frame_stride, row_stride;  // bytes
  int64_t columns, rows, tile;
  bool thumbnail;            // a tile of the whole photograph after the others
  const float *scale, *shift;  // [3]: out = level * scale + shift
  void* out;                 // [frames, columns * rows + thumbnail, 3, tile, tile]
};

template <class T>
void tile_image(const TileImageArgs& args);

}  // namespace ivl
