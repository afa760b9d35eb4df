// RMSNorm and LayerNorm of rows, after an optional residual connection with layer scale. Strides count elements.
#pragma once

#include <cstdint>

namespace ivl {

struct NormRows {
  const void* data;  // null: not given
  int64_t stride;    // of a row; its elements are adjacent
};

struct NormVector {
  const void* data;  // null: not given
  bool wide;         // float32, whatever the type of the rows
};

struct NormArgs {
  int64_t rows, width;
  NormRows x, residual;
  NormVector layer_scale, weight, bias;
  double eps;
  bool center;    // LayerNorm
  bool round;     // normalised values go through the type of the rows before the weight
  void *y, *sum;  // contiguous rows; sum = residual + layer_scale * x, or null
};

struct NormBackwardArgs {
  int64_t rows, width;
  NormRows grad, grad_sum, sum;  // sum: what was normalised
  NormRows x;                    // to layer scale's gradient, or null
  NormVector layer_scale, weight;
  double eps;
  bool center;
  void *ds, *dx;                    // contiguous rows; dx = layer_scale * ds, or null
  float *dscale, *dweight, *dbias;  // [width]; null: not wanted
};

template <class T>
void norm(const NormArgs& args);
template <class T>
void norm_backward(const NormBackwardArgs& args);

}  // namespace ivl
