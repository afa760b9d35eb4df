// Products of a few rows in registers, in three forms:
//   packed  rows times a packed panel
//   dot     weights with contiguous k: every weight is read once, straight into a dot product
//   stream  weights with contiguous columns: weights times broadcast inputs, sums in the L1 cache

namespace ivl::IVL_NAMESPACE {
namespace {

constexpr int64_t kTileRows = 6;
constexpr int64_t kDotRows = kLanes == 16 ? 6 : 4, kDotColumns = kLanes == 16 ? 4 : 2;
constexpr int64_t kStreamRows = 4;
constexpr int64_t kStreamAhead = 16;  // rows fetched ahead by stream
constexpr int64_t kChain = 128;       // additions in a row: sums of sums keep more digits

// c + a b; for units, c + the dot product of the two bfloat16 of each.
template <class A>
inline vf multiply_add(vf a, vf b, vf c) {
#if IVL_VECTOR_BYTES == 64
  if constexpr (std::is_same_v<A, bfloat16>) {
    // As assembly, so that only this needs the instruction; dot_bf16() is asked before.
    asm("vdpbf16ps %2, %1, %0" : "+v"(c) : "v"(a), "v"(b));
    return c;
  }
#endif
  return fma(a, b, c);
}

// Memory to fetch into the L2 cache while a product runs: in each step of k `count` lines, `apart` bytes apart.
struct Fetch {
  const char* at;
  int64_t count, step, apart;
};

// c [R, kPanel] (+)= a's rows [depth] times the packed panel b [depth, kPanel]; depth counts units.
template <class A, int R, int kFetch>
void packed_tile(const float* const* a, const float* b, int64_t depth, float* c, bool accumulate, const Fetch& fetch) {
  vf sums[R][kParts];
  const float* row[R];
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r) {
    row[r] = a[r];
#pragma GCC unroll 4
    for (int p = 0; p < kParts; ++p) sums[r][p] = vf{};
  }
  const char* line = fetch.at;
  for (int64_t k = 0; k < depth; ++k, b += kPanel, line += fetch.step) {
    vf w[kParts];
#pragma GCC unroll 4
    for (int p = 0; p < kParts; ++p) w[p] = load(b + p * kLanes);
#pragma GCC unroll 4
    for (int i = 0; i < kFetch; ++i) __builtin_prefetch(line + i * fetch.apart, 0, 2);
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
      const vf x = (vf)(vi{} + reinterpret_cast<const int32_t*>(row[r])[k]);
#pragma GCC unroll 4
      for (int p = 0; p < kParts; ++p) sums[r][p] = multiply_add<A>(x, w[p], sums[r][p]);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int p = 0; p < kParts; ++p) {
      float* to = c + r * kPanel + p * kLanes;
      store(to, accumulate ? load(to) + sums[r][p] : sums[r][p]);
    }
}

template <class A, int R>
void packed_tile(const float* const* a, const float* b, int64_t depth, float* c, bool accumulate, const Fetch& fetch) {
  if (fetch.count == 0) packed_tile<A, R, 0>(a, b, depth, c, accumulate, fetch);
  else if (fetch.count == 1) packed_tile<A, R, 1>(a, b, depth, c, accumulate, fetch);
  else if (fetch.count == 2) packed_tile<A, R, 2>(a, b, depth, c, accumulate, fetch);
  else packed_tile<A, R, 4>(a, b, depth, c, accumulate, fetch);
}

template <class A>
void packed_rows(int64_t rows, const float* const* a, const float* b, int64_t depth, float* c, bool accumulate,
                 Fetch fetch = {}) {
  const float* row[kTileRows];
  std::copy_n(a, rows, row);
  for (int64_t k = 0; k < depth; k += kChain, b += kChain * kPanel, accumulate = true) {
    const int64_t deep = std::min(kChain, depth - k);
    switch (rows) {
      case 1: packed_tile<A, 1>(row, b, deep, c, accumulate, fetch); break;
      case 2: packed_tile<A, 2>(row, b, deep, c, accumulate, fetch); break;
      case 3: packed_tile<A, 3>(row, b, deep, c, accumulate, fetch); break;
      case 4: packed_tile<A, 4>(row, b, deep, c, accumulate, fetch); break;
      case 5: packed_tile<A, 5>(row, b, deep, c, accumulate, fetch); break;
      default: packed_tile<A, 6>(row, b, deep, c, accumulate, fetch);
    }
    for (int64_t r = 0; r < rows; ++r) row[r] += deep;
    fetch.at += deep * fetch.step;
  }
}

// The sums of the lanes of kDotColumns vectors.
inline void store_sums(float* to, const vf (&v)[kDotColumns]) {
#if IVL_VECTOR_BYTES == 64
  const vf a = interleave_low(v[0], v[1]) + interleave_high(v[0], v[1]);
  const vf b = interleave_low(v[2], v[3]) + interleave_high(v[2], v[3]);
  typedef double vd __attribute__((vector_size(64)));
  typedef int64_t vl __attribute__((vector_size(64)));
  const vf low = (vf)__builtin_shuffle((vd)a, (vd)b, vl{0, 8, 1, 9, 2, 10, 3, 11});
  const vf high = (vf)__builtin_shuffle((vd)a, (vd)b, vl{4, 12, 5, 13, 6, 14, 7, 15});
  const __m512 all = (__m512)(low + high);
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
  _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
#else
  for (int j = 0; j < kDotColumns; ++j) to[j] = sum(v[j]);
#endif
}

// sums [R, kDotColumns] (+)= dot products, lane by lane, of a's rows with rows of weights, both contiguous in k. When c
// is not null, the sums of their lanes go there instead (row stride kPanel). Each step fetches its share, one of
// kShares, of the weights that come next: `next` is where, and is left where the following tile goes on.
template <class A, int R, int kShares, class T>
void dot_tile(const A* const* a, const T* const* w, int64_t depth, const char*& next, vf (*sums)[kDotColumns],
              bool accumulate, float* c) {
  constexpr int step = std::is_same_v<A, bfloat16> ? 2 * kLanes : kLanes;
  constexpr int kShare = kDotColumns * step * sizeof(T) / kShares;
  vf v[R][kDotColumns] = {};
  const A* row[R];
  const T* weight[kDotColumns];
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r) row[r] = a[r];
#pragma GCC unroll 4
  for (int j = 0; j < kDotColumns; ++j) weight[j] = w[j];
  const char* fetch = next;
  for (int64_t k = 0; k < depth; k += step, fetch += kShare) {
    vf y[kDotColumns];
#pragma GCC unroll 4
    for (int j = 0; j < kDotColumns; ++j) {
      if constexpr (step == 2 * kLanes) {
        std::memcpy(&y[j], weight[j] + k, sizeof(vf));
      } else {
        y[j] = load(weight[j] + k);
      }
    }
#pragma GCC unroll 4
    for (int line = 0; line < kShare; line += 64) __builtin_prefetch(fetch + line, 0, 2);
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
      vf x;
      std::memcpy(&x, row[r] + k, sizeof x);
#pragma GCC unroll 4
      for (int j = 0; j < kDotColumns; ++j) v[r][j] = multiply_add<A>(x, y[j], v[r][j]);
    }
  }
  next = fetch;
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r) {
    if (accumulate)
#pragma GCC unroll 4
      for (int j = 0; j < kDotColumns; ++j) v[r][j] += sums[r][j];
    if (c != nullptr) {
      store_sums(c + r * kPanel, v[r]);
    } else {
#pragma GCC unroll 4
      for (int j = 0; j < kDotColumns; ++j) sums[r][j] = v[r][j];
    }
  }
}

template <class A, int kShares, class T>
void dot_rows(int64_t rows, const A* const* a, const T* const* w, int64_t depth, const char*& next,
              vf (*sums)[kDotColumns], bool accumulate, float* c) {
  switch (rows) {
    case 1: return dot_tile<A, 1, kShares>(a, w, depth, next, sums, accumulate, c);
    case 2: return dot_tile<A, 2, kShares>(a, w, depth, next, sums, accumulate, c);
    case 3: return dot_tile<A, 3, kShares>(a, w, depth, next, sums, accumulate, c);
    case 4: return dot_tile<A, 4, kShares>(a, w, depth, next, sums, accumulate, c);
#if IVL_VECTOR_BYTES == 64
    case 5: return dot_tile<A, 5, kShares>(a, w, depth, next, sums, accumulate, c);
    case 6: return dot_tile<A, 6, kShares>(a, w, depth, next, sums, accumulate, c);
#endif
  }
}

// c [R, columns] += a's rows times w [depth, columns] (row stride `stride`), columns % kLanes == 0.
// Rows are fetched kStreamAhead before their use, at the end those of the next weights, at `after`.
template <int R, class T>
void stream_tile(const float* const* a, const T* w, int64_t stride, int64_t depth, int64_t columns, const T* after,
                 float* c) {
  constexpr int kDeep = 4;
  int64_t k = 0;
  for (; k + kDeep <= depth; k += kDeep, w += kDeep * stride) {
    const int64_t beyond = k + kStreamAhead - depth;
    const T* fetch = beyond < 0 || after == nullptr ? w + kStreamAhead * stride : after + beyond * stride;
    vf x[R][kDeep];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int d = 0; d < kDeep; ++d) x[r][d] = splat(a[r][k + d]);
    for (int64_t j = 0; j < columns; j += kLanes) {
      vf v[kDeep];
#pragma GCC unroll 4
      for (int d = 0; d < kDeep; ++d) {
        v[d] = load(w + d * stride + j);
        __builtin_prefetch(fetch + d * stride + j, 0, 2);
      }
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        vf total = load(c + r * columns + j);
#pragma GCC unroll 4
        for (int d = 0; d < kDeep; ++d) total = fma(x[r][d], v[d], total);
        store(c + r * columns + j, total);
      }
    }
  }
  for (; k < depth; ++k, w += stride)
    for (int r = 0; r < R; ++r)
      for (int64_t j = 0; j < columns; j += kLanes)
        store(c + r * columns + j, fma(splat(a[r][k]), load(w + j), load(c + r * columns + j)));
}

template <class T>
void stream_rows(int64_t rows, const float* const* a, const T* w, int64_t stride, int64_t depth, int64_t columns,
                 const T* after, float* c) {
  switch (rows) {
    case 1: return stream_tile<1>(a, w, stride, depth, columns, after, c);
    case 2: return stream_tile<2>(a, w, stride, depth, columns, after, c);
    case 3: return stream_tile<3>(a, w, stride, depth, columns, after, c);
    default: return stream_tile<4>(a, w, stride, depth, columns, after, c);
  }
}

}  // namespace
}  // namespace ivl::IVL_NAMESPACE
