// The two kinds of work of the tile router: pooling a tile with 16 fixed queries in one pass, and matrix products with
// few rows, whose weights stream from memory once. Sums in Sum = float (double for double).
#pragma once

#include <cstdint>

#include "ivl/types.h"

namespace ivl {

// [tiles, rows, width] of T with any strides in elements but contiguous channels.
template <class T>
struct Tiles {
  T* data;
  int64_t tiles, rows, width, tile_stride, row_stride;

  T* row(int64_t t, int64_t n) const { return data + t * tile_stride + n * row_stride; }
};

// pooled [tiles, heads, width]: softmax over the rows of z u (u [tiles or 1, heads, width], one tile `query_stride`
// after the other) times z; lse [tiles, heads] is the logarithm of the softmax's denominator.
template <class T>
void tile_pool(Tiles<const T> z, const Sum<T>* u, int64_t query_stride, int64_t heads, Sum<T>* pooled, Sum<T>* lse);

// Gradients of it: du [tiles, heads, width], and dz when its data is not null.
template <class T>
void tile_pool_backward(Tiles<const T> z, const Sum<T>* u, int64_t query_stride, int64_t heads, const Sum<T>* pooled,
                        const Sum<T>* lse, const Sum<T>* grad, Sum<T>* du, Tiles<T> dz);

// out [rows, outputs] = x w^T + bias; w [outputs, width] in `groups` equal blocks, block g multiplies x[:, g] of
// x [rows, groups, width]. Rows of w are `stride` elements apart; bias may be null.
template <class T>
void few_rows_linear(const Sum<T>* x, const T* w, int64_t stride, const T* bias, int64_t rows, int64_t groups,
                     int64_t outputs, int64_t width, Sum<T>* out);

// out [rows, groups, width]: out[:, g] = x[:, g] w_g with x [rows, groups, inputs / groups] and w [inputs, width].
template <class T>
void few_rows_linear_transposed(const Sum<T>* x, const T* w, int64_t stride, int64_t rows, int64_t groups,
                                int64_t inputs, int64_t width, Sum<T>* out);

}  // namespace ivl
