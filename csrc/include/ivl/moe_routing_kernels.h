// Kernels of mixture-of-experts routing for one instruction set; see foreach_isa.h.
#include "ivl/activations.h"

namespace ivl::IVL_NAMESPACE {
namespace {

inline int64_t padded(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

// scores [padded(E)], the tail -infinity.
template <class T>
void read_scores(const T* logits, const T* bias, int64_t experts, float* scores) {
  for (int64_t j = 0; j < padded(experts); j += kLanes) {
    const int64_t n = std::min<int64_t>(kLanes, experts - j);
    vf x = load_some(logits + j, n);
    if (bias) {
      T sum[kLanes];
      store(sum, x + load_some(bias + j, n));
      x = load(sum);
    }
    store(scores + j, x);
  }
  for (int64_t j = experts; j < padded(experts); ++j) scores[j] = -__builtin_inff();
}

// In place; n is a multiple of kLanes.
inline void softmax(float* x, int64_t n) {
  vf top = load(x);
  for (int64_t j = kLanes; j < n; j += kLanes) {
    const vf v = load(x + j);
    top = v > top ? v : top;
  }
  float largest = top[0];
  for (int i = 1; i < kLanes; ++i) largest = std::max(largest, top[i]);
  vf total{};
  for (int64_t j = 0; j < n; j += kLanes) {
    const vf e = exp_negative(load(x + j) - splat(largest));
    store(x + j, e);
    total += e;
  }
  const vf sums = splat(sum(total));
  for (int64_t j = 0; j < n; j += kLanes) store(x + j, load(x + j) / sums);
}

// Integers in the order of the floats; NaN is the largest, as in torch.topk, and both zeros are equal.
inline vi ordered(vf x) {
  const vi bits = (vi)(x + vf{});
  const vi order = bits ^ ((bits >> 31) & INT_MAX);
  return x == x ? order : vi{} + INT_MAX;
}

template <class T>
void route(RoutingOptions o, const T* logits, const T* bias, int64_t* ids, T* weights) {
  parallel_for(o.tokens, 32, [&](int64_t begin, int64_t end) {
    const int64_t size = padded(o.experts);
    std::vector<float> scores(size), picked(padded(o.top_k));
    std::vector<int32_t> keys(size);
    for (int64_t t = begin; t < end; ++t) {
      read_scores(logits + t * o.experts, bias, o.experts, scores.data());
      if (o.softmax_first) softmax(scores.data(), size);
      for (int64_t j = 0; j < size; j += kLanes) {
        const vi key = ordered(load(scores.data() + j));
        std::memcpy(&keys[j], &key, sizeof key);
      }
      for (int64_t j = o.experts; j < size; ++j) keys[j] = INT_MIN;
      for (int64_t i = 0; i < o.top_k; ++i) {
        vi best = vi{} + INT_MIN, place{};
        for (int64_t j = 0; j < size; j += kLanes) {
          vi key;
          std::memcpy(&key, &keys[j], sizeof key);
          const vi better = key > best;
          best = better ? key : best;
          place = better ? vi{} + static_cast<int32_t>(j) : place;
        }
        int64_t winner = INT_MAX;
        int32_t top = INT_MIN;
        for (int lane = 0; lane < kLanes; ++lane) {
          const int64_t index = place[lane] + lane;
          if (best[lane] > top || (best[lane] == top && index < winner)) top = best[lane], winner = index;
        }
        keys[winner] = INT_MIN;
        ids[t * o.top_k + i] = winner;
        picked[i] = scores[winner];
      }
      if (!o.softmax_first) {
        for (int64_t i = o.top_k; i < padded(o.top_k); ++i) picked[i] = -__builtin_inff();
        softmax(picked.data(), padded(o.top_k));
      } else if (o.renormalize) {
        float total = 0;
        for (int64_t i = 0; i < o.top_k; ++i) total += picked[i];
        for (int64_t i = 0; i < o.top_k; ++i) picked[i] /= total;
      }
      for (int64_t i = 0; i < o.top_k; i += kLanes)
        store_some(weights + t * o.top_k + i, load(&picked[i]), std::min<int64_t>(kLanes, o.top_k - i));
    }
  });
}

template <class T>
void route_backward(RoutingOptions o, const T* grad, const T* logits, const T* bias, const int64_t* ids,
                    T* grad_logits) {
  parallel_for(o.tokens, 32, [&](int64_t begin, int64_t end) {
    const int64_t size = padded(o.experts);
    std::vector<float> scores(size), weights(padded(o.top_k)), result(size);
    for (int64_t t = begin; t < end; ++t) {
      const int64_t* id = ids + t * o.top_k;
      read_scores(logits + t * o.experts, bias, o.experts, scores.data());
      const bool all = o.softmax_first && !o.renormalize;
      if (all) softmax(scores.data(), size);
      for (int64_t i = 0; i < o.top_k; ++i) weights[i] = scores[id[i]];
      if (!all) {
        for (int64_t i = o.top_k; i < padded(o.top_k); ++i) weights[i] = -__builtin_inff();
        softmax(weights.data(), padded(o.top_k));
      }
      float dot = 0;
      for (int64_t i = 0; i < o.top_k; ++i) dot += weights[i] * widen(grad[t * o.top_k + i]);
      for (int64_t j = 0; j < o.experts; ++j) result[j] = all ? -scores[j] * dot : 0.0f;
      for (int64_t i = 0; i < o.top_k; ++i) {
        const float g = widen(grad[t * o.top_k + i]);
        result[id[i]] = weights[i] * (g - dot);
      }
      for (int64_t j = 0; j < o.experts; j += kLanes)
        store_some(grad_logits + t * o.experts + j, load(&result[j]), std::min<int64_t>(kLanes, o.experts - j));
    }
  });
}

}  // namespace
}  // namespace ivl::IVL_NAMESPACE
