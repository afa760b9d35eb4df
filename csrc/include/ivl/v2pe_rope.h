// Rotary embedding of q and k together, with angles from positions or given cos/sin, and optional per-head RMSNorm;
// V2PE positions from token ids. Strides count elements.
#pragma once

#include <cstdint>

namespace ivl {

struct RopeStrides {
  int64_t batch, head, token;  // elements of a head's row are adjacent
};

// The q or the k side. For the backward with a norm, `in` is the gradient and `x` the forward's input.
struct RopeSide {
  const void* in;
  const void* x;
  void* out;
  const void* weight;  // of the RMSNorm, [head_dim], or null
  void* grad_weight;   // [head_dim] float32 (float64 when T is), backward only
  int64_t heads;
  RopeStrides in_strides, x_strides, out_strides;
};

enum class RopeTable { none, float32, same };  // none: angles from positions; same: cos/sin in the type of q

struct RopeArgs {
  int64_t batch, tokens, head_dim, rotary_dim;
  RopeSide q, k;
  RopeTable table;
  const void *first, *second;           // positions and inverse frequencies (float32), or cos and sin
  int64_t angle_batch, angle_token;     // strides of positions, or of cos and sin
  double scale, eps;                    // scale: factor on cos and sin that are computed here
  bool round;                           // every result in the type of q, as transformers computes; else float32 inside
  bool inverse;                         // rotate back
};

template <class T>
void v2pe_rope(const RopeArgs& args);
template <class T>
void v2pe_rope_norm_backward(const RopeArgs& args);  // gradients of q and k, and of both weights

struct PositionArgs {
  int64_t batch, tokens;
  const int64_t* ids;
  int64_t ids_stride;           // of the batch dimension; tokens are adjacent
  const bool* mask;             // [batch, tokens] contiguous, or null
  const int64_t* cu_seqlens;    // [segments + 1] over batch * tokens, or null
  int64_t segments;
  int64_t token_id;
  const double* deltas;         // [delta_count]: one for all, one a row or one an image
  int64_t delta_count;
  bool delta_per_row;
  const bool* compress;         // [tiles], or null
  int64_t tiles, tile_tokens, compressed_tokens, compressed_units;
  float* out;                   // [batch, tokens] contiguous
  double* info;                 // [5]: images, visual tokens, tiles used (-1: they do not fit the runs), first image
                                // whose steps float32 cannot hold (-1: none), the position where that one ends
};

void v2pe_positions(const PositionArgs& args);

}  // namespace ivl
