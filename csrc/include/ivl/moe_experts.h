// Mixture-of-experts feed-forward on the CPU.
#pragma once

#include <cstdint>

#include "ivl/gating.h"
#include "ivl/types.h"

namespace ivl {

// Expert e's matrices. Rows layout: gate[e] and up[e] [I, H], down[e] [H, I], rows contiguous. Interleaved: gate[e]
// [H, 2I] with columns g0, u0, g1, ...; up is not used; down[e] [I, H].
template <class T>
struct ExpertWeights {
  const T* const* gate;
  const T* const* up;
  const T* const* down;
  bool interleaved;
  const T* gate_up_bias;  // [E, 2I] or null
  const T* down_bias;     // [E, H] or null
};

struct ExpertShape {
  int64_t tokens, top_k, width, inner, experts;  // S, k, H, I, E
};

template <class T, class A = T>
struct ExpertsArgs {
  ExpertShape shape;
  GatedActivation activation;
  const A* hidden;                                 // [S, H]
  const float* weights;                            // [S * k]
  const int32_t *permutation, *inverse, *offsets;  // sort the slots by expert: [S * k] twice and [E + 1]
  ExpertWeights<T> experts;

  template <class B>
  ExpertsArgs<T, B> with_hidden(const B* other) const {
    return {shape, activation, other, weights, permutation, inverse, offsets, experts};
  }
};

// out [S, H] = sum over k of weight * expert(hidden); `inverse` is not used. `pre` [S * k, 2I], when not null, gets what
// goes into the activation (zero for slots without an expert).
template <class T>
void experts_forward(const ExpertsArgs<T>& args, T* out, T* pre);

// Null pointers are gradients that are not needed. gate, up and down as in ExpertWeights.
template <class T>
struct ExpertGradients {
  T* hidden;       // [S, H]
  float* weights;  // [S * k]
  T* const* gate;  // by expert
  T* const* up;
  T* const* down;
  T* gate_up_bias;
  T* down_bias;
};

template <class T>
void experts_backward(const ExpertsArgs<T>& args, const T* grad, const T* pre, const ExpertGradients<T>& gradients);

}  // namespace ivl
