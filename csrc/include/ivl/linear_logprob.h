// Log-probabilities of a language model's head and their gradients, by tiles of the vocabulary.
#pragma once

#include <cstdint>

namespace ivl {

// Logits [rows, vocabulary] = transform(x weight^T + bias); x and weight have rows of `width` adjacent elements.
struct Head {
  int64_t rows, width, vocabulary;
  const void* x;
  int64_t x_stride;
  const void* weight;
  int64_t weight_stride;
  const float* bias;  // null: none
  float softcap;      // softcap * tanh(logit / softcap); 0: none
  float inverse_temperature;
};

// Where gradients go; null: not wanted. `accumulate`: those of weight and bias are added to (a weight of float).
struct HeadGradients {
  void *x, *weight;  // contiguous, in the types of x and weight
  float* bias;       // [vocabulary]
  bool accumulate;
};

// Elements of x (float, bfloat16 or float16) and of the weight (the same, or float).
template <class X_, class Weight_>
struct Elements {
  using X = X_;
  using Weight = Weight_;
};

struct LogprobArgs {
  Head head;
  const int64_t* targets;                      // [rows]
  float *logp, *lse, *entropy, *mean, *kept;  // [rows]; kept: the logits, or null
};

struct LogprobBackwardArgs {
  Head head;
  const int64_t* targets;
  const float *logp, *lse, *entropy, *kept;                    // of the forward; kept may be null
  const float *grad_logp, *grad_lse, *grad_entropy, *grad_mean;  // [rows]
  HeadGradients gradients;
};

template <class E>
void linear_logprob(const LogprobArgs& args);
template <class E>
void linear_logprob_backward(const LogprobBackwardArgs& args);

}  // namespace ivl
