#include "ivl/activations.h"
#include "ivl/gemm/product.h"

namespace ivl::IVL_NAMESPACE {
namespace {

constexpr int64_t kActiveBytes = int64_t{16} << 20;  // of activations, and of copied rows, worked on at a time
constexpr GatedActivation kSilu = {Gating::silu, 0, 0};

// The activations of `count` rows from `first` on, into `active`, `stride` apart.
template <class A, class T>
void activate(const Mlp<T>& p, const A* const* rows, int64_t first, int64_t count, A* active, int64_t stride) {
  if (!p.gate) {
    const StridedMatrix<T> up{p.up, 1, p.width};
    return product_of(rows, count, p.width, up, p.inner, Form::best,
                      [&](int64_t row, int64_t column, int64_t columns, const float* values) {
                        T* pre = p.pre ? p.pre + (first + row) * p.inner + column : nullptr;
                        A* to = active + row * stride + column;
                        by_vector(columns, [&](int64_t j, auto whole, int64_t n) {
                          vf v = load(values + j);
                          if (p.up_bias) v += load(p.up_bias + column + j, whole, n);
                          if (pre) store(pre + j, v, whole, n);
                          store(to + j, gelu(v), whole, n);
                        });
                      });
  }
  const auto source = [&](int64_t panel) {  // half gates, half ups
    const int64_t column = panel * kHalf, n = std::min(kHalf, p.inner - column);
    return RowPanel<T>{p.gate + column * p.width, p.up + column * p.width, p.width, n, n};
  };
  const auto finish = [&](int64_t row, int64_t n, int64_t panel, const float* c) {
    const int64_t column = panel * kHalf, columns = std::min(kHalf, p.inner - column);
    for (int64_t r = row; r < row + n; ++r, c += kPanel) {
      T* pre = p.pre ? p.pre + (first + r) * 2 * p.inner + column : nullptr;
      A* to = active + r * stride + column;
      by_vector(columns, [&](int64_t j, auto whole, int64_t left) {
        const vf gate = load(c + j), up = load(c + kHalf + j);
        if (pre) {
          store(pre + j, gate, whole, left);
          store(pre + p.inner + j, up, whole, left);
        }
        store(to + j, gated(gate, up, kSilu), whole, left);
      });
    }
  };
  product(rows, count, p.width, (p.inner + kHalf - 1) / kHalf, source, finish);
}

template <class A, class T>
void mlp_in(const Mlp<T>& p) {
  constexpr bool direct = std::is_same_v<A, T>;
  const int64_t stride = padded_stride<A>(p.inner), copied = padded_stride<A>(p.width);
  const int64_t most = std::max<int64_t>(64, kActiveBytes / (stride * int64_t{sizeof(A)}));
  const int64_t chunks = (p.rows + most - 1) / most, chunk = chunks ? (p.rows + chunks - 1) / chunks : 0;
  const Scratch<A> copy(direct ? 0 : chunk * copied), active(chunk * stride);
  const Scratch<const A*> from(chunk), to(chunk);
  for (int64_t m = 0; m < chunk; ++m) to[m] = active.get() + m * stride;
  for (int64_t first = 0; first < p.rows; first += chunk) {
    const int64_t here = std::min(chunk, p.rows - first);
    if constexpr (direct) {
      for (int64_t m = 0; m < here; ++m) from[m] = p.x + (first + m) * p.x_stride;
    } else {
      for (int64_t m = 0; m < here; ++m) from[m] = copy.get() + m * copied;
      copy_rows(StridedMatrix<T>{p.x + first * p.x_stride, p.x_stride, 1}, here, p.width, copy.get());
    }
    activate(p, from.get(), first, here, active.get(), stride);
    product_of(to.get(), here, p.inner, StridedMatrix<T>{p.down, 1, p.inner}, p.outputs, Form::best,
               [&](int64_t row, int64_t column, int64_t columns, const float* values) {
                 T* out = p.out + (first + row) * p.outputs + column;
                 by_vector(columns, [&](int64_t j, auto whole, int64_t n) {
                   vf v = load(values + j);
                   if (p.down_bias) v += load(p.down_bias + column + j, whole, n);
                   store(out + j, v, whole, n);
                 });
               });
  }
}

template <class T>
void mlp(const Mlp<T>& p) {
#if IVL_VECTOR_BYTES == 64
  if constexpr (std::is_same_v<T, bfloat16>)
    if (dot_bf16() && p.width % 2 == 0 && p.inner % 2 == 0) return mlp_in<T>(p);
#endif
  mlp_in<float>(p);
}

template <class T>
void gated_backward(const T* pre, const T* grad, int64_t rows, int64_t inner, T* active, T* dpre) {
  parallel_for(rows, 4, [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m)
      by_vector(inner, [&](int64_t i, auto whole, int64_t n) {
        const int64_t at = m * 2 * inner + i, to = m * inner + i;
        const GateGradient d = gate_gradient(load(pre + at, whole, n), load(pre + at + inner, whole, n), kSilu);
        const vf g = load(grad + to, whole, n);
        store(active + to, d.active, whole, n);
        store(dpre + at, g * d.gate, whole, n);
        store(dpre + at + inner, g * d.up, whole, n);
      });
  });
}

}  // namespace
}  // namespace ivl::IVL_NAMESPACE
