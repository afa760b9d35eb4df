// Products, packing and powers of attention for one instruction set; see attention_kernels.h.

namespace ivl::IVL_NAMESPACE {
namespace {

constexpr int kWide = 2 * kLanes;             // columns of a tile: two vectors
constexpr int kRows = kLanes == 16 ? 12 : 6;  // rows of a tile, as the registers allow
constexpr int64_t kKeys = 256;                // keys of a block
constexpr int64_t kStride = kKeys + 16;  // between rows: a little more, so that they fall into different cache sets
constexpr int64_t kTaskRows = 32 * 12;   // rows that one task keeps in the second-level cache
constexpr int64_t kQueries = 48;         // rows of a block of the backward
constexpr int64_t kFewRows = 16;         // up to this, keys and values are read in place, and split over threads
constexpr int64_t kSplit = 512;          // keys of such a part
constexpr float kNothing = -3.4028235e38f;  // a maximum before any key: the least number
constexpr double kLog2e = 1.4426950408889634;

static_assert(kMaxHeadDim <= kKeys);

inline int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

inline vf maximum(vf a, vf b) { return a > b ? a : b; }

inline float added(vf v) {
#if IVL_VECTOR_BYTES == 64
  return _mm512_reduce_add_ps((__m512)v);
#else
  return sum(v);
#endif
}

// 2^x for x <= 0, to 1.3 units in the last place; exactly 1 at 0, and 0 below -126.
inline vf exp2_negative(vf x) {
#if IVL_VECTOR_BYTES == 64
  const __m512 n = _mm512_roundscale_ps((__m512)x, 8);
  const vf r = x - (vf)n;
#else
  const vf magic = splat(12582912.0f);  // adding 1.5 * 2^23 rounds to an integer
  const vi under = x < splat(-126.0f);
  const vf shifted = (under ? splat(-126.0f) : x) + magic;
  const vf r = x - (shifted - magic);
#endif
  vf y = fma(splat(1.3264726e-3f), r, splat(9.6715130e-3f));
  y = fma(y, r, splat(5.5507336e-2f));
  y = fma(y, r, splat(2.4022242e-1f));
  y = fma(y, r, splat(6.9314700e-1f));
  y = fma(y, r, splat(1.0f));
#if IVL_VECTOR_BYTES == 64
  const __mmask16 kept = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);  // NaN too
  return (vf)_mm512_maskz_scalef_ps(kept, (__m512)y, n);
#else
  const vf scale = (vf)(((vi)shifted - (vi)magic + 127) << 23);
  return under ? vf{} : y * scale;
#endif
}

// How a product of two operands is added up: as float32, or as pairs of bfloat16 in 32 bits (only after dot_bf16()).
enum class Product { float32, bf16_pairs };

template <Product P>
inline vf spread(const float* a) {
  if constexpr (P == Product::float32) return splat(*a);
  int32_t bits;
  std::memcpy(&bits, a, sizeof bits);
  return (vf)(bits - vi{});
}

template <Product P>
inline vf multiply_add(vf a, vf b, vf c) {
#if IVL_VECTOR_BYTES == 64
  if constexpr (P == Product::bf16_pairs) {
    asm("vdpbf16ps %2, %1, %0" : "+v"(c) : "v"(a), "v"(b));  // as assembly, so that only this needs the instruction
    return c;
  }
#endif
  return fma(a, b, c);
}

enum class Store { set, add };

// c [R, V vectors] = factor a [R, depth] b, or += a b. Row r of a at a[r * RowStride + k * DepthStride], row k of b at
// b[k * b_stride].
template <int R, int V, int64_t RowStride, int64_t DepthStride, Store S, Product P, class B>
inline void tile(int64_t depth, const float* a, const B* b, int64_t b_stride, float factor, float* c,
                 int64_t c_stride) {
  vf sums[R][V];
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sums[r][v] = vf{};
  for (int64_t k = 0; k < depth; ++k, a += DepthStride, b += b_stride) {
    vf columns[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) columns[v] = load(b + v * kLanes);
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      const vf x = spread<P>(a + r * RowStride);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sums[r][v] = multiply_add<P>(x, columns[v], sums[r][v]);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      float* to = c + r * c_stride + v * kLanes;
      store(to, S == Store::add ? load(to) + sums[r][v] : sums[r][v] * splat(factor));
    }
}

// Any number of rows, and columns up to two vectors, of panels of b. Transposed: a is read down its columns.
template <Store S, Product P = Product::float32, bool Transposed = false>
inline void tiles(int64_t rows, int64_t columns, int64_t depth, const float* a, const float* b, float factor, float* c,
                  int64_t c_stride) {
  constexpr int64_t across = Transposed ? 1 : kStride, along = Transposed ? kStride : 1;
  const auto some = [&]<int R>() {
    if (columns > kLanes)
      tile<R, 2, across, along, S, P>(depth, a, b, kWide, factor, c, c_stride);
    else
      tile<R, 1, across, along, S, P>(depth, a, b, kWide, factor, c, c_stride);
    rows -= R, a += R * across, c += R * c_stride;
  };
  while (rows >= kRows) some.template operator()<kRows>();
  if (kRows > 8 && rows >= 8) some.template operator()<8>();
  if (rows >= 4) some.template operator()<4>();
  if (rows >= 2) some.template operator()<2>();
  if (rows >= 1) some.template operator()<1>();
}

template <class T>
inline vf get(const T* p, int64_t n) {
  return n >= kLanes ? load(p) : load_some(p, n);
}

// A row in float32, times `scale`, filled with zeros up to whole vectors.
template <class T>
inline void widen(const T* from, int64_t n, float scale, float* to) {
  for (int64_t i = 0; i < n; i += kLanes) store(to + i, get(from + i, n - i) * splat(scale));
}

// Panels [columns / kWide][rows][kWide] of a matrix [rows, columns]; missing columns are zero.
template <class T>
void pack(const T* from, int64_t stride, int64_t rows, int64_t columns, int64_t panel_rows, float* to) {
  for (int64_t r = 0; r < rows; ++r, from += stride)
    for (int64_t i = 0; i < columns; i += kLanes)
      store(to + (i / kWide * panel_rows + r) * kWide + i % kWide, get(from + i, columns - i));
}

// Panels [rows / kWide][columns][kWide] of its transpose; missing rows up to whole panels are zero.
template <class T>
void pack_transposed(const T* from, int64_t stride, int64_t rows, int64_t columns, float* to) {
  for (int64_t r = 0; r < rows; r += kLanes)
    for (int64_t i = 0; i < columns; i += kLanes) {
      vf v[kLanes];
#pragma GCC unroll 16
      for (int j = 0; j < kLanes; ++j) v[j] = r + j < rows ? get(from + (r + j) * stride + i, columns - i) : vf{};
      transpose(v);
      float* target = to + (r / kWide * columns + i) * kWide + r % kWide;
      const int64_t here = std::min<int64_t>(kLanes, columns - i);
      for (int64_t j = 0; j < here; ++j) store(target + j * kWide, v[j]);
    }
  if (rows % kWide != 0 && rows % kWide <= kLanes)  // the other half of the last panel
    for (int64_t j = 0; j < columns; ++j) store(to + (rows / kWide * columns + j) * kWide + kLanes, vf{});
}

// Panels [columns / kWide][rows / 2][kWide] of pairs of rows of a bfloat16 matrix; a row that is missing is zero.
inline void pack_pairs(const bfloat16* from, int64_t stride, int64_t rows, int64_t columns, int64_t panel_rows,
                       float* to) {
  for (int64_t r = 0; r < rows; r += 2, from += 2 * stride)
    for (int64_t i = 0; i < columns; i += kLanes) {
      const vu first = (vu)get(from + i, columns - i),
               second = r + 1 < rows ? (vu)get(from + stride + i, columns - i) : vu{};
      store(to + (i / kWide * panel_rows + r / 2) * kWide + i % kWide, (vf)(first >> 16 | second));
    }
}

}  // namespace
}  // namespace ivl::IVL_NAMESPACE
