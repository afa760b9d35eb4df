// Mixture-of-experts routing on the CPU.
#pragma once

#include <cstdint>

#include "ivl/types.h"

namespace ivl {

// How router logits [S, E] (+ bias, rounded to T) become weights: a softmax over all experts or over the picked ones.
// Renormalising the former gives the latter's gradient.
struct RoutingOptions {
  int64_t tokens, experts, top_k;
  bool softmax_first, renormalize;
};

// ids [S, k] and weights [S, k], largest first, equal scores by ascending id. `bias` may be null.
template <class T>
void route(RoutingOptions options, const T* logits, const T* bias, int64_t* ids, T* weights);

// grad_logits [S, E] from grad [S, k].
template <class T>
void route_backward(RoutingOptions options, const T* grad, const T* logits, const T* bias, const int64_t* ids,
                    T* grad_logits);

// Stable sort of `slots` expert ids; ids outside [0, experts) go last. See Dispatch in ops/moe_routing.
void sort_by_expert(const int64_t* ids, int64_t slots, int64_t experts, int32_t* permutation, int32_t* inverse,
                    int32_t* counts, int32_t* offsets);

// tiles [slots / tile + experts, 2].
void list_tiles(const int32_t* offsets, int64_t experts, int64_t tile, int64_t tiles, int32_t* result);

}  // namespace ivl
