// The MLP of a transformer layer: Linear, GELU, Linear; or down(silu(gate(x)) * up(x)).
#pragma once

#include <cstdint>

#include "ivl/types.h"

namespace ivl {

// out [rows, outputs] of x [rows, width]; float32 inside. Rows of the weights are contiguous and one after the other.
// T: float, bfloat16, float16.
template <class T>
struct Mlp {
  int64_t rows, width, inner, outputs;
  const T* x;
  int64_t x_stride;
  const T* gate;  // [inner, width], or null: GELU of the up projection
  const T* up;    // [inner, width]
  const T* up_bias;  // [inner] or null; null with a gate
  const T* down;     // [outputs, inner]
  const T* down_bias;
  T* out;
  T* pre;  // null, or what the activation gets: [rows, inner], with a gate [rows, 2 * inner], gates before ups
};
template <class T>
void mlp(const Mlp<T>& call);

// Of down's input `active` [rows, inner]: itself, and the gradient of `pre` [rows, 2 * inner] given its own, `grad`.
template <class T>
void gated_backward(const T* pre, const T* grad, int64_t rows, int64_t inner, T* active, T* dpre);

}  // namespace ivl
