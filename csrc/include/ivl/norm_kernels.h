// Kernels of the norms for one instruction set: a row is read once from memory, and again from the first-level cache.

namespace ivl::IVL_NAMESPACE {
namespace {

constexpr int kChains = 4;                  // sums that are independent of each other
constexpr int64_t kGradRows = 64;           // rows whose weight gradients are one partial sum
constexpr int64_t kTaskElements = 1 << 14;  // of rows, least work worth a thread

template <class T>
inline vf get(const T* p, int64_t n) {
  return n >= kLanes ? load(p) : load_some(p, n);
}
template <class T>
inline void put(T* p, vf v, int64_t n) {
  n >= kLanes ? store(p, v) : store_some(p, v, n);
}

// Calls f(i, chain, n) for each vector of a row: n elements from i on.
template <class F>
inline void over(int64_t width, F&& f) {
  int64_t i = 0;
  for (; i + kChains * kLanes <= width; i += kChains * kLanes)
#pragma GCC unroll 4
    for (int chain = 0; chain < kChains; ++chain) f(i + chain * kLanes, chain, int64_t{kLanes});
  for (; i + kLanes <= width; i += kLanes) f(i, 0, int64_t{kLanes});
  if (i < width) f(i, 0, width - i);
}

inline float total(const vf (&chains)[kChains]) { return sum((chains[0] + chains[1]) + (chains[2] + chains[3])); }

// A vector in float32, widened into `own` when it is not.
template <class T>
const float* widened(NormVector v, int64_t width, float* own) {
  if (v.data == nullptr) return nullptr;
  if (v.wide || std::is_same_v<T, float>) return static_cast<const float*>(v.data);
  over(width, [&](int64_t i, int, int64_t n) { put(own + i, get(static_cast<const T*>(v.data) + i, n), n); });
  return own;
}

// A normalised value is ((x - mean) - shift) * rstd: the mean in two parts, for rows far from zero.
struct Moments {
  float mean, shift, rstd;
  vf operator()(vf x) const { return (x - splat(mean) - splat(shift)) * splat(rstd); }
};

// What the first pass over a row adds up.
inline vf term(vf x, vf before, bool center) { return center ? before + x : fma(x, x, before); }

// From the row and the sum of its terms.
inline Moments moments(const float* row, int64_t width, double eps, bool center, float sum) {
  Moments m = {};
  float squares = sum;
  if (center) {
    m.mean = sum / width;
    vf powers[kChains] = {}, rests[kChains] = {};
    over(width, [&](int64_t i, int chain, int64_t n) {
      vf d = get(row + i, n) - splat(m.mean);
      for (int64_t lane = n; lane < kLanes; ++lane) d[lane] = 0;
      rests[chain] += d;
      powers[chain] = fma(d, d, powers[chain]);
    });
    m.shift = total(rests) / width;
    squares = total(powers);
  }
  m.rstd = 1 / std::sqrt(squares / width - m.shift * m.shift + static_cast<float>(eps));
  return m;
}

template <class T>
void norm(const NormArgs& args) {
  const int64_t width = args.width;
  Scratch<float> vectors(3 * width);
  const float* weight = widened<T>(args.weight, width, vectors.get());
  const float* bias = widened<T>(args.bias, width, vectors.get() + width);
  const float* scale = widened<T>(args.layer_scale, width, vectors.get() + 2 * width);
  parallel_for(args.rows, std::max<int64_t>(1, kTaskElements / width), [&](int64_t begin, int64_t end) {
    Scratch<float> wide(width);
    for (int64_t r = begin; r < end; ++r) {
      const T* x = static_cast<const T*>(args.x.data) + r * args.x.stride;
      T* y = static_cast<T*>(args.y) + r * width;
      const float* row = wide.get();
      vf sums[kChains] = {};
      if (args.residual.data) {
        const T* residual = static_cast<const T*>(args.residual.data) + r * args.residual.stride;
        T* added = static_cast<T*>(args.sum) + r * width;
        over(width, [&](int64_t i, int chain, int64_t n) {
          vf v = get(x + i, n);
          if (scale) v = rounded<T, kLanes, float, true>(v * get(scale + i, n));
          put(added + i, get(residual + i, n) + v, n);
          v = get(added + i, n);  // as it was rounded
          put(wide.get() + i, v, n);
          sums[chain] = term(v, sums[chain], args.center);
        });
      } else {
        if constexpr (std::is_same_v<T, float>) row = x;
        over(width, [&](int64_t i, int chain, int64_t n) {
          const vf v = get(x + i, n);
          if constexpr (!std::is_same_v<T, float>) put(wide.get() + i, v, n);
          sums[chain] = term(v, sums[chain], args.center);
        });
      }
      const Moments m = moments(row, width, args.eps, args.center, total(sums));
      over(width, [&](int64_t i, int, int64_t n) {
        vf v = m(get(row + i, n));
        if (args.round) v = rounded<T, kLanes, float, true>(v);
        v = v * get(weight + i, n);
        if (bias) v = v + get(bias + i, n);
        put(y + i, v, n);
      });
    }
  });
}

template <class T>
void norm_backward(const NormBackwardArgs& args) {
  const int64_t width = args.width, chunks = (args.rows + kGradRows - 1) / kGradRows;
  Scratch<float> vectors(2 * width);
  const float* weight = widened<T>(args.weight, width, vectors.get());
  const float* scale = widened<T>(args.layer_scale, width, vectors.get() + width);
  // Of each chunk: gradients of weight, bias and layer scale.
  Scratch<float> partial(std::max<int64_t>(1, chunks * 3 * width));
  parallel_for(chunks, std::max<int64_t>(1, kTaskElements / (kGradRows * width)), [&](int64_t begin, int64_t end) {
    Scratch<float> wide(width), products(width);
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      float* dweight = partial.get() + chunk * 3 * width;
      float *dbias = dweight + width, *dscale = dbias + width;
      std::memset(dweight, 0, 3 * width * sizeof(float));
      for (int64_t r = chunk * kGradRows; r < std::min(args.rows, (chunk + 1) * kGradRows); ++r) {
        const T* grad = static_cast<const T*>(args.grad.data) + r * args.grad.stride;
        const T* added = static_cast<const T*>(args.sum.data) + r * args.sum.stride;
        vf terms[kChains] = {};
        over(width, [&](int64_t i, int chain, int64_t n) {
          const vf v = get(added + i, n);
          put(wide.get() + i, v, n);
          terms[chain] = term(v, terms[chain], args.center);
        });
        const Moments m = moments(wide.get(), width, args.eps, args.center, total(terms));
        vf dots[kChains] = {}, sums[kChains] = {};
        over(width, [&](int64_t i, int chain, int64_t n) {
          const vf g = get(grad + i, n), normed = m(get(wide.get() + i, n));
          const vf w = g * get(weight + i, n);
          dots[chain] = fma(w, normed, dots[chain]);
          sums[chain] += w;
          put(wide.get() + i, normed, n);
          put(products.get() + i, w, n);
          put(dweight + i, fma(g, normed, get(dweight + i, n)), n);
          if (args.dbias) put(dbias + i, get(dbias + i, n) + g, n);
        });
        const vf dot = splat(total(dots) / width), shift = splat(args.center ? total(sums) / width : 0);
        over(width, [&](int64_t i, int, int64_t n) {
          vf d = get(products.get() + i, n) - shift - get(wide.get() + i, n) * dot;
          d = d * splat(m.rstd);
          if (args.grad_sum.data)
            d = d + get(static_cast<const T*>(args.grad_sum.data) + r * args.grad_sum.stride + i, n);
          put(static_cast<T*>(args.ds) + r * width + i, d, n);
          if (args.dx) put(static_cast<T*>(args.dx) + r * width + i, d * get(scale + i, n), n);
          if (args.dscale)
            put(dscale + i,
                fma(d, get(static_cast<const T*>(args.x.data) + r * args.x.stride + i, n), get(dscale + i, n)), n);
        });
      }
    }
  });
  // In the order of the chunks, whatever the threads did.
  float* const results[] = {args.dweight, args.dbias, args.dscale};
  for (int which = 0; which < 3; ++which) {
    if (results[which] == nullptr) continue;
    over(width, [&](int64_t i, int, int64_t n) {
      vf s = {};
      for (int64_t chunk = 0; chunk < chunks; ++chunk) s += get(partial.get() + (chunk * 3 + which) * width + i, n);
      put(results[which] + i, s, n);
    });
  }
}

}  // namespace
}  // namespace ivl::IVL_NAMESPACE
