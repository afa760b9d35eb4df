#include "ivl/activations.h"
#include "ivl/gemm/product.h"

namespace ivl::IVL_NAMESPACE {
namespace {

constexpr int64_t kScratch = int64_t{32} << 20;  // bytes of operands worked on at a time

struct Statistics {
  float mean, scale;  // scale = 1 / sqrt(variance + eps)
};

// Gathers shuffled row `row` into `buffer` as float and returns its statistics (two passes, the second in cache).
template <class T>
Statistics gather(const ShuffledTokens<const T>& tokens, int64_t row, double eps, float* buffer) {
  const int64_t pieces = tokens.merge * tokens.merge, columns = tokens.columns();
  vf sums[4] = {};
  for (int64_t q = 0; q < pieces; ++q) {
    const T* from = tokens.piece(row, q);
    float* to = buffer + q * tokens.channels;
    int64_t i = 0;
    for (; i + 4 * kLanes <= tokens.channels; i += 4 * kLanes) {
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        const vf v = load(from + i + j * kLanes);
        store(to + i + j * kLanes, v);
        sums[j] += v;
      }
    }
    by_vector(tokens.channels - i, [&](int64_t j, auto full, int64_t n) {
      const vf v = load(from + i + j, full, n);
      store(to + i + j, v, full, n);
      sums[0] += v;
    });
  }
  const float mean = sum((sums[0] + sums[1]) + (sums[2] + sums[3])) / columns;
  vf squares[4] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes <= columns; i += 4 * kLanes) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const vf d = load(buffer + i + j * kLanes) - splat(mean);
      squares[j] = fma(d, d, squares[j]);
    }
  }
  float rest = 0;
  for (; i < columns; ++i) rest += (buffer[i] - mean) * (buffer[i] - mean);
  const float variance = (sum((squares[0] + squares[1]) + (squares[2] + squares[3])) + rest) / columns;
  return {mean, 1.0f / std::sqrt(variance + static_cast<float>(eps))};
}

inline void gather64(const ShuffledTokens<const double>& tokens, int64_t row, double eps, double* buffer, double& mean,
                     double& scale) {
  const int64_t columns = tokens.columns();
  for (int64_t q = 0; q < tokens.merge * tokens.merge; ++q)
    std::memcpy(buffer + q * tokens.channels, tokens.piece(row, q), tokens.channels * sizeof(double));
  double total = 0, squares = 0;
  for (int64_t i = 0; i < columns; ++i) total += buffer[i];
  mean = total / columns;
  for (int64_t i = 0; i < columns; ++i) squares += (buffer[i] - mean) * (buffer[i] - mean);
  scale = 1 / std::sqrt(squares / columns + eps);
}

// to[0, n) = (from - mean) * scale * weight + bias
template <class T, class To>
inline void normalize(const float* from, Statistics s, const T* weight, const T* bias, int64_t n, To* to) {
  by_vector(n, [&](int64_t i, auto full, int64_t rest) {
    const vf centred = (load(from + i, full, rest) - splat(s.mean)) * splat(s.scale);
    store(to + i, fma(centred, load(weight + i, full, rest), load(bias + i, full, rest)), full, rest);
  });
}

template <class T>
void shuffle_norm(ShuffledTokens<const T> tokens, int64_t first, int64_t count, const T* weight, const T* bias,
                  double eps, T* out) {
  const int64_t columns = tokens.columns();
  parallel_for(count, 4, [&](int64_t begin, int64_t end) {
    if constexpr (std::is_same_v<T, double>) {
      std::vector<double> buffer(columns);
      for (int64_t m = begin; m < end; ++m) {
        double mean, scale;
        gather64(tokens, first + m, eps, buffer.data(), mean, scale);
        for (int64_t i = 0; i < columns; ++i) out[m * columns + i] = (buffer[i] - mean) * scale * weight[i] + bias[i];
      }
    } else {
      const Scratch<float> buffer(columns);
      for (int64_t m = begin; m < end; ++m) {
        const Statistics s = gather(tokens, first + m, eps, buffer.get());
        normalize(buffer.get(), s, weight, bias, columns, out + m * columns);
      }
    }
  });
}

// The same as float32 rows for a product, padded_stride(columns) apart.
template <class T>
void shuffle_norm_rows(ShuffledTokens<const T> tokens, int64_t first, int64_t count, const T* weight, const T* bias,
                       double eps, float* to) {
  const int64_t columns = tokens.columns(), stride = padded_stride<float>(columns);
  parallel_for(count, 4, [&](int64_t begin, int64_t end) {
    const Scratch<float> buffer(columns);
    for (int64_t m = begin; m < end; ++m) {
      const Statistics s = gather(tokens, first + m, eps, buffer.get());
      normalize(buffer.get(), s, weight, bias, columns, to + m * stride);
    }
  });
}

// Sums over rows are taken in a fixed number of slabs, so that they do not depend on the number of threads.
constexpr int64_t kSlabs = 16;

template <class S, class F>
void sum_slabs(int64_t rows, int64_t columns, S* total, F&& slab) {
  const int64_t slabs = std::min(kSlabs, rows);
  std::vector<S> partial(total ? slabs * columns : 0);
  parallel_for(slabs, 1, [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s)
      slab(rows * s / slabs, rows * (s + 1) / slabs, total ? partial.data() + s * columns : nullptr);
  });
  if (!total) return;
  parallel_for(columns, 4096, [&](int64_t begin, int64_t end) {
    for (int64_t s = 0; s < slabs; ++s)
      for (int64_t i = begin; i < end; ++i) total[i] += partial[s * columns + i];
  });
}

inline void norm_backward_row(const ShuffledTokens<const double>& tokens, int64_t row, const double* weight, double eps,
                              const double* dy, const ShuffledTokens<double>& dx, double* sums) {
  const int64_t columns = tokens.columns();
  std::vector<double> x(columns);
  double mean, scale, mean_g = 0, mean_gx = 0;
  gather64(tokens, row, eps, x.data(), mean, scale);
  for (int64_t i = 0; i < columns; ++i) {
    x[i] = (x[i] - mean) * scale;
    mean_g += dy[i] * weight[i] / columns;
    mean_gx += dy[i] * weight[i] * x[i] / columns;
    if (sums) sums[i] += dy[i] * x[i], sums[columns + i] += dy[i];
  }
  for (int64_t i = 0; dx.x && i < columns; ++i)
    dx.piece(row, i / tokens.channels)[i % tokens.channels] = (dy[i] * weight[i] - mean_g - x[i] * mean_gx) * scale;
}

template <class T>
void norm_backward_row(const ShuffledTokens<const T>& tokens, int64_t row, const T* weight, double eps, const T* dy,
                       const ShuffledTokens<T>& dx, float* sums) {
  const int64_t columns = tokens.columns(), channels = tokens.channels;
  const Scratch<float> scratch(columns);
  float* const x = scratch.get();
  const Statistics s = gather(tokens, row, eps, x);
  vf sum_g = {}, sum_gx = {};
  by_vector(columns, [&](int64_t i, auto full, int64_t n) {
    const vf y = load(dy + i, full, n), g = y * load(weight + i, full, n);
    const vf centred = (load(x + i, full, n) - splat(s.mean)) * splat(s.scale);
    store(x + i, centred, full, n);
    sum_g += g;
    sum_gx = fma(g, centred, sum_gx);
    if (sums) {
      store(sums + i, fma(y, centred, load(sums + i, full, n)), full, n);
      store(sums + columns + i, load(sums + columns + i, full, n) + y, full, n);
    }
  });
  if (!dx.x) return;
  const vf mean_g = splat(sum(sum_g) / columns), mean_gx = splat(sum(sum_gx) / columns);
  for (int64_t q = 0; q < tokens.merge * tokens.merge; ++q) {
    T* to = dx.piece(row, q);
    const int64_t at = q * channels;
    by_vector(channels, [&](int64_t i, auto full, int64_t n) {
      const vf g = load(dy + at + i, full, n) * load(weight + at + i, full, n);
      const vf centred = load(x + at + i, full, n);
      store(to + i, (g - mean_g - centred * mean_gx) * splat(s.scale), full, n);
    });
  }
}

template <class T, class S>
void shuffle_norm_backward(ShuffledTokens<const T> tokens, int64_t first, int64_t count, const T* weight, double eps,
                           const T* grad, ShuffledTokens<T> dx, S* sums) {
  const int64_t columns = tokens.columns();
  sum_slabs(count, 2 * columns, sums, [&](int64_t begin, int64_t end, S* partial) {
    for (int64_t m = begin; m < end; ++m)
      norm_backward_row(tokens, first + m, weight, eps, grad + m * columns, dx, partial);
  });
}

template <class T, class S>
void gelu_backward(const T* pre, int64_t pre_stride, int64_t rows, int64_t columns, T* activated,
                   int64_t activated_stride, T* grad, S* dbias) {
  sum_slabs(rows, columns, dbias, [&](int64_t begin, int64_t end, S* partial) {
    for (int64_t m = begin; m < end; ++m) {
      const T* z = pre + m * pre_stride;
      T* act = activated ? activated + m * activated_stride : nullptr;
      T* g = grad ? grad + m * columns : nullptr;
      if constexpr (std::is_same_v<T, double>) {
        for (int64_t i = 0; i < columns; ++i) {
          if (act) act[i] = gelu(z[i]);
          if (g) g[i] *= gelu_slope(z[i]);
          if (partial) partial[i] += g[i];
        }
      } else {
        by_vector(columns, [&](int64_t i, auto full, int64_t n) {
          const vf value = load(z + i, full, n);
          if (act) store(act + i, gelu(value), full, n);
          if (!g) return;
          const vf d = load(g + i, full, n) * gelu_slope(value);
          store(g + i, d, full, n);
          if (partial) store(partial + i, load(partial + i, full, n) + d, full, n);
        });
      }
    }
  });
}

template <class T>
void project(ShuffledTokens<const T> tokens, int64_t rows, const T* norm_weight, const T* norm_bias, double eps,
             const LinearLayer<T>* layers, int64_t layer_count, RowMap<T> out, T* pre, int64_t pre_stride) {
  int64_t widest = tokens.columns();
  for (int64_t l = 0; l < layer_count; ++l) widest = std::max(widest, layers[l].inputs);
  // Row chunks of equal size whose operands fit in kScratch.
  const int64_t widest_stride = padded_stride<float>(widest);
  const int64_t most = std::max<int64_t>(48, kScratch / (2 * widest_stride * int64_t{sizeof(float)}));
  const int64_t chunks = (rows + most - 1) / most, chunk = chunks ? (rows + chunks - 1) / chunks : 0;
  const Scratch<float> between[] = {Scratch<float>(chunk * widest_stride), Scratch<float>(chunk * widest_stride)};
  const Scratch<const float*> from(chunk);
  for (int64_t first = 0; first < rows; first += chunk) {
    const int64_t here = std::min(chunk, rows - first);
    shuffle_norm_rows(tokens, first, here, norm_weight, norm_bias, eps, between[0].get());
    int64_t pre_column = 0;
    for (int64_t l = 0; l < layer_count; ++l) {
      const LinearLayer<T>& layer = layers[l];
      const bool last = l + 1 == layer_count;
      for (int64_t m = 0; m < here; ++m) from[m] = between[l % 2].get() + m * padded_stride<float>(layer.inputs);
      float* const next = between[(l + 1) % 2].get();
      const int64_t next_stride = padded_stride<float>(layer.outputs);
      product_of(from.get(), here, layer.inputs, StridedMatrix<T>{layer.weight, 1, layer.weight_stride}, layer.outputs,
                 Form::packed, [&](int64_t m, int64_t column, int64_t columns, const float* values) {
                   T* saved = pre && !last ? pre + (first + m) * pre_stride + pre_column + column : nullptr;
                   T* target = last ? out.row(first + m) + column : nullptr;
                   float* hidden = next + m * next_stride + column;
                   by_vector(columns, [&](int64_t i, auto whole, int64_t n) {
                     const vf z = load(values + i) + load(layer.bias + column + i, whole, n);
                     if (last) return store(target + i, z, whole, n);
                     if (saved) store(saved + i, z, whole, n);
                     store(hidden + i, gelu(z), whole, n);
                   });
                 });
      pre_column += layer.outputs;
    }
  }
}

}  // namespace
}  // namespace ivl::IVL_NAMESPACE
