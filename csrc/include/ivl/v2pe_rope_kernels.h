// Kernels of the rotary embedding, compiled once for each instruction set (see foreach_isa.h).
namespace ivl::IVL_NAMESPACE {

namespace {

// sin and cos of float32 angles in float64: 0.5 ulp of float32. Exact reduction by pi/2 up to |x| = 1.6e6.
template <int N>
inline void sincos(Vec<double, N> x, Vec<double, N>& sine, Vec<double, N>& cosine) {
  using D = Vec<double, N>;
  using I = Vec<int64_t, N>;
  const double magic = 6755399441055744.0;  // 1.5 * 2^52: adding it rounds to an integer kept in the low bits
  const D shifted = x * 0.63661977236758134308 + magic;
  const I quadrant = same_bits<I>(shifted);
  const D k = shifted - magic;
  const D r = (x - k * 1.57079632673412561417e+00) - k * 6.07710050650619224932e-11;
  const D z = r * r;
  const D s = r + r * z * (-1.0 / 6 + z * (1.0 / 120 + z * (-1.0 / 5040 + z * (1.0 / 362880 + z * (-1.0 / 39916800)))));
  const D c = 1 - 0.5 * z +
              z * z * (1.0 / 24 + z * (-1.0 / 720 + z * (1.0 / 40320 + z * (-1.0 / 3628800 + z * (1.0 / 479001600)))));
  const I odd = (quadrant & 1) != 0;
  const I sine_bits = same_bits<I>(odd ? c : s) ^ ((quadrant & 2) << 62);
  const I cosine_bits = same_bits<I>(odd ? s : c) ^ (((quadrant + 1) & 2) << 62);
  sine = same_bits<D>(sine_bits);
  cosine = same_bits<D>(cosine_bits);
}

constexpr bool kAnyNan = false;  // results are computed from bfloat16: see bfloat16_bits
constexpr int64_t kMaxHeadDim = 1024;
constexpr int64_t kChunk = 16;  // tokens whose cos and sin are held at once

// cos and sin of one token, [rotary_dim / 2] each.
template <class T, class A>
void angles(const RopeArgs& args, int64_t b, int64_t n, A* cosine, A* sine) {
  const int64_t half = args.rotary_dim / 2, at = b * args.angle_batch + n * args.angle_token;
  if (args.table == RopeTable::none) {
    constexpr int N = lanes<double>;
    const float position = static_cast<const float*>(args.first)[at];
    const float* inv_freq = static_cast<const float*>(args.second);
    for (int64_t i = 0; i < half; i += N) {
      const int count = half - i < N ? half - i : N;
      Vec<double, N> x = {}, s, c;
      bool far = false;
      for (int j = 0; j < count; ++j) {
        x[j] = position * inv_freq[i + j];
        far |= !(x[j] < 1e6 && x[j] > -1e6);
      }
      sincos<N>(x, s, c);
      if (far)
        for (int j = 0; j < count; ++j) s[j] = std::sin(x[j]), c[j] = std::cos(x[j]);
      for (int j = 0; j < count; ++j) {
        cosine[i + j] = static_cast<float>(c[j]) * static_cast<float>(args.scale);
        sine[i + j] = static_cast<float>(s[j]) * static_cast<float>(args.scale);
      }
    }
  } else if (args.table == RopeTable::float32) {
    for (int64_t i = 0; i < half; ++i) {
      cosine[i] = static_cast<const float*>(args.first)[at + i];
      sine[i] = static_cast<const float*>(args.second)[at + i];
    }
  } else {
    over<lanes<A>>(0, half, [&]<int N>(int64_t i) {
      store<N>(cosine + i, load<N>(static_cast<const T*>(args.first) + at + i));
      store<N>(sine + i, load<N>(static_cast<const T*>(args.second) + at + i));
    });
  }
  if constexpr (!std::is_same_v<T, A>)
    if (args.round && args.table != RopeTable::same)
      over<lanes<A>>(0, half, [&]<int N>(int64_t i) {
        store<N>(cosine + i, rounded<T, N, A, true>(load<N>(cosine + i)));
        store<N>(sine + i, rounded<T, N, A, true>(load<N>(sine + i)));
      });
  if (args.inverse)
    for (int64_t i = 0; i < half; ++i) sine[i] = -sine[i];
}

template <class T, class A>
inline A sum_of_squares(const T* x, int64_t width) {
  A total = 0;
  Vec<A, lanes<A>> wide = {};
  over<lanes<A>>(0, width, [&]<int N>(int64_t i) {
    const Vec<A, N> v = load<N>(x + i);
    if constexpr (N == lanes<A>)
      wide += v * v;
    else
      total += sum_of<1, N, A>(v * v);
  });
  return total + sum_of<1, lanes<A>, A>(wide);
}

template <class T, class A>
struct Row {
  const T* x;
  T* y;
  const A *cosine, *sine;
};

// One head's row. Norm: after x * rstd * weight. Round: each result goes through T, as when torch computes in T.
template <class T, bool Round, bool Norm, class A>
inline void rotate_row(Row<T, A> row, const A* weight, A rstd, int64_t half, int64_t width) {
  const T* x = row.x;
  T* y = row.y;
  const auto through = []<int N>(Vec<A, N> v) {
    if constexpr (Round)
      return rounded<T, N, A>(v);
    else
      return v;
  };
  const auto value = [&]<int N>(int64_t i) {
    Vec<A, N> v = load<N>(x + i);
    if constexpr (Norm)
      v = through.template operator()<N>(load<N>(weight + i) * through.template operator()<N>(v * rstd));
    return v;
  };
  over<lanes<A>>(0, half, [&]<int N>(int64_t i) {
    const auto a = value.template operator()<N>(i), b = value.template operator()<N>(i + half);
    const auto c = load<N>(row.cosine + i), s = load<N>(row.sine + i);
    store<N, kAnyNan>(y + i, through.template operator()<N>(a * c) - through.template operator()<N>(b * s));
    store<N, kAnyNan>(y + i + half, through.template operator()<N>(b * c) + through.template operator()<N>(a * s));
  });
  if (Norm || x != y)
    over<lanes<A>>(2 * half, width,
                   [&]<int N>(int64_t i) { store<N, kAnyNan>(y + i, value.template operator()<N>(i)); });
}

constexpr int kRows = 16;  // whose norms are computed together: square root and division are slow one by one

template <class T, bool Round, class A>
inline void rotate_rows(const Row<T, A>* rows, int count, const A* weight, double eps, int64_t half, int64_t width) {
  if (weight == nullptr) {
    for (int r = 0; r < count; ++r) rotate_row<T, Round, false, A>(rows[r], nullptr, A(1), half, width);
    return;
  }
  A rstd[kRows] = {};
  for (int r = 0; r < count; ++r) rstd[r] = sum_of_squares<T, A>(rows[r].x, width);
  for (int r = 0; r < kRows; ++r) rstd[r] = 1 / std::sqrt(rstd[r] / width + static_cast<A>(eps));
  for (int r = 0; r < count; ++r) rotate_row<T, Round, true, A>(rows[r], weight, rstd[r], half, width);
}

// Calls f(token in [0, count), head) in the order in which the rows lie in memory.
template <class F>
inline void over_rows(const RopeSide& side, int64_t count, F&& f) {
  if (side.in_strides.token < side.in_strides.head) {
    for (int64_t h = 0; h < side.heads; ++h)
      for (int64_t n = 0; n < count; ++n) f(n, h);
  } else {
    for (int64_t n = 0; n < count; ++n)
      for (int64_t h = 0; h < side.heads; ++h) f(n, h);
  }
}

template <class T>
inline T* row(const void* base, RopeStrides strides, int64_t b, int64_t h, int64_t n) {
  return const_cast<T*>(static_cast<const T*>(base)) + b * strides.batch + h * strides.head + n * strides.token;
}

// Calls f(batch row, first token, tokens, chunk number, cos, sin) for chunks of tokens, in parallel.
template <class T, class A, class F>
void over_chunks(const RopeArgs& args, F&& f) {
  const int64_t half = args.rotary_dim / 2, per_row = (args.tokens + kChunk - 1) / kChunk;
  parallel_for(args.batch * per_row, 1, [&](int64_t begin, int64_t end) {
    A cosine[kChunk * kMaxHeadDim / 2], sine[kChunk * kMaxHeadDim / 2];
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t b = chunk / per_row, first = chunk % per_row * kChunk;
      const int64_t count = std::min(kChunk, args.tokens - first);
      for (int64_t n = 0; n < count; ++n) angles<T, A>(args, b, first + n, cosine + n * half, sine + n * half);
      f(b, first, count, chunk, cosine, sine);
    }
  });
}

template <class T, class A, bool Round>
void rope_as(const RopeArgs& args) {
  const int64_t half = args.rotary_dim / 2, width = args.head_dim;
  over_chunks<T, A>(args, [&](int64_t b, int64_t first, int64_t count, int64_t, const A* cosine, const A* sine) {
    for (const RopeSide* side : {&args.q, &args.k}) {
      A weight[kMaxHeadDim];
      if (side->weight)
        over<lanes<A>>(0, width, [&]<int N>(int64_t i) {
          store<N>(weight + i, load<N>(static_cast<const T*>(side->weight) + i));
        });
      const A* norm = side->weight ? weight : nullptr;
      Row<T, A> rows[kRows];
      int filled = 0;
      over_rows(*side, count, [&](int64_t n, int64_t h) {
        rows[filled++] = {row<T>(side->in, side->in_strides, b, h, first + n),
                          row<T>(side->out, side->out_strides, b, h, first + n), cosine + n * half, sine + n * half};
        if (filled == kRows) rotate_rows<T, Round, A>(rows, filled, norm, args.eps, half, width), filled = 0;
      });
      rotate_rows<T, Round, A>(rows, filled, norm, args.eps, half, width);
    }
  });
}

template <class T>
void rope(const RopeArgs& args) {
  using A = Sum<T>;
  if (args.round && !std::is_same_v<T, A>)
    rope_as<T, A, !std::is_same_v<T, A>>(args);
  else
    rope_as<T, A, false>(args);
}

// Gradients of one row: `g` gets the gradient before the norm; adds to the weight's gradient.
template <class T, class A>
inline void norm_backward_row(const T* grad, const T* x, T* out, const T* weight, A* grad_weight, const A* cosine,
                              const A* sine, int64_t half, int64_t width, double eps) {
  A g[kMaxHeadDim];
  over<lanes<A>>(0, half, [&]<int N>(int64_t i) {
    const Vec<A, N> a = load<N>(grad + i), b = load<N>(grad + i + half), c = load<N>(cosine + i), s = load<N>(sine + i);
    store<N>(g + i, a * c + b * s);
    store<N>(g + i + half, b * c - a * s);
  });
  over<lanes<A>>(2 * half, width, [&]<int N>(int64_t i) { store<N>(g + i, load<N>(grad + i)); });
  const A rstd = 1 / std::sqrt(sum_of_squares<T, A>(x, width) / width + static_cast<A>(eps));
  A dot = 0;
  Vec<A, lanes<A>> wide = {};
  over<lanes<A>>(0, width, [&]<int N>(int64_t i) {
    const Vec<A, N> gi = load<N>(g + i), xi = load<N>(x + i), wi = load<N>(weight + i);
    const Vec<A, N> part = gi * wi * xi;
    if constexpr (N == lanes<A>)
      wide += part;
    else
      dot += sum_of<1, N, A>(part);
  });
  dot = (dot + sum_of<1, lanes<A>, A>(wide)) * rstd / width;
  over<lanes<A>>(0, width, [&]<int N>(int64_t i) {
    const Vec<A, N> gi = load<N>(g + i), xhat = load<N>(x + i) * rstd, wi = load<N>(weight + i);
    store<N, kAnyNan>(out + i, rstd * (wi * gi - xhat * dot));
    const Vec<A, N> product = gi * xhat;
    for (int j = 0; j < N; ++j) grad_weight[i + j] += product[j];
  });
}

template <class T>
void rope_norm_backward(const RopeArgs& args) {
  using A = Sum<T>;
  const int64_t half = args.rotary_dim / 2, width = args.head_dim;
  const int64_t chunks = args.batch * ((args.tokens + kChunk - 1) / kChunk);
  // One partial weight gradient a chunk, added in order: the result does not depend on the threads. Sums of a few rows
  // go to float64, since one long chain of float32 additions over all rows and heads would lose digits.
  constexpr int kRows = 32;
  std::vector<double> partial(chunks * 2 * width, 0.0);
  over_chunks<T, A>(args, [&](int64_t b, int64_t first, int64_t count, int64_t chunk, const A* cosine, const A* sine) {
    double* sums = partial.data() + chunk * 2 * width;
    for (const RopeSide* side : {&args.q, &args.k}) {
      A recent[kMaxHeadDim] = {};
      int rows = 0;
      const auto flush = [&] {
        for (int64_t i = 0; i < width; ++i) sums[i] += recent[i], recent[i] = A(0);
        rows = 0;
      };
      over_rows(*side, count, [&](int64_t n, int64_t h) {
        norm_backward_row<T, A>(
            row<T>(side->in, side->in_strides, b, h, first + n), row<T>(side->x, side->x_strides, b, h, first + n),
            row<T>(side->out, side->out_strides, b, h, first + n), static_cast<const T*>(side->weight), recent,
            cosine + n * half, sine + n * half, half, width, args.eps);
        if (++rows == kRows) flush();
      });
      flush();
      sums += width;
    }
  });
  const auto total = [&](void* to, int64_t side) {
    for (int64_t i = 0; i < width; ++i) {
      double sum = 0;
      for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += partial[(chunk * 2 + side) * width + i];
      static_cast<A*>(to)[i] = static_cast<A>(sum);
    }
  };
  total(args.q.grad_weight, 0);
  total(args.k.grad_weight, 1);
}

// Positions up to this are exact in float32 for a step that is a multiple of 2^-12, and else off by at most step / 32.
inline double position_limit(double step) {
  for (int j = 0; j <= 12; ++j)
    if (std::ldexp(step, j) == std::floor(std::ldexp(step, j))) return std::ldexp(1.0, 24 - j);
  return std::ldexp(step, 20);
}

// The end of the run of placeholders that starts at `begin`: 16 at a time where all are.
inline int64_t run_end(const int64_t* ids, const bool* mask, int64_t begin, int64_t stop, int64_t token_id) {
  int64_t n = begin;
  for (; n + 16 <= stop; n += 16) {
    int64_t differs = 0;
    for (int j = 0; j < 16; ++j) differs |= ids[n + j] ^ token_id;
    if (differs) break;
    if (mask) {
      bool all = true;
      for (int j = 0; j < 16; ++j) all &= mask[n + j];
      if (!all) break;
    }
  }
  while (n < stop && ids[n] == token_id && (!mask || mask[n])) ++n;
  return n;
}

inline void positions(const PositionArgs& args) {
  int64_t images = 0, visual = 0, tile = 0, segment = 0;
  bool tiles_fit = true;
  double bad_image = -1, bad_end = 0;
  for (int64_t b = 0; b < args.batch; ++b) {
    const int64_t* ids = args.ids + b * args.ids_stride;
    const bool* mask = args.mask ? args.mask + b * args.tokens : nullptr;
    float* out = args.out + b * args.tokens;
    int64_t last = -1;  // position of the last text token, or where the last image ended
    int64_t n = 0;
    while (n < args.tokens) {
      int64_t stop = args.tokens;
      if (args.cu_seqlens) {
        const int64_t here = b * args.tokens + n;
        while (segment < args.segments && args.cu_seqlens[segment + 1] <= here) ++segment;
        if (segment < args.segments) stop = std::min(stop, args.cu_seqlens[segment + 1] - b * args.tokens);
        if (here == args.cu_seqlens[std::min(segment, args.segments)]) last = -1;
      }
      while (n < stop) {
        if (mask && !mask[n]) {
          out[n++] = 1.0f;
        } else if (ids[n] != args.token_id) {
          const int64_t begin = n;
          while (n < stop && ids[n] != args.token_id && (!mask || mask[n])) ++n;
          for (int64_t i = begin; i < n; ++i) out[i] = static_cast<float>(static_cast<int32_t>(last + 1 + i - begin));
          last += n - begin;
        } else {
          const int64_t which = args.delta_per_row ? b : std::min(images, args.delta_count - 1);
          const double delta = args.deltas[which];
          const int64_t begin = n, end = run_end(ids, mask, n, stop, args.token_id);
          int64_t units = 0, left = 0, step = 1;
          if (!args.compress) {
            units = end - begin;
            for (int64_t i = 0; i < units; ++i)
              out[begin + i] = static_cast<float>(last + static_cast<int32_t>(i + 1) * delta);
          } else {
            for (n = begin; n < end; ++n) {
              if (left == 0) {
                const bool small = tile < args.tiles && args.compress[tile];
                tiles_fit &= tile < args.tiles;
                left = small ? args.compressed_tokens : args.tile_tokens;
                step = small ? args.compressed_units : 1;
                ++tile;
              }
              --left;
              units += step;
              out[n] = static_cast<float>(last + units * delta);
            }
          }
          n = end;
          tiles_fit &= !args.compress || left == 0;
          visual += n - begin;
          const double span = units * delta;
          if (bad_image < 0 && last + span > position_limit(delta)) bad_image = images, bad_end = last + span;
          last += static_cast<int64_t>(std::ceil(span - 1e-6 * std::max(1.0, span)));
          ++images;
        }
      }
    }
  }
  const double info[] = {double(images), double(visual), tiles_fit ? double(tile) : -1.0, bad_image, bad_end};
  std::copy(info, info + 5, args.info);
}

}  // namespace
}  // namespace ivl::IVL_NAMESPACE
