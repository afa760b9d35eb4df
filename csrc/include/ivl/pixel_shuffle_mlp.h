// The projector: pixel shuffle + LayerNorm + (Linear, GELU)* + Linear, and the passes of its backward.
#pragma once

#include <cstdint>

#include "ivl/types.h"

namespace ivl {

// Tokens of the vision transformer, [tiles, skip + height * width, channels]; strides in elements, channels contiguous.
// Shuffled row m of a tile is the merge x merge patches around grid cell m, patch rows first.
template <class T>
struct ShuffledTokens {
  T* x;
  int64_t tile_stride, token_stride, channels, merge, height, width, skip;
  bool transposed;       // order v1: cells column by column
  const int64_t* tiles;  // which tiles, or null for all

  int64_t cells() const { return (height / merge) * (width / merge); }
  int64_t columns() const { return channels * merge * merge; }

  // The channels of patch q of shuffled row `row` (over all selected tiles).
  T* piece(int64_t row, int64_t q) const {
    const int64_t tile = row / cells(), cell = row % cells();
    const int64_t rows = height / merge, columns = width / merge;
    const int64_t i = transposed ? cell % rows : cell / columns, j = transposed ? cell / rows : cell % columns;
    const int64_t token = skip + (i * merge + q / merge) * width + j * merge + q % merge;
    return x + (tiles ? tiles[tile] : tile) * tile_stride + token * token_stride;
  }
};

// Where the rows of a result go: row m to tile m / tile_rows, at starts[tile] + m % tile_rows; null starts: row m.
template <class T>
struct RowMap {
  T* data;
  int64_t row_stride, tile_rows;
  const int64_t* starts;

  T* row(int64_t m) const {
    return data + (starts ? starts[m / tile_rows] + m % tile_rows : m) * row_stride;
  }
};

template <class T>
struct LinearLayer {
  const T* weight;  // [outputs, inputs], rows weight_stride apart
  int64_t outputs, inputs, weight_stride;
  const T* bias;
};

// Rows [first, first + count): out = LayerNorm(shuffled rows). T: float, bfloat16, float16, double.
template <class T>
void shuffle_norm(ShuffledTokens<const T> tokens, int64_t first, int64_t count, const T* weight, const T* bias,
                  double eps, T* out);

// Given the gradient [count, columns] of those rows: dx rows (null: skip), and the sums over rows for weight and bias,
// [2, columns], added to `sums` (null: skip).
template <class T>
void shuffle_norm_backward(ShuffledTokens<const T> tokens, int64_t first, int64_t count, const T* weight, double eps,
                           const T* grad, ShuffledTokens<T> dx, Sum<T>* sums);

// activated (null: skip; may be `pre`) = gelu(pre); grad (null: skip) *= gelu'(pre), in place; dbias (null: skip) +=
// its column sums.
template <class T>
void gelu_backward(const T* pre, int64_t pre_stride, int64_t rows, int64_t columns, T* activated,
                   int64_t activated_stride, T* grad, Sum<T>* dbias);

// The whole forward by our own matrix product, float32 inside. T: float, bfloat16, float16.
template <class T>
void project(ShuffledTokens<const T> tokens, int64_t rows, const T* norm_weight, const T* norm_bias, double eps,
             const LinearLayer<T>* layers, int64_t layer_count, RowMap<T> out, T* pre, int64_t pre_stride);

}  // namespace ivl
