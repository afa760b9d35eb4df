// Attention of packed or batched sequences with grouped queries. Strides count elements; a head's row is adjacent.
#pragma once

#include <cstdint>

namespace ivl {

constexpr int64_t kMaxHeadDim = 256;

struct AttentionSide {
  const void* data;
  int64_t batch, token, head;  // strides
};

struct AttentionArgs {
  int64_t batch, q_tokens, k_tokens, q_heads, kv_heads, dim;
  const int64_t *q_offsets, *k_offsets;  // [sequences + 1] when packed, batch is 1 then; null: batch rows are sequences
  int64_t sequences;
  AttentionSide q, k, v;
  const float* sinks;  // [q_heads], or null
  double scale;
  bool causal;     // the last query sees the last key
  int64_t window;  // keys that a query sees, its own included; 0: no limit
};

// out [batch, q_tokens, q_heads, dim], lse [q_heads, batch * q_tokens]
template <class T>
void attention(const AttentionArgs& args, T* out, float* lse);

struct AttentionGrads {
  AttentionSide grad;  // of out
  const void* out;
  const float* lse;
  void *dq, *dk, *dv;  // contiguous [batch, tokens, heads, dim]
  float* dsinks;       // [q_heads]; null when there are no sinks
};

template <class T>
void attention_backward(const AttentionArgs& args, const AttentionGrads& grads);

}  // namespace ivl
