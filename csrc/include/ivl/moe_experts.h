// Mixture-of-experts feed-forward on the CPU.
#pragma once

#include <cstdint>
#include <cstring>

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

// Experts in few bits: rows of gate_up [E, 2I, H] and of down [E, H, I] are contiguous, whichever the order of gate_up's:
// gates first, or interleaved g0, u0, g1, ... H and I are multiples of 32. MXFP4: two values a byte, scales uint8
// [E, rows, columns / 32]. FP8: E4M3, scales float32 [E, ceil(rows / 128), ceil(columns / 128)].
enum class BlockFormat { mxfp4, fp8 };
template <class T>
struct BlockExperts {
  BlockFormat format;
  const uint8_t* gate_up;
  const uint8_t* down;
  const void* gate_up_scales;
  const void* down_scales;
  bool interleaved;
  const T* gate_up_bias;  // [E, 2I] in the order of the rows, or null
  const T* down_bias;     // [E, H] or null
};

struct ExpertShape {
  int64_t tokens, top_k, width, inner, experts;  // S, k, H, I, E
};

template <class T, class A = T, class Experts = ExpertWeights<T>>
struct ExpertsArgs {
  ExpertShape shape;
  GatedActivation activation;
  const A* hidden;                                 // [S, H]
  const float* weights;                            // [S * k]
  const int32_t *permutation, *inverse, *offsets;  // sort the slots by expert: [S * k] twice and [E + 1]
  Experts experts;

  template <class B>
  ExpertsArgs<T, B, Experts> with_hidden(const B* other) const {
    return {shape, activation, other, weights, permutation, inverse, offsets, experts};
  }
  template <class Others>
  ExpertsArgs<T, A, Others> with_experts(const Others& others) const {
    return {shape, activation, hidden, weights, permutation, inverse, offsets, others};
  }
};
template <class T>
using BlockArgs = ExpertsArgs<T, T, BlockExperts<T>>;

// Zeros for the slots without an expert in `pre` [S * k, 2I], which may be null.
template <class T>
void clear_unused(const ExpertShape& shape, const int32_t* offsets, T* pre) {
  if (pre == nullptr) return;
  const int64_t used = offsets[shape.experts], all = shape.tokens * shape.top_k;
  std::memset(static_cast<void*>(pre + used * 2 * shape.inner), 0, (all - used) * 2 * shape.inner * sizeof(T));
}

// out [S, H] = sum over k of weight * expert(hidden); `inverse` is not used. `pre` [S * k, 2I], when not null, gets what
// goes into the activation (zero for slots without an expert).
template <class T>
void experts_forward(const ExpertsArgs<T>& args, T* out, T* pre);
template <class T>
void experts_forward(const BlockArgs<T>& args, T* out, T* pre);

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
// Weights in few bits get no gradients: `gate`, `up` and `down` are null.
template <class T>
void experts_backward(const BlockArgs<T>& args, const T* grad, const T* pre, const ExpertGradients<T>& gradients);

}  // namespace ivl
