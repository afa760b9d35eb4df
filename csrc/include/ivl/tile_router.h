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

// Tiles and their queries.
template <class T>
struct PoolArgs {
  Tiles<const T> z;
  const Sum<T>* u;               // [tiles or 1, heads, width]
  int64_t query_stride, heads;   // query_stride: from one tile's to the next
};

// pooled [tiles, heads, width]: softmax over the rows of z u times z; lse [tiles, heads] is the logarithm of the
// softmax's denominator.
template <class T>
void tile_pool(const PoolArgs<T>& args, Sum<T>* pooled, Sum<T>* lse);

// Gradients of it: du [tiles, heads, width], and dz when its data is not null.
template <class T>
void tile_pool_backward(const PoolArgs<T>& args, const Sum<T>* pooled, const Sum<T>* lse, const Sum<T>* grad,
                        Sum<T>* du, Tiles<T> dz);

// w [outputs, width], rows `stride` elements apart, in `groups` equal blocks; `rows` of x meet it.
template <class T>
struct GroupedWeights {
  const T* w;
  int64_t stride, rows, groups, outputs, width;
};

// out [rows, outputs] = x w^T + bias; block g multiplies x[:, g] of x [rows, groups, width]; bias may be null.
template <class T>
void few_rows_linear(const Sum<T>* x, const GroupedWeights<T>& weights, const T* bias, Sum<T>* out);

// out [rows, groups, width]: out[:, g] = x[:, g] w_g with x [rows, groups, outputs / groups].
template <class T>
void few_rows_linear_transposed(const Sum<T>* x, const GroupedWeights<T>& weights, Sum<T>* out);

}  // namespace ivl
