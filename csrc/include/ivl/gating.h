// The gated activations: silu is gate * sigmoid(gate) * up; gpt_oss is gate * sigmoid(alpha * gate) * (up + 1) with
// gate at most `limit` and up between -limit and limit.
#pragma once

namespace ivl {

enum class Gating { silu, gpt_oss };

struct GatedActivation {
  Gating kind;
  float alpha, limit;
};

}  // namespace ivl
