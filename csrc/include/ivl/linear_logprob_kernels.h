// Kernels of the head's log-probabilities for one instruction set: finished tiles of logits become sums, or gradients,
// and are gone.
#include "ivl/activations.h"
#include "ivl/gemm/product.h"

namespace ivl::IVL_NAMESPACE {
namespace {

constexpr int64_t kBlockColumns = 512;                 // of the vocabulary, whose sums are one partial result
constexpr int64_t kBlockRows = 1152;                   // rows at a time in the forward
constexpr int64_t kTileBytes = int64_t{16} << 20;      // of a tile of gradients of logits and its transpose
constexpr int64_t kLeastTile = 256, kMostTile = 4096;  // its columns
constexpr float kLowest = -3.402823466e38f;

// The series where 1 - e loses digits.
inline vf tanh(vf x) {
  const vi negative = x < vf{};
  const vf size = negative ? -x : x, square = x * x;
  const vf e = exp_negative(size * -2.0f), far = (1.0f - e) / (1.0f + e);
  vf near = splat(-17.0f / 315);
  near = fma(near, square, splat(2.0f / 15));
  near = fma(near, square, splat(-1.0f / 3));
  near = fma(near * square, x, x);
  const vi small = size < splat(0.15f);
  return small ? near : negative ? -far : far;
}

// From a product to a logit, and back to the product's gradient.
struct Transform {
  const float* bias;  // padded to whole panels, or null
  float softcap, inverse_temperature;

  vf operator()(vf y, int64_t column) const {
    if (bias) y += load(bias + column);
    if (softcap != 0) y = tanh(y / softcap) * softcap;
    return y * inverse_temperature;
  }
  vf slope(vf z) const {
    const vf t = z / (softcap * inverse_temperature);
    return softcap == 0 ? splat(inverse_temperature) : (1.0f - t * t) * inverse_temperature;
  }
};

// The head's bias, readable by whole panels.
class PaddedBias {
 public:
  explicit PaddedBias(const Head& head) : data_(head.bias ? head.vocabulary + kPanel : 0), given_(head.bias) {
    if (!given_) return;
    std::memcpy(data_.get(), head.bias, head.vocabulary * sizeof(float));
    std::memset(data_.get() + head.vocabulary, 0, kPanel * sizeof(float));
  }
  Transform transform(const Head& head) const {
    return {given_ ? data_.get() : nullptr, head.softcap, head.inverse_temperature};
  }

 private:
  Scratch<float> data_;
  bool given_;
};

// Rows of x as operands: what is beyond a row, and one row after the last, is zero.
template <class A>
struct Operand {
  int64_t stride;
  Scratch<A> data;
  Scratch<const A*> rows;

  template <class T>
  Operand(const T* from, int64_t from_stride, int64_t count, int64_t width)
      : stride(padded_stride<A>(width)), data((count + 1) * stride), rows(count) {
    copy_rows(StridedMatrix<T>{from, from_stride, 1}, count, width, data.get());
    std::memset(static_cast<void*>(data.get() + count * stride), 0, stride * sizeof(A));
    for (int64_t r = 0; r < count; ++r) rows[r] = data.get() + r * stride;
  }
};

// Whether bfloat16 operands are multiplied as they are.
template <class T, class W>
bool as_bfloat16(const Head& head) {
  return std::is_same_v<T, bfloat16> && std::is_same_v<W, bfloat16> && dot_bf16() && head.width % 2 == 0;
}

// Of the logits z of a row but the target's, or of some of them: `moment` is the sum of e^(z - max) (z - max). The
// target's comes last, so that 1 - p keeps its digits where p is near 1. `total` is of all.
struct Partial {
  float max, sum, moment, total;
};

// Adds the logits of a panel's row, `columns` of them valid, with products y; `own` is the target's place if it is here.
inline void add(Partial& partial, const float* y, int64_t column, int64_t columns, int64_t own,
                const Transform& transform, float* logits) {
  vf z[kParts], top = splat(kLowest), total = {};
#pragma GCC unroll 4
  for (int p = 0; p < kParts; ++p) {
    z[p] = transform(load(y + p * kLanes), column + p * kLanes);
    store(logits + p * kLanes, z[p]);
    if (columns < kPanel)
      for (int i = 0; i < kLanes; ++i) {
        const bool valid = p * kLanes + i < columns;
        total[i] += valid ? z[p][i] : 0.0f;
        if (!valid) z[p][i] = -INFINITY;
      }
    else
      total += z[p];
    if (own >= p * kLanes && own < (p + 1) * kLanes) z[p][own - p * kLanes] = -INFINITY;
    top = z[p] > top ? z[p] : top;
  }
  const float most = largest(top);
  if (most > partial.max) {
    if (partial.sum != 0) {
      const float down = partial.max - most, scale = std::exp(down);
      partial.moment = (partial.moment + partial.sum * down) * scale;
      partial.sum *= scale;
    }
    partial.max = most;
  }
  vf sums = {}, moments = {};
#pragma GCC unroll 4
  for (int p = 0; p < kParts; ++p) {
    const vf down = z[p] - partial.max, e = exp_negative(down);
    sums += e;
    const vi none = e == vf{};
    moments += none ? vf{} : e * down;
  }
  partial.sum += sum(sums);
  partial.moment += sum(moments);
  partial.total += sum(total);
}

// A row's results from its blocks, in their order, and the target's logit.
inline void merge(const Partial* blocks, int64_t count, int64_t stride, float own, int64_t vocabulary, float* logp,
                  float* lse, float* entropy, float* mean) {
  float most = std::max(kLowest, own);
  for (int64_t b = 0; b < count; ++b) most = std::max(most, blocks[b * stride].max);
  double others = 0, moment = 0, all = 0;
  for (int64_t b = 0; b < count; ++b) {
    const Partial& partial = blocks[b * stride];
    const double down = double{partial.max} - most, scale = std::exp(down);
    others += scale * partial.sum;
    moment += scale * (partial.moment + (partial.sum != 0 ? partial.sum * down : 0));
    all += partial.total;
  }
  const double below = double{own} - most, e = std::exp(below), total = others + e, log_total = std::log(total);
  *logp = static_cast<float>(e > others ? -std::log1p(others / e) : below - log_total);
  *lse = static_cast<float>(most + log_total);
  *entropy = static_cast<float>(log_total - (moment + (e != 0 ? e * below : 0)) / total);
  *mean = static_cast<float>(all / vocabulary);
}

template <class A, class T, class W>
void logprob_in(const LogprobArgs& args) {
  const Head& head = args.head;
  const int64_t vocabulary = head.vocabulary, blocks = (vocabulary + kBlockColumns - 1) / kBlockColumns;
  const int64_t chunks = (head.rows + kBlockRows - 1) / kBlockRows;
  const auto panel_at = [&](int64_t column) {
    return row_panel(static_cast<const W*>(head.weight), head.weight_stride, vocabulary, column);
  };
  const PaddedBias bias(head);
  const Transform transform = bias.transform(head);
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const int64_t first = head.rows * chunk / chunks, count = head.rows * (chunk + 1) / chunks - first;
    const Operand<A> x(static_cast<const T*>(head.x) + first * head.x_stride, head.x_stride, count, head.width);
    const Scratch<Partial> partials(blocks * count);
    const Scratch<float> own(count);
    const int64_t* targets = args.targets + first;
    run_small_tasks(blocks, [&](int64_t block, int64_t then) {
      Partial* const partial = partials.get() + block * count;
      std::fill_n(partial, count, Partial{kLowest, 0, 0, 0});
      const int64_t end = std::min(vocabulary, (block + 1) * kBlockColumns);
      for (int64_t column = block * kBlockColumns; column < end; column += kPanel) {
        const int64_t columns = std::min(kPanel, end - column);
        const int64_t next = column + kPanel < end ? column + kPanel : then * kBlockColumns;
        multiply(
            x.rows.get(), count, head.width, 1, [&](int64_t) { return panel_at(column); },
            [&](int64_t row, int64_t rows, int64_t, const float* y) {
              for (int64_t r = row; r < row + rows; ++r, y += kPanel) {
                float z[kPanel];
                const int64_t place = targets[r] - column;
                add(partial[r], y, column, columns, place, transform, z);
                if (place >= 0 && place < columns) own[r] = z[place];
                if (args.kept)
                  std::memcpy(args.kept + (first + r) * vocabulary + column, z, columns * sizeof(float));
              }
            },
            next < vocabulary ? start(panel_at(next), 0) : nullptr, 0);
      }
    });
    parallel_for(count, 16, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r)
        merge(partials.get() + r, blocks, count, own[r], vocabulary, args.logp + first + r, args.lse + first + r,
              args.entropy + first + r, args.mean + first + r);
    });
  }
}

template <class E>
void linear_logprob(const LogprobArgs& args) {
  using T = typename E::X;
  using W = typename E::Weight;
  if constexpr (std::is_same_v<T, bfloat16> && std::is_same_v<W, bfloat16> && IVL_VECTOR_BYTES == 64)
    if (as_bfloat16<T, W>(args.head)) return logprob_in<bfloat16, T, W>(args);
  logprob_in<float, T, W>(args);
}

// What turns the logits of a row into their gradients.
struct RowGradient {
  float lse, entropy, own, by_logp, by_lse, by_entropy, mean;  // own: log-probability of the target

  // Of logits z in general, and of the target's.
  vf operator()(vf z) const {
    const vf u = z - lse, p = exp_negative(u);
    vf d = p * (by_lse - by_logp);
    if (by_entropy != 0) d -= p * ((u < -87.0f ? splat(-87.0f) : u) + entropy) * by_entropy;
    return d + mean;
  }
  float of_target() const {
    return -by_logp * std::expm1(own) + std::exp(own) * (by_lse - by_entropy * (own + entropy)) + mean;
  }
};

inline RowGradient row_gradient(const LogprobBackwardArgs& args, int64_t row) {
  return {args.lse[row],      args.entropy[row],      args.logp[row], args.grad_logp[row],
          args.grad_lse[row], args.grad_entropy[row], args.grad_mean[row] / args.head.vocabulary};
}

// Gradients of products, and their transpose, of a tile of the vocabulary.
template <class A>
struct GradientTile {
  int64_t rows, stride, columns_stride;
  Scratch<A> data, transposed;

  GradientTile(int64_t rows, int64_t columns)
      : rows(rows), stride(padded_stride<A>(columns)), columns_stride(padded_stride<A>(rows)), data(rows * stride),
        transposed(columns * columns_stride) {
    std::memset(static_cast<void*>(data.get()), 0, rows * stride * sizeof(A));
    std::memset(static_cast<void*>(transposed.get()), 0, columns * columns_stride * sizeof(A));
  }
  // `count` rows from `row` on, columns [column, column + columns), from z [count, kPanel].
  void put(int64_t row, int64_t count, int64_t column, int64_t columns, const float (*d)[kPanel]) const {
    for (int64_t r = 0; r < count; ++r)
      by_vector(columns, [&](int64_t j, auto whole, int64_t n) {
        store(data.get() + (row + r) * stride + column + j, load(d[r] + j), whole, n);
      });
    for (int64_t j = 0; j < columns; ++j) {
      A* to = transposed.get() + (column + j) * columns_stride + row;
      for (int64_t r = 0; r < count; ++r) to[r] = data[(row + r) * stride + column + j];
    }
  }
};

// `count` rows of the tile from `row` on: gradient(r, j, whole, n) is that of row + r and column + j, n of them.
template <class A, class F>
void fill(const GradientTile<A>& tile, int64_t row, int64_t count, int64_t column, int64_t columns, F&& gradient) {
  float d[kTileRows][kPanel];
  for (int64_t r = 0; r < count; ++r)
    by_vector(columns, [&](int64_t j, auto whole, int64_t n) { store(d[r] + j, gradient(r, j, whole, n)); });
  tile.put(row, count, column, columns, d);
}

// The same of all rows and `columns` columns, some at a time.
template <class A, class F>
void fill_all(const GradientTile<A>& tile, int64_t columns, F&& rows_and_columns) {
  parallel_for((tile.rows + kTileRows - 1) / kTileRows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin * kTileRows; row < std::min(tile.rows, end * kTileRows); row += kTileRows)
      for (int64_t column = 0; column < columns; column += kPanel)
        rows_and_columns(row, std::min(kTileRows, tile.rows - row), column, std::min(kPanel, columns - column));
  });
}

// Rows of x times words of the head: finish(row, rows, column, columns, y) gets [rows, kPanel] products.
template <class A, class W, class F>
void words_product(const Operand<A>& x, const Head& head, int64_t first, int64_t words, F&& finish) {
  const W* const from = static_cast<const W*>(head.weight) + first * head.weight_stride;
  product(
      x.rows.get(), head.rows, head.width, panel_count(words),
      [&](int64_t p) { return row_panel(from, head.weight_stride, words, p * kPanel); },
      [&](int64_t row, int64_t n, int64_t p, const float* y) {
        finish(row, n, p * kPanel, std::min(kPanel, words - p * kPanel), y);
      },
      Form::packed);
}

// From the gradients of the products, a tile of the vocabulary at a time, to those of x, weight and bias.
// make(tile, first, words) fills a tile.
template <class A, class T, class W, class F>
void head_gradients(const Head& head, const Operand<A>& x, const HeadGradients& to, F&& make) {
  const int64_t count = head.rows, width = head.width, vocabulary = head.vocabulary;
  constexpr int64_t unit = std::is_same_v<A, bfloat16> ? 2 : 1;
  const int64_t fitting = kTileBytes / (2 * count * int64_t{sizeof(A)}) / kPanel * kPanel;
  const int64_t most = std::min(std::clamp(fitting, kLeastTile, kMostTile), panel_count(vocabulary) * kPanel);
  const GradientTile<A> tile(count, most);
  const Scratch<const A*> rows(count), columns(most);
  for (int64_t r = 0; r < count; ++r) rows[r] = tile.data.get() + r * tile.stride;
  for (int64_t j = 0; j < most; ++j) columns[j] = tile.transposed.get() + j * tile.columns_stride;
  const Scratch<float> wide(std::is_same_v<T, float> || !to.x ? 0 : count * width);
  float* const dx = std::is_same_v<T, float> ? static_cast<float*>(to.x) : wide.get();
  for (int64_t first = 0; first < vocabulary; first += most) {
    const int64_t here = std::min(most, vocabulary - first);
    make(tile, first, here);
    if (to.bias)
      parallel_for(here, 16, [&](int64_t begin, int64_t end) {
        for (int64_t j = begin; j < end; ++j) {
          vf total = {};
          by_vector(count, [&](int64_t r, auto whole, int64_t n) { total += load(columns[j] + r, whole, n); });
          to.bias[first + j] = sum(total) + (to.accumulate ? to.bias[first + j] : 0.0f);
        }
      });
    if (to.weight) {
      W* const target = static_cast<W*>(to.weight) + first * width;
      const StridedMatrix<A> by{x.data.get(), x.stride, 1};
      product_of(columns.get(), here, (count + unit - 1) / unit * unit, by, width, Form::best,
                 [&](int64_t word, int64_t column, int64_t n, const float* values) {
                   by_vector(n, [&](int64_t i, auto whole, int64_t some) {
                     W* at = target + word * width + column + i;
                     vf v = load(values + i);
                     if (to.accumulate) v += load(at, whole, some);
                     store(at, v, whole, some);
                   });
                 });
    }
    if (to.x) {
      const auto add_to = [&](int64_t row, int64_t column, int64_t n, const float* values) {
        by_vector(n, [&](int64_t i, auto whole, int64_t some) {
          float* at = dx + row * width + column + i;
          vf v = load(values + i);
          if (first) v += load(at, whole, some);
          store(at, v, whole, some);
        });
      };
      const StridedMatrix<W> words{static_cast<const W*>(head.weight) + first * head.weight_stride, head.weight_stride,
                                   1};
      if (here % unit) {  // an odd last tile: its words and a row of zeros
        const Operand<W> even(words.data, words.row_stride, here, width);
        for (int64_t r = 0; r < count; ++r) tile.data[r * tile.stride + here] = A{};
        product_of(rows.get(), count, here + 1, StridedMatrix<W>{even.data.get(), even.stride, 1}, width, Form::best,
                   add_to);
      } else {
        product_of(rows.get(), count, here, words, width, Form::best, add_to);
      }
    }
  }
  if constexpr (!std::is_same_v<T, float>)
    if (to.x)
      parallel_for(count, 16, [&](int64_t begin, int64_t end) {
        by_vector((end - begin) * width, [&](int64_t i, auto whole, int64_t n) {
          const int64_t at = begin * width + i;
          store(static_cast<T*>(to.x) + at, load(dx + at, whole, n), whole, n);
        });
      });
}

template <class A, class T, class W>
void logprob_backward_in(const LogprobBackwardArgs& args) {
  const Head& head = args.head;
  const PaddedBias bias(head);
  const Transform transform = bias.transform(head);
  const Operand<A> x(static_cast<const T*>(head.x), head.x_stride, head.rows, head.width);
  head_gradients<A, T, W>(head, x, args.gradients, [&](const GradientTile<A>& tile, int64_t first, int64_t words) {
    // logits(r, j, whole, n): those of row + r and column + j.
    const auto fill_from = [&](int64_t row, int64_t count, int64_t column, int64_t columns, auto&& logits) {
      RowGradient gradients[kTileRows];
      for (int64_t r = 0; r < count; ++r) gradients[r] = row_gradient(args, row + r);
      fill(tile, row, count, column, columns, [&](int64_t r, int64_t j, auto whole, int64_t n) {
        const vf z = logits(r, j, whole, n);
        vf g = gradients[r](z);
        const int64_t own = args.targets[row + r] - first - column - j;
        if (own >= 0 && own < n) g[own] = gradients[r].of_target();
        return g * transform.slope(z);
      });
    };
    if (args.kept)
      fill_all(tile, words, [&](int64_t row, int64_t count, int64_t column, int64_t columns) {
        const float* kept = args.kept + row * head.vocabulary + first + column;
        fill_from(row, count, column, columns, [&](int64_t r, int64_t j, auto whole, int64_t n) {
          return load(kept + r * head.vocabulary + j, whole, n);
        });
      });
    else
      words_product<A, W>(x, head, first, words,
                          [&](int64_t row, int64_t count, int64_t column, int64_t columns, const float* y) {
                            fill_from(row, count, column, columns, [&](int64_t r, int64_t j, auto, int64_t) {
                              return transform(load(y + r * kPanel + j), first + column + j);
                            });
                          });
  });
}

template <class E>
void linear_logprob_backward(const LogprobBackwardArgs& args) {
  using T = typename E::X;
  using W = typename E::Weight;
  if constexpr (std::is_same_v<T, bfloat16> && std::is_same_v<W, bfloat16> && IVL_VECTOR_BYTES == 64)
    if (as_bfloat16<T, W>(args.head)) return logprob_backward_in<bfloat16, T, W>(args);
  logprob_backward_in<float, T, W>(args);
}

}  // namespace
}  // namespace ivl::IVL_NAMESPACE
