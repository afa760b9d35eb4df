// The divergence of a head's distribution from a teacher's, KL(teacher || student), and its gradients.
#pragma once

#include <cstdint>

#include "ivl/linear_logprob.h"

namespace ivl {

// Both heads have as many rows and words; widths may differ.
struct KlArgs {
  Head student, teacher;
  float *kl, *lse, *teacher_lse;  // [rows]
};

struct KlBackwardArgs {
  Head student, teacher;
  const float *lse, *teacher_lse, *grad;  // [rows]
  const float *kept, *teacher_kept;       // logits of both, or null
  float* kl;                              // [rows], with logits only; null: not wanted
  HeadGradients gradients;                // of the student
};

// E: of both heads.
template <class E>
void linear_kl(const KlArgs& args);
template <class E>
void linear_kl_backward(const KlBackwardArgs& args);

}  // namespace ivl
