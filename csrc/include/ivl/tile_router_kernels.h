// Kernels of the tile router for one instruction set; see foreach_isa.h. Each works in one thread.
#include "ivl/activations.h"

namespace ivl::IVL_NAMESPACE {
namespace {

constexpr int kRegisters = IVL_VECTOR_BYTES == 64 ? 32 : 16;

// ---- pooling ----

// Heads of a score block: vectors of consecutive heads times rows of z, all in registers.
constexpr int kHeadVectors = IVL_VECTOR_BYTES == 64 ? 1 : 2;
constexpr int kScoreRows = IVL_VECTOR_BYTES == 64 ? 16 : IVL_VECTOR_BYTES == 32 ? 4 : 4;
constexpr int kPoolHeads = kRegisters / 4;  // heads times channel vectors of a pooling block
constexpr int kPoolVectors = IVL_VECTOR_BYTES == 64 ? 3 : 2;
constexpr int kBlockRows = 32;

template <class A>
constexpr int kHeadGroup = kHeadVectors * lanes<A>;

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

template <class A>
int64_t padded_width(int64_t width) {
  return round_up(width, lanes<A>);
}

// scores[r][0:kHeadGroup] = sum over c of z[r][c] ut[c][0:kHeadGroup], for ROWS rows of z. Sums of kChain channels are
// added up: one chain over thousands of channels would lose accuracy.
template <int ROWS, class A>
inline void score_block(const A* z, int64_t z_stride, const A* ut, int64_t width, A* scores, int64_t score_stride) {
  constexpr int64_t kChain = 128;
  for (int64_t c0 = 0; c0 < width; c0 += kChain) {
    Vec<A> sums[ROWS][kHeadVectors] = {};
    const int64_t stop = std::min(width, c0 + kChain);
    for (int64_t c = c0; c < stop; ++c) {
      Vec<A> u[kHeadVectors];
      for (int v = 0; v < kHeadVectors; ++v) u[v] = load(ut + c * kHeadGroup<A> + v * lanes<A>);
#pragma GCC unroll 16
      for (int r = 0; r < ROWS; ++r) {
        const Vec<A> value = Vec<A>{} + z[r * z_stride + c];
#pragma GCC unroll 2
        for (int v = 0; v < kHeadVectors; ++v) sums[r][v] = fma(value, u[v], sums[r][v]);
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < kHeadVectors; ++v) {
        A* out = scores + r * score_stride + v * lanes<A>;
        store(out, c0 ? load(out) + sums[r][v] : sums[r][v]);
      }
  }
}

// scores [rows, padded heads] of a block of z; ut holds the head groups one after the other.
template <class A>
void score_rows(const A* z, int64_t z_stride, const A* ut, int64_t rows, int64_t width, int64_t padded, A* scores) {
  for (int64_t h = 0; h < padded; h += kHeadGroup<A>) {
    const A* group = ut + h * width;
    int64_t r = 0;
    for (; r + kScoreRows <= rows; r += kScoreRows)
      score_block<kScoreRows>(z + r * z_stride, z_stride, group, width, scores + r * padded + h, padded);
    for (; r < rows; ++r) score_block<1>(z + r * z_stride, z_stride, group, width, scores + r * padded + h, padded);
  }
}

// sums[h][c] = scale[h] sums[h][c] + sum over r of weight[r][h] z[r][c], for HEADS heads and VECTORS vectors of
// channels.
template <int HEADS, int VECTORS, class A>
inline void pool_block(const A* z, int64_t z_stride, const A* weight, int64_t weight_stride, const A* scale,
                       int64_t rows, A* sums, int64_t sum_stride, const char* ahead, int64_t ahead_stride) {
  Vec<A> s[HEADS][VECTORS];
  for (int h = 0; h < HEADS; ++h)
    for (int v = 0; v < VECTORS; ++v) s[h][v] = load(sums + h * sum_stride + v * lanes<A>) * scale[h];
  for (int64_t r = 0; r < rows; ++r) {
    Vec<A> x[VECTORS];
#pragma GCC unroll 3
    for (int v = 0; v < VECTORS; ++v) x[v] = load(z + r * z_stride + v * lanes<A>);
    if (ahead)
#pragma GCC unroll 3
      for (int v = 0; v < VECTORS; ++v) __builtin_prefetch(ahead + r * ahead_stride + v * IVL_VECTOR_BYTES, 0, 2);
#pragma GCC unroll 8
    for (int h = 0; h < HEADS; ++h) {
      const Vec<A> w = Vec<A>{} + weight[r * weight_stride + h];
#pragma GCC unroll 3
      for (int v = 0; v < VECTORS; ++v) s[h][v] = fma(w, x[v], s[h][v]);
    }
  }
  for (int h = 0; h < HEADS; ++h)
    for (int v = 0; v < VECTORS; ++v) store(sums + h * sum_stride + v * lanes<A>, s[h][v]);
}

// `width` is padded to whole vectors, `heads` are not padded; `ahead` is the next block in memory or null.
template <class A>
void pool_rows(const A* z, int64_t z_stride, const A* weight, int64_t weight_stride, const A* scale, int64_t rows,
               int64_t heads, int64_t width, A* sums, const char* ahead, int64_t ahead_stride, int64_t element) {
  constexpr int64_t step = kPoolVectors * lanes<A>;
  for (int64_t c = 0; c < width;) {
    const bool wide = c + step <= width;
    for (int64_t h = 0; h < heads;) {
      const char* next = h == 0 && ahead ? ahead + c * element : nullptr;
      A* s = sums + h * width + c;
      const bool many = h + kPoolHeads <= heads;
      if (many && wide)
        pool_block<kPoolHeads, kPoolVectors>(z + c, z_stride, weight + h, weight_stride, scale + h, rows, s, width,
                                             next, ahead_stride);
      else if (many)
        pool_block<kPoolHeads, 1>(z + c, z_stride, weight + h, weight_stride, scale + h, rows, s, width, next,
                                  ahead_stride);
      else if (wide)
        pool_block<1, kPoolVectors>(z + c, z_stride, weight + h, weight_stride, scale + h, rows, s, width, next,
                                    ahead_stride);
      else
        pool_block<1, 1>(z + c, z_stride, weight + h, weight_stride, scale + h, rows, s, width, next, ahead_stride);
      h += many ? kPoolHeads : 1;
    }
    c += wide ? step : lanes<A>;
  }
}

// Widen a block of z into rows of z_stride elements, padded with zeros to `padded` channels. The copy's odd stride
// keeps the rows out of each other's cache sets, which rows of 4 KB would share.
template <class T, class A>
void load_block(const T* z, int64_t stride, int64_t rows, int64_t width, int64_t padded, A* block,
                int64_t block_stride) {
  for (int64_t r = 0; r < rows; ++r) {
    int64_t c = 0;
    for (; c + lanes<A> <= width; c += lanes<A>) store(block + r * block_stride + c, load(z + r * stride + c));
    if (c < padded) store(block + r * block_stride + c, load_some(z + r * stride + c, width - c));
  }
}

template <class A>
int64_t padded_heads(int64_t heads) {
  return round_up(heads, kHeadGroup<A>);
}

// u [heads, width] -> ut, one head group after the other, [width, kHeadGroup] each.
template <class A>
void pack_queries(const A* u, int64_t heads, int64_t width, A* ut) {
  for (int64_t group = 0; group < padded_heads<A>(heads); group += kHeadGroup<A>)
    for (int64_t c = 0; c < width; ++c)
      for (int64_t h = group; h < group + kHeadGroup<A>; ++h)
        *ut++ = h < heads ? u[h * width + c] : A(0);
}

// Softmax pooling of `rows` rows, not yet divided: sums [heads, padded width], largest and denominator [padded heads].
template <class T, class A>
void pool_range(const T* z, int64_t stride, int64_t rows, int64_t width, const A* ut, int64_t heads, A* sums,
                A* largest, A* denominator) {
  const int64_t padded = round_up(width, lanes<A>), all = padded_heads<A>(heads), block_stride = padded + lanes<A>;
  std::vector<A> block(kBlockRows * block_stride), weight(kBlockRows * all), scale(all);
  std::fill(sums, sums + heads * padded, A(0));
  for (int64_t r0 = 0; r0 < rows; r0 += kBlockRows) {
    const int64_t n = std::min<int64_t>(kBlockRows, rows - r0);
    load_block(z + r0 * stride, stride, n, width, padded, block.data(), block_stride);
    score_rows(block.data(), block_stride, ut, n, width, all, weight.data());
    for (int64_t h = 0; h < all; h += lanes<A>) {
      const Vec<A> before = r0 ? load(largest + h) : load(&weight[h]);
      Vec<A> top = before;
      for (int64_t r = 0; r < n; ++r) {
        const Vec<A> s = load(&weight[r * all + h]);
        top = s > top ? s : top;
      }
      const Vec<A> shrink = exp_negative_fast(before - top);
      Vec<A> sum = r0 ? load(denominator + h) * shrink : Vec<A>{};
      for (int64_t r = 0; r < n; ++r) {
        const Vec<A> w = exp_negative_fast(load(&weight[r * all + h]) - top);
        store(&weight[r * all + h], w);
        sum += w;
      }
      store(&scale[h], shrink);
      store(largest + h, top);
      store(denominator + h, sum);
    }
    const char* ahead =
        r0 + 2 * kBlockRows <= rows ? reinterpret_cast<const char*>(z + (r0 + kBlockRows) * stride) : nullptr;
    pool_rows(block.data(), block_stride, weight.data(), all, scale.data(), n, heads, padded, sums, ahead,
              stride * static_cast<int64_t>(sizeof(T)), static_cast<int64_t>(sizeof(T)));
  }
}

// out[c] = sum over the splits of factor[s] sums[s][c]; splits are `step` elements apart.
template <class A>
void combine_row(const A* sums, int64_t step, const A* factor, int64_t splits, int64_t width, A* out) {
  for (int64_t c = 0; c < width; ++c) {
    A total = factor[0] * sums[c];
    for (int64_t s = 1; s < splits; ++s) total += factor[s] * sums[s * step + c];
    out[c] = total;
  }
}

// out[r][c] = sum over h of weight[r][h] matrix[h][c], for ROWS rows and VECTORS vectors of channels.
template <int ROWS, int VECTORS, class A>
inline void expand_block(const A* weight, int64_t weight_stride, const A* const* matrix, int64_t heads, int64_t c,
                         A* out, int64_t out_stride) {
  Vec<A> sums[ROWS][VECTORS] = {};
  for (int64_t h = 0; h < heads; ++h) {
    Vec<A> x[VECTORS];
    for (int v = 0; v < VECTORS; ++v) x[v] = load(matrix[h] + c + v * lanes<A>);
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) {
      const Vec<A> w = Vec<A>{} + weight[r * weight_stride + h];
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v) sums[r][v] = fma(w, x[v], sums[r][v]);
    }
  }
  for (int r = 0; r < ROWS; ++r)
    for (int v = 0; v < VECTORS; ++v) store(out + r * out_stride + c + v * lanes<A>, sums[r][v]);
}

// Gradients of `rows` rows: du [heads, padded width] is overwritten, dz (null: not wanted) too. `rows_of` points at the
// 2 * heads rows (gradient of the pooled rows, then u) of `padded` channels that dz is a combination of.
template <class T, class A>
void pool_backward_range(const T* z, int64_t stride, int64_t rows, int64_t width, const A* ut, const A* gt,
                         int64_t heads, const A* lse, const A* delta, const A* const* rows_of, A* du, T* dz,
                         int64_t dz_stride) {
  const int64_t padded = round_up(width, lanes<A>), all = padded_heads<A>(heads), block_stride = padded + lanes<A>;
  std::vector<A> block(kBlockRows * block_stride), p(kBlockRows * all), ds(kBlockRows * all), one(all, A(1));
  std::vector<A> both(kBlockRows * 2 * heads);
  std::fill(du, du + heads * padded, A(0));
  for (int64_t r0 = 0; r0 < rows; r0 += kBlockRows) {
    const int64_t n = std::min<int64_t>(kBlockRows, rows - r0);
    load_block(z + r0 * stride, stride, n, width, padded, block.data(), block_stride);
    score_rows(block.data(), block_stride, ut, n, width, all, p.data());
    score_rows(block.data(), block_stride, gt, n, width, all, ds.data());
    for (int64_t r = 0; r < n; ++r)
      for (int64_t h = 0; h < heads; ++h) {
        const A weight = std::exp(p[r * all + h] - lse[h]);
        const A slope = weight * (ds[r * all + h] - delta[h]);
        ds[r * all + h] = slope;
        both[r * 2 * heads + h] = weight;
        both[r * 2 * heads + heads + h] = slope;
      }
    pool_rows<A>(block.data(), block_stride, ds.data(), all, one.data(), n, heads, padded, du, nullptr, 0, 0);
    if (!dz) continue;
    constexpr int kRows = 4, kVectors = IVL_VECTOR_BYTES == 64 ? 4 : 2;
    for (int64_t r = 0; r < n;) {
      const bool many = r + kRows <= n;
      const A* weight = both.data() + r * 2 * heads;
      A* out = block.data() + r * block_stride;
      for (int64_t c = 0; c < padded;) {
        const bool wide = c + kVectors * lanes<A> <= padded;
        if (many && wide) expand_block<kRows, kVectors>(weight, 2 * heads, rows_of, 2 * heads, c, out, block_stride);
        else if (many) expand_block<kRows, 1>(weight, 2 * heads, rows_of, 2 * heads, c, out, block_stride);
        else if (wide) expand_block<1, kVectors>(weight, 2 * heads, rows_of, 2 * heads, c, out, block_stride);
        else expand_block<1, 1>(weight, 2 * heads, rows_of, 2 * heads, c, out, block_stride);
        c += wide ? kVectors * lanes<A> : lanes<A>;
      }
      r += many ? kRows : 1;
    }
    for (int64_t r = 0; r < n; ++r)
      for (int64_t c = 0; c < width; ++c) narrow(block[r * block_stride + c], dz + (r0 + r) * dz_stride + c);
  }
}

// ---- products with few rows ----

constexpr int kWeightRows = 4;
constexpr int kInputRows = IVL_VECTOR_BYTES == 64 ? 6 : 2;

// Rows of x that a kernel call takes: at most kInputRows, and about the same number each time.
inline int64_t input_block(int64_t rows) {
  const int64_t blocks = (rows + kInputRows - 1) / kInputRows;
  return (rows + blocks - 1) / blocks;
}

// x [rows, width], rows `stride` apart -> for every block of rows: [vectors of width][row] vectors, so that the kernel
// below reads one stream. The last vector is padded with zeros.
template <class A>
void pack_inputs(const A* x, int64_t stride, int64_t rows, int64_t width, A* packed) {
  const int64_t block = input_block(rows);
  for (int64_t m = 0; m < rows; m += block)
    for (int64_t k = 0; k < width; k += lanes<A>)
      for (int64_t i = m; i < std::min(rows, m + block); ++i, packed += lanes<A>)
        store(packed, width - k < lanes<A> ? load_some(x + i * stride + k, width - k) : load(x + i * stride + k));
}

template <class A>
int64_t packed_inputs(int64_t rows, int64_t width) {
  return rows * round_up(width, lanes<A>);
}

// out[m][n] = w[n] x[m] + bias[n] for NB rows of w and MB packed rows of x. Sums of kDotChain vectors are added up, for
// the accuracy of long rows.
constexpr int64_t kDotChain = 64;

template <int NB, int MB, class T, class A>
inline void dot_block(const T* w, int64_t stride, const A* x, int64_t width, bool prefetch, A* out, int64_t out_stride,
                      const A* bias) {
  Vec<A> sums[NB][MB] = {};
  const T* next = w + NB * stride;
  for (int64_t k0 = 0; k0 == 0 || k0 < width; k0 += kDotChain * lanes<A>) {
    Vec<A> s[NB][MB] = {};
    const int64_t stop = std::min(width, k0 + kDotChain * lanes<A>);
    int64_t k = k0;
    for (; k + lanes<A> <= stop; k += lanes<A>) {
      Vec<A> value[NB];
#pragma GCC unroll 4
      for (int n = 0; n < NB; ++n) value[n] = load(w + n * stride + k);
      if (prefetch)
#pragma GCC unroll 4
        for (int n = 0; n < NB; ++n) __builtin_prefetch(next + n * stride + k, 0, 2);
#pragma GCC unroll 6
      for (int m = 0; m < MB; ++m, x += lanes<A>) {
        const Vec<A> v = load(x);
#pragma GCC unroll 4
        for (int n = 0; n < NB; ++n) s[n][m] = fma(value[n], v, s[n][m]);
      }
    }
    if (k < stop)
      for (int n = 0; n < NB; ++n) {
        const Vec<A> value = load_some(w + n * stride + k, stop - k);
        for (int m = 0; m < MB; ++m) s[n][m] = fma(value, load(x + m * lanes<A>), s[n][m]);
      }
#pragma GCC unroll 4
    for (int n = 0; n < NB; ++n)
#pragma GCC unroll 6
      for (int m = 0; m < MB; ++m) sums[n][m] = k0 ? sums[n][m] + s[n][m] : s[n][m];
  }
  for (int m = 0; m < MB; ++m)
    for (int n = 0; n < NB; ++n) out[m * out_stride + n] = sum_of<16 / sizeof(A), lanes<A>, A>(sums[n][m]) + bias[n];
}

template <int NB, class T, class A>
inline void dot_rows(const T* w, int64_t stride, const A* packed, int64_t rows, int64_t width, bool prefetch, A* out,
                     int64_t out_stride, const A* bias) {
  const int64_t padded = round_up(width, lanes<A>), block = input_block(rows);
  for (int64_t m = 0; m < rows; m += block, prefetch = false) {
    const A* x = packed + m * padded;
    A* o = out + m * out_stride;
    switch (std::min(block, rows - m)) {
      case 1: dot_block<NB, 1>(w, stride, x, width, prefetch, o, out_stride, bias); break;
      case 2: dot_block<NB, 2>(w, stride, x, width, prefetch, o, out_stride, bias); break;
#if IVL_VECTOR_BYTES == 64
      case 3: dot_block<NB, 3>(w, stride, x, width, prefetch, o, out_stride, bias); break;
      case 4: dot_block<NB, 4>(w, stride, x, width, prefetch, o, out_stride, bias); break;
      case 5: dot_block<NB, 5>(w, stride, x, width, prefetch, o, out_stride, bias); break;
      case 6: dot_block<NB, 6>(w, stride, x, width, prefetch, o, out_stride, bias); break;
#endif
    }
  }
}

// out[m][n] for n in [begin, end) of one group, x packed.
template <class T, class A>
void linear_range(const T* w, int64_t stride, const A* bias, const A* packed, int64_t rows, int64_t width,
                  int64_t begin, int64_t end, A* out, int64_t out_stride) {
  for (int64_t n = begin; n < end;) {
    const T* block = w + n * stride;
    if (n + kWeightRows <= end) {
      const bool more = n + 2 * kWeightRows <= end;
      dot_rows<kWeightRows>(block, stride, packed, rows, width, more, out + n, out_stride, bias + n);
      n += kWeightRows;
    } else {
      dot_rows<1>(block, stride, packed, rows, width, false, out + n, out_stride, bias + n);
      n += 1;
    }
  }
}

template <class T, class A>
void widen_row(const T* row, int64_t width, A* out) {
  for (int64_t c = 0; c < width; ++c) out[c] = widen(row[c]);
}

// out[m][c] (+)= sum over DB rows d of x[m][d] w[d][c], for c in [begin, end).
template <int DB, class T, class A>
inline void add_rows(const A* x, int64_t x_stride, const T* w, int64_t stride, int64_t rows, int64_t begin, int64_t end,
                     bool first, A* out, int64_t out_stride) {
  int64_t c = begin;
  for (; c + lanes<A> <= end; c += lanes<A>) {
    Vec<A> value[DB];
#pragma GCC unroll 8
    for (int d = 0; d < DB; ++d) value[d] = load(w + d * stride + c);
    for (int64_t m = 0; m < rows; ++m) {
      Vec<A> s = first ? Vec<A>{} : load(out + m * out_stride + c);
#pragma GCC unroll 8
      for (int d = 0; d < DB; ++d) s = fma(Vec<A>{} + x[m * x_stride + d], value[d], s);
      store(out + m * out_stride + c, s);
    }
  }
  for (; c < end; ++c)
    for (int64_t m = 0; m < rows; ++m) {
      A s = first ? A(0) : out[m * out_stride + c];
      for (int d = 0; d < DB; ++d) s += x[m * x_stride + d] * widen(w[d * stride + c]);
      out[m * out_stride + c] = s;
    }
}

// out[m][c] = sum over d of x[m][d] w[d][c], for c in [begin, end).
template <class T, class A>
void transposed_range(const A* x, int64_t x_stride, const T* w, int64_t stride, int64_t rows, int64_t inputs,
                      int64_t begin, int64_t end, A* out, int64_t out_stride) {
  for (int64_t d = 0; d < inputs;) {
    const bool many = d + 8 <= inputs;
    if (many)
      add_rows<8>(x + d, x_stride, w + d * stride, stride, rows, begin, end, d == 0, out, out_stride);
    else
      add_rows<1>(x + d, x_stride, w + d * stride, stride, rows, begin, end, d == 0, out, out_stride);
    d += many ? 8 : 1;
  }
}

}  // namespace
}  // namespace ivl::IVL_NAMESPACE
