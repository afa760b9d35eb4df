// Activations and their slopes, in float32 (the exponential and GELU in float64 too).

namespace ivl::IVL_NAMESPACE {
namespace {

// e^x for x <= 0, to one unit in the last place; 0 below -87.
inline vf exp_negative(vf x) {
  const vf low = splat(-87.0f);
  const vi under = x < low;
  x = under ? low : x;
  const vf magic = splat(12582912.0f);  // adding 1.5 * 2^23 rounds to an integer
  const vf shifted = fma(x, splat(1.44269504f), magic);
  const vf n = shifted - magic;
  vf r = fma(n, splat(-0.693359375f), x);
  r = fma(n, splat(2.12194440e-4f), r);
  vf y = splat(1.0f / 5040);
  y = fma(y, r, splat(1.0f / 720));
  y = fma(y, r, splat(1.0f / 120));
  y = fma(y, r, splat(1.0f / 24));
  y = fma(y, r, splat(1.0f / 6));
  y = fma(y, r, splat(0.5f));
  y = fma(y, r, splat(1.0f));
  y = fma(y, r, splat(1.0f));
  const vf scale = (vf)(((vi)shifted - (vi)magic + 127) << 23);
  return under ? vf{} : y * scale;
}

// The same with fewer steps: below -87 it is about the smallest normal number.
inline Vec<float> exp_negative_fast(Vec<float> x) {
  x = x < -87.0f ? Vec<float>{} - 87.0f : x;
  const Vec<float> round = Vec<float>{} + 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const Vec<float> n = (x * 1.44269504f + round) - round;
  const Vec<float> r = fma(n, Vec<float>{} + 1.42860677e-6f, fma(n, Vec<float>{} - 0.693148613f, x));
  Vec<float> y = Vec<float>{} + 1.98756915e-4f;
  y = fma(y, r, Vec<float>{} + 1.39819995e-3f);
  y = fma(y, r, Vec<float>{} + 8.33345192e-3f);
  y = fma(y, r, Vec<float>{} + 4.16657962e-2f);
  y = fma(y, r, Vec<float>{} + 1.66666657e-1f);
  y = fma(y, r, Vec<float>{} + 0.5f);
  y = fma(y * r, r, r + 1.0f);
  const auto scale = (__builtin_convertvector(n, Vec<int32_t>) + 127) << 23;
  return y * (Vec<float>)scale;
}
inline Vec<double> exp_negative_fast(Vec<double> x) {
  for (int i = 0; i < lanes<double>; ++i) x[i] = std::exp(x[i]);
  return x;
}

// The normal distribution function P(X <= x) and, when wanted, its density. With t = 1 / (1 + c |x|) the tail
// is exp(-x^2 / 2) t P(t); the coefficients are a Chebyshev fit over |x| <= 13, relative error 1.2e-8.
inline vf normal(vf x, vf& gauss) {
  constexpr float kFit[] = {0.09874896758511983f,  0.0984367637398324f,   0.09501550232248147f, 0.07076660191517882f,
                            0.08664280726701196f,  0.01866556388020921f,  0.015473559367170167f, 0.06908906480809172f,
                            -0.07038876359879534f, 0.017549934593967354f};
  const vi negative = x < vf{};
  const vf size = negative ? -x : x;
  const vf t = splat(1.0f) / fma(size, splat(0.2474873734152916f), splat(1.0f));
  vf p = splat(kFit[9]);
#pragma GCC unroll 9
  for (int i = 8; i >= 0; --i) p = fma(p, t, splat(kFit[i]));
  gauss = exp_negative(splat(-0.5f) * x * x);
  const vf tail = p * t * gauss;
  return negative ? tail : splat(1.0f) - tail;
}

inline vf gelu(vf x) {
  vf gauss;
  const vf y = x * normal(x, gauss);
  const vi low = x < splat(-14.0f);  // and no NaN from -inf * 0
  return low ? vf{} : y;
}

inline vf gelu_slope(vf x) {
  vf gauss;
  const vf area = normal(x, gauss);
  const vi far = (x < splat(-14.0f)) | (x > splat(14.0f));
  return far ? area : fma(x * gauss, splat(0.39894228f), area);
}

inline double gelu(double x) { return 0.5 * x * (1 + std::erf(x * 0.70710678118654752440)); }
inline double gelu_slope(double x) {
  return 0.5 * (1 + std::erf(x * 0.70710678118654752440)) + x * std::exp(-0.5 * x * x) * 0.39894228040143267794;
}

inline vf sigmoid(vf x) {
  const vi negative = x < vf{};
  const vf e = exp_negative(negative ? x : -x);
  const vf positive = splat(1.0f) / (splat(1.0f) + e);
  return negative ? e * positive : positive;
}

inline vf gated(vf gate, vf up, const GatedActivation& options) {
  if (options.kind == Gating::silu) return gate * sigmoid(gate) * up;
  const vf limit = splat(options.limit);
  gate = gate > limit ? limit : gate;
  up = up > limit ? limit : up < -limit ? -limit : up;
  return gate * sigmoid(splat(options.alpha) * gate) * (up + splat(1.0f));
}

struct GateGradient {
  vf active, gate, up;  // d active / d gate, d active / d up
};

inline GateGradient gate_gradient(vf gate, vf up, const GatedActivation& options) {
  const vf one = splat(1.0f);
  if (options.kind == Gating::silu) {
    const vf s = sigmoid(gate), silu = gate * s;
    return {silu * up, up * s * (one + gate * (one - s)), silu};
  }
  const vf limit = splat(options.limit), alpha = splat(options.alpha);
  const vi inside_gate = gate <= limit, inside_up = (up <= limit) & (up >= -limit);
  gate = gate > limit ? limit : gate;
  up = up > limit ? limit : up < -limit ? -limit : up;
  const vf s = sigmoid(alpha * gate), glu = gate * s;
  const vf by_gate = (up + one) * s * (one + alpha * gate * (one - s));
  return {glu * (up + one), inside_gate ? by_gate : vf{}, inside_up ? glu : vf{}};
}

}  // namespace
}  // namespace ivl::IVL_NAMESPACE
